"""Layers of experts whose router reads earlier tokens: by how like they are, or by the attention of the block."""

import itertools
import weakref

import pytest
import torch

from longctx.layers.cache import Cache
from longctx.model import moe
from longctx.model.initialise import initialise
from longctx.model.moe import SIMILARITY_DIM, MoeConfig
from longctx.moe.expert_router import choose_experts
from longctx.parallel.layout import Layout
from tests.model.cases import ROUTERS, VOCABULARY, best_two, decoder, recomputed, routed_by, tokens

LAYOUT = Layout((0, 4, 13))
SHARING = [name for name in ROUTERS if name != "token"]


def layer_of(dtype=torch.float64, **changes):
    layer = MoeConfig(**({"experts": 5, "active": 2, "hidden": 7} | changes)).build(6, 1, 4).to(dtype)
    initialise(layer, seed=3)
    return layer


def draw():
    return torch.randn(2, 13, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def same_document(bounds):
    mask = torch.zeros(bounds[-1], bounds[-1], dtype=torch.bool)
    for begin, end in itertools.pairwise(bounds):
        mask[begin:end, begin:end] = True
    return mask.tril()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_by_similarity_it_is_the_equation(score):
    layer, x = layer_of(router="similarity", similarity_dim=3, temperature=0.4, score=score), draw()
    with torch.no_grad():
        layer.similarity.weight.normal_(generator=torch.Generator().manual_seed(1))
    w_a, w_b = layer.similarity.weight[:3], layer.similarity.weight[3:]
    logits = x @ layer.router.weight.T
    r = logits.softmax(dim=-1) if score == "softmax" else logits.sigmoid()
    s = torch.einsum("bid,de,bje->bij", x, w_a.T @ w_b, x) / (0.4 * 3**0.5)
    p = s.masked_fill(~same_document(LAYOUT.cu_seqlens), -torch.inf).softmax(dim=-1) @ r
    got, want = layer(x, LAYOUT), best_two(layer, x, p)
    torch.testing.assert_close(got.out, want, rtol=1e-11, atol=1e-12)
    report = choose_experts(logits, p, layer.rule, LAYOUT).report
    torch.testing.assert_close(got.report.loss, report.loss)
    torch.testing.assert_close(got.report.entropy, report.entropy)
    assert torch.equal(got.report.choice, report.choice)
    parameters = [layer.similarity.weight, layer.router.weight]
    do = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for ours, ref in zip(*(torch.autograd.grad(out, parameters, do) for out in (got.out, want)), strict=True):
        torch.testing.assert_close(ours, ref, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_by_attention_it_is_what_the_mixers_attention_makes_of_the_scores():
    layer, x = layer_of(router="attention"), draw()
    a = torch.rand(2, 13, 13, generator=torch.Generator().manual_seed(1), dtype=torch.float64).tril()
    a = a / a.sum(dim=-1, keepdim=True)
    p = a @ (x @ layer.router.weight.T).softmax(dim=-1)
    got = layer(x, LAYOUT, lambda r, cache: a @ r)
    torch.testing.assert_close(got.out, best_two(layer, x, p), rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match="experts of layer 1: the router 'attention' needs the argument"):
        layer(x, LAYOUT)


def test_a_block_hands_its_attention_to_a_router_that_asks_alone():
    for router, want in (("token", 0), ("similarity", 0), ("attention", 4)):
        channels = [block.mixer.attention_channels for block in decoder(routed_by(router)).blocks]
        assert channels == [0, want, 0, want]


@torch.no_grad()
def test_a_token_begins_most_like_itself():
    layer = MoeConfig(experts=5, active=2, hidden=7, router="similarity").build(256, 0, 4)
    initialise(layer, seed=3)
    assert layer.similarity.weight.shape == (2 * SIMILARITY_DIM, 256)
    w_a, w_b = layer.similarity.weight.chunk(2)
    assert torch.equal(w_a, w_b)
    assert w_a.std().item() == pytest.approx(256**-0.5, rel=0.03)
    x = torch.randn(1, 100, 256, generator=torch.Generator().manual_seed(0))
    own = layer(x, Layout((0, 100))).report.entropy / 100
    alone = MoeConfig(experts=5, active=2, hidden=7).build(256, 0, 4)
    alone.load_state_dict(layer.state_dict(), strict=False)
    assert abs(own - alone(x, Layout((0, 100))).report.entropy / 100) < 0.1


@pytest.mark.parametrize("router", SHARING)
def test_a_later_token_and_another_document_change_no_score(router, monkeypatch):
    """To the bit, of the first layer of experts: what these make of a token also depends, in its last bits, on how many
    others came to them."""
    model, scores = decoder(routed_by(router), torch.float32), []

    def noted(logits, p, *args, **options):
        scores.append(p.detach())
        return choose_experts(logits, p, *args, **options)

    monkeypatch.setattr(moe, "choose_experts", noted)
    x = tokens(13)
    before, first = model(x, LAYOUT), scores[0]
    for t in (0, 3, 5, 12):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCABULARY
        scores.clear()
        after, end = model(changed, LAYOUT), 4 if t < 4 else 13
        for kept in (slice(0, t), slice(end, 13)):
            assert torch.equal(scores[0][:, kept], first[:, kept])
            torch.testing.assert_close(after[:, kept], before[:, kept], rtol=1e-5, atol=1e-5)
        assert not torch.equal(scores[0][:, t:end], first[:, t:end])


@pytest.mark.parametrize("router", SHARING)
def test_scores_of_earlier_tokens_reach_the_choice_and_the_gradient(router):
    """Of the last token's experts: the scores of the first, and with them all that its router reads them by."""
    model, x = decoder(routed_by(router)), tokens(13)
    losses = model(x, Layout((0, 13)), tokens(13, seed=1))
    (losses.reports["blocks.1.ffn"].loss + losses.total).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 0, name


@pytest.mark.parametrize("router", SHARING)
def test_recomputed_blocks_route_and_report_the_same(router):
    answers = recomputed(routed_by(router), LAYOUT)
    for a, b in zip(*answers, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recompute", [False, True])
def test_after_a_step_nothing_holds_the_attention_that_was_lent(recompute):
    model, seen = decoder(routed_by("attention")), []
    for block in model.blocks:
        block.recompute = recompute

    def note(module, args, output):
        if output.attend is not None:
            seen.extend(map(weakref.ref, (output.attend, *output.attend.args[:2])))

    for block in model.blocks[1::2]:
        block.mixer.register_forward_hook(note)
    losses = model(tokens(13), LAYOUT, tokens(13, seed=1))
    losses.total.backward()
    del losses
    assert len(seen) == 2 * 3 * (1 + recompute)
    assert all(reference() is None for reference in seen), "without the help of the collector of cycles"


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("router", SHARING)
@pytest.mark.parametrize("pieces", [(1,) * 20, (7, 1, 1, 5, 1, 5), (19, 1)], ids=str)
def test_a_document_in_pieces_is_routed_as_the_whole(router, window, pieces):
    config = routed_by(router)
    config = config.model_copy(update={"softmax": config.softmax.model_copy(update={"window": window})})
    model, x = decoder(config).eval(), tokens(20, batch=2)
    with torch.no_grad():
        whole = model(x, Layout((0, 20)))
        cache, end = model.new_cache(), 0
        for piece in x.split(pieces, dim=1):
            end += piece.shape[1]
            got = model.next_logits(piece, cache)
            torch.testing.assert_close(got, whole[:, end - 1], rtol=1e-10, atol=1e-11)
    held = [len(each.router_kv) for each in cache]
    most = 20 if window is None or router == "similarity" else window - 1
    assert held == [0, most, 0, most]
    kept = [*cache[1].kv.buffers, *cache[1].router_kv.buffers]
    assert len(kept) == 2 + (2 if router == "similarity" else 1)
    assert cache[1].nbytes == sum(buffer.untyped_storage().nbytes() for buffer in kept)


def test_scores_are_cached_once_and_not_for_each_head():
    cache, model = Cache(), decoder(routed_by("attention"))
    block, layout = model.blocks[1].eval(), Layout((0, 13))
    with torch.no_grad():
        block(torch.randn(2, 13, 12, dtype=torch.float64), layout, cache)
    assert [tuple(buffer.shape) for buffer in cache.router_kv.buffers] == [(2, 1, 19, 4)]


def test_flops_of_the_graph_are_a_score_and_a_sum_for_each_pair_that_is_seen():
    plain, shared = layer_of(), layer_of(router="similarity", similarity_dim=3)
    pairs = (4 * 5 + 9 * 10) // 2
    assert plain.flops(LAYOUT) == 13 * plain.flops_per_token
    assert shared.flops(LAYOUT) == plain.flops(LAYOUT) + 13 * 2 * 6 * 6 + pairs * 2 * (3 + 5)
    parts = [shared.flops(Layout((0, 4, 12), "zigzag", 2, rank)) for rank in range(2)]
    assert sum(parts) == shared.flops(Layout((0, 4, 12)))


def test_the_schedule_of_a_similarity_router_is_said_where_it_is_chosen():
    layer, attention = layer_of(router="similarity"), layer_of(router="attention")
    said = layer.describe_schedule(Layout((0, 4096), "zigzag", 4), torch.bfloat16).details
    assert said.startswith(("ring ", "all-gather "))
    assert "ulysses" not in said
    assert layer.describe_schedule(Layout((0, 4096), "zigzag", 4, attention="ring"), torch.bfloat16) is None
    assert layer.describe_schedule(Layout((0, 4096)), torch.bfloat16) is None
    assert attention.describe_schedule(Layout((0, 4096), "zigzag", 4), torch.bfloat16) is None


def test_scores_that_are_no_numbers_are_reported_where_logits_are():
    layer = layer_of(router="similarity")
    assert layer(draw(), LAYOUT).report.finite
    with torch.no_grad():
        layer.similarity.weight[0, 0] = torch.nan
    assert not layer(draw(), LAYOUT).report.finite
