"""Router statistics: masks of padding, the load-balancing loss, entropy, identifiers of sets and stable top-k."""

import itertools
import math

import pytest
import torch

from longctx.moe import report
from longctx.moe.report import entropy, load_balancing_loss, set_keys, stable_topk, token_mask
from longctx.parallel.layout import Layout

CPU, F64 = torch.device("cpu"), torch.float64


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=F64)


def test_a_token_mask_is_false_for_padding():
    assert token_mask(Layout((0, 3)), CPU).tolist() == [True] * 3
    assert token_mask(Layout((0, 5), size=2, rank=0), CPU).tolist() == [True] * 3
    assert token_mask(Layout((0, 5), size=2, rank=1), CPU).tolist() == [True, True, False]
    assert token_mask(Layout((0, 1), size=2, rank=1), CPU).tolist() == [False]
    zigzag = Layout((0, 10), "zigzag", size=2, rank=0)  # pieces 0 and 3 of 3, 3, 3 and 1 tokens
    assert token_mask(zigzag, CPU).tolist() == [True] * 4 + [False] * 2


def test_the_loss_is_experts_times_the_sum_of_choices_per_token_times_mean_probability():
    p, counts = normal(2, 5, 4).softmax(dim=-1), torch.tensor([7, 0, 10, 3])
    want = 4 * sum(counts[e].item() / 10 * p[..., e].mean() for e in range(4))
    torch.testing.assert_close(load_balancing_loss(p, counts, Layout((0, 5))), want)


def test_a_balanced_router_has_the_number_of_choices_as_loss_and_a_collapsed_one_the_number_of_experts():
    layout, counts = Layout((0, 8)), torch.full((4,), 4)
    uniform = torch.full((1, 8, 4), 0.25, dtype=F64)
    assert load_balancing_loss(uniform, counts, layout).item() == pytest.approx(2)
    collapsed = torch.tensor([1.0, 0, 0, 0], dtype=F64).expand(1, 8, 4)
    assert load_balancing_loss(collapsed, torch.tensor([8, 0, 0, 0]), layout).item() == pytest.approx(4)


def test_the_gradient_of_a_probability_is_the_load_of_its_expert():
    p, counts = normal(2, 5, 4).requires_grad_(), torch.tensor([7, 0, 10, 3])
    load_balancing_loss(p, counts, Layout((0, 5))).backward()
    torch.testing.assert_close(p.grad, (4 * counts / 10 / 10).to(F64).expand(2, 5, 4))


def test_parts_of_ranks_sum_to_the_loss_of_the_sequence_and_padding_is_not_read(monkeypatch):
    p, chosen = normal(2, 5, 4).softmax(dim=-1), torch.tensor([[0, 1, 1, 3, 0], [2, 2, 2, 1, 1]])
    counts = chosen.flatten().bincount(minlength=4)
    want = load_balancing_loss(p, counts, Layout((0, 5)))
    group, parts = object(), []

    def all_reduce(x, used):
        assert used is group
        return counts.to(x.dtype)

    monkeypatch.setattr(report, "all_reduce", all_reduce)
    for rank in range(2):
        layout = Layout((0, 5), size=2, rank=rank, group=group)
        own = layout.shard(p, fill=torch.nan).requires_grad_()
        own_counts = layout.shard(chosen, fill=9).flatten().bincount(minlength=4)[:4]
        parts.append(load_balancing_loss(own, own_counts, layout))
        (grad,) = torch.autograd.grad(parts[-1], own)
        assert torch.isfinite(grad).all()
        assert not grad[:, ~token_mask(layout, CPU)].any()
    torch.testing.assert_close(sum(parts), want)


def test_a_loss_over_ranks_without_a_group_is_refused():
    with pytest.raises(ValueError, match="2 ranks"):
        load_balancing_loss(torch.zeros(1, 3, 4), torch.zeros(4), Layout((0, 5), size=2))


def test_set_keys_are_fixed_and_their_sums_identify_sets():
    keys = set_keys(8, CPU)
    assert (keys.dtype, keys.shape) == (torch.int64, (8,))
    set_keys.cache_clear()
    state = torch.get_rng_state()
    assert torch.equal(set_keys(8, CPU), keys)
    assert torch.equal(torch.get_rng_state(), state)
    subsets = [keys[list(s)].sum().item() for n in range(9) for s in itertools.combinations(range(8), n)]
    assert len(set(subsets)) == 2**8


def test_entropy_is_in_nats_and_zero_for_a_certain_choice():
    assert entropy(torch.full((2, 5), 0.2, dtype=F64)).tolist() == pytest.approx([math.log(5)] * 2)
    assert entropy(torch.tensor([[0.0, 1.0, 0.0]])).tolist() == [0.0]
    assert entropy(torch.tensor([0.25, 0.75], dtype=F64)).item() == pytest.approx(
        -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    )


def test_top_k_is_in_descending_order_and_ties_go_to_the_lower_index():
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0], [-1.0, float("-inf"), -2.0, -1.0]])
    assert stable_topk(scores, 3).tolist() == [[1, 3, 2], [0, 1, 2], [0, 3, 2]]
    assert stable_topk(scores, 1).tolist() == [[1], [0], [0]]
    assert stable_topk(scores, 0).shape == (3, 0)
    assert stable_topk(torch.zeros(1, 70), 64).tolist() == [list(range(64))]


def test_top_k_without_ties_is_torchs_over_any_leading_dims():
    scores = normal(2, 3, 9)
    assert torch.equal(stable_topk(scores, 4), scores.topk(4).indices)
