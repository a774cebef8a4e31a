"""Soft routing: the weights, what is reported of them, and where experts' heads lie."""

import math

import pytest
import torch

from longctx.engines.router_stats import NonFiniteLogitsError, RouterStats
from longctx.moe.attention_experts import flatten_expert_heads, soft_routing
from longctx.moe.report import set_keys
from longctx.parallel.layout import Layout

LAYOUT = Layout((0, 3, 11))


def logits(dtype=torch.float64):
    return torch.randn(2, 11, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def test_weights_are_the_softmax_over_experts_and_the_report_is_of_shares():
    drawn = logits().requires_grad_()
    weights, report = soft_routing(drawn, LAYOUT)
    p = drawn.exp() / drawn.exp().sum(dim=-1, keepdim=True)
    torch.testing.assert_close(weights, p)
    assert weights.requires_grad
    torch.testing.assert_close(report.counts, p.detach().sum(dim=(0, 1)))
    torch.testing.assert_close(report.entropy, -(p * p.log()).sum().detach())
    assert (report.tokens, report.dropped, report.loss) == (22, 0, 0)
    assert torch.equal(report.choice, set_keys(5, torch.device("cpu"))[p.argmax(dim=-1)])
    assert not any(x.requires_grad for x in report)


def test_even_weights_are_an_even_load_and_weights_on_one_expert_are_that_many_times_the_mean():
    even, one = torch.zeros(1, 11, 4), torch.tensor([0.0, 100.0, 0.0, 0.0]).expand(1, 11, 4)
    routing = RouterStats()
    routing.add({"even": soft_routing(even, LAYOUT)[1], "one": soft_routing(one, LAYOUT)[1]})
    metrics = {name: routed.metrics for name, routed in routing.layers.items()}
    assert (metrics["even"].imbalance, metrics["one"].imbalance) == (pytest.approx(1.0), pytest.approx(4.0))
    assert (metrics["even"].entropy, metrics["one"].entropy) == (pytest.approx(math.log(4)), pytest.approx(0.0))
    assert metrics["even"].dropped == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_made_in_float32_and_shares_summed_in_float64(dtype):
    weights, report = soft_routing(logits(dtype), LAYOUT)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, logits(dtype).float().softmax(dim=-1))
    assert report.counts.dtype == torch.float64


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_ranks_reports_add_up_to_that_of_one_and_padding_is_not_in_them(order):
    drawn, whole = logits(), Layout((0, 3, 11), order, 4)
    _, want = soft_routing(drawn, LAYOUT)
    layouts = [Layout((0, 3, 11), order, 4, rank) for rank in range(4)]
    assert any(layout.padding for layout in layouts)
    # What stands in the rows of padding is of no meaning.
    reports = [soft_routing(layout.shard(drawn, fill=7), layout)[1] for layout in layouts]
    for name in ("counts", "tokens", "entropy"):
        torch.testing.assert_close(sum(getattr(report, name) for report in reports), getattr(want, name))
    assert torch.equal(whole.unshard([report.choice for report in reports]), want.choice)
    for layout, report in zip(layouts, reports, strict=True):
        assert all(not report.choice[:, gap].any() for gap in layout.padding)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_reported_with_their_layer(value):
    drawn = logits()
    drawn[1, 4, 2] = value
    routing = RouterStats()
    routing.add({"blocks.3.mixer": soft_routing(drawn, LAYOUT)[1]})
    with pytest.raises(
        NonFiniteLogitsError, match=r"^blocks\.3\.mixer: the router's logits are not all finite numbers"
    ):
        routing.check_finite()


def test_logits_of_another_length_than_the_layouts_are_refused():
    with pytest.raises(
        ValueError, match=r"soft routing: logits are \(2, 11, 5\), and the layout has 4 tokens on this rank"
    ):
        soft_routing(logits(), Layout((0, 4)))


def test_heads_that_read_one_key_value_head_lie_together():
    names = torch.arange(3 * 2 * 4).view(3, 2, 4)  # expert, key/value head, query head of it
    # One attention of 24 query heads over 6 or 2 key/value heads gives head h the key/value head h // 4 or h // 12.
    each, shared = flatten_expert_heads(names, 0, "each").tolist(), flatten_expert_heads(names, 0, "shared").tolist()
    for expert in range(3):
        for group in range(2):
            for head in names[expert, group].tolist():
                assert each.index(head) // 4 == expert * 2 + group
                assert shared.index(head) // 12 == group
    assert sorted(each) == sorted(shared) == list(range(24))
