"""Attention experts: each is a softmax layer, and what all of them together cost."""

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from longctx.layers.output import Output
from longctx.mixers import softmax
from longctx.mixers.attention_experts import AttentionExpertsConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.initialise import initialise
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh
from longctx.verify.equations.softmax import attention_experts
from tests.mixers.cases import DIM, causal_document_mask, draw
from tests.mixers.equations import check_config

both_kinds = pytest.mark.parametrize("kv", ["each", "shared"])


def config_of(kv, **changes):
    return AttentionExpertsConfig(**({"experts": 3, "heads": 4, "kv_heads": 2, "head_dim": 4, "kv": kv} | changes))


def built(kv, dtype=torch.float64, **changes):
    mixer = config_of(kv, **changes).build(DIM, 1, 4, 1e-5).to(dtype)
    initialise(mixer, seed=3)
    return mixer


def alone(mixer, number, kv, dim=DIM):
    """One of the 3 experts of 4 heads over 2 keys, as a softmax layer, taken from the matrices row by row."""
    layer = SoftmaxConfig(heads=4, kv_heads=2, head_dim=4, window=mixer.mask.window).build(dim, 1, 4, 1e-5).double()
    if kv == "each":
        # Query head h of expert n is number 4 n + h, its keys are 12 + 2 n and the next, its values 18 + 2 n.
        heads = [4 * number + h for h in range(4)]
        rest = [12 + 2 * number, 13 + 2 * number, 18 + 2 * number, 19 + 2 * number]
    else:
        # The first two heads of every expert read the first key head, the other two the second.
        heads = [6 * (h // 2) + 2 * number + h % 2 for h in range(4)]
        rest = [12, 13, 14, 15]
    with torch.no_grad():
        layer.qkv.weight.copy_(mixer.qkv.weight.unflatten(0, (-1, 4))[heads + rest].flatten(0, 1))
        layer.out.weight.copy_(mixer.out.weight.unflatten(1, (-1, 4))[:, heads].flatten(1))
    return layer


@torch.no_grad()
@both_kinds
@pytest.mark.parametrize("window", [None, 5])
def test_the_layer_is_the_sum_of_softmax_layers_by_the_routers_weights(kv, window):
    mixer, x, layout = built(kv, window=window), 3 * draw(40)[0], Layout((0, 1, 13, 40))
    weights = (x @ mixer.router.weight.T).softmax(dim=-1)
    want = sum(weights[..., [n]] * alone(mixer, n, kv)(x, layout) for n in range(3))
    given = mixer(x, layout)
    assert isinstance(given, Output)
    torch.testing.assert_close(given.out, want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(given.report.counts, weights.sum(dim=(0, 1)))


@both_kinds
@pytest.mark.parametrize("changes", [{}, {"heads": 2, "window": 5, "rope_theta": 30.0, "head_dim": None}], ids=str)
def test_layer_and_gradients_equal_the_equations(kv, changes):
    check_config(config_of(kv, **changes), attention_experts)


def on_rank(kv, changes, cells):
    size, answers = dist.get_world_size(), []
    mesh = Mesh.build("cpu", cp=size, ulysses=2)
    for bounds, order, schedule in cells:
        layout, mixer = Layout.on(mesh, bounds, order, attention=schedule), built(kv, **changes)
        x, dy = map(layout.shard, draw(bounds[-1]))
        out = mixer(x.requires_grad_(), layout).out
        out.backward(dy)
        answers.append((out.detach(), x.grad, {name: p.grad for name, p in mixer.named_parameters()}))
    return answers


@pytest.mark.parametrize(
    ("kv", "changes"),
    [("each", {}), ("each", {"kv_heads": 1, "window": 11}), ("shared", {"window": 11}), ("shared", {"kv_heads": 4})],
    ids=str,
)
def test_over_ranks_by_every_schedule_as_on_one(ranks, kv, changes):
    """Beside what tests/mixers/test_parity.py does: the other kinds of keys and values."""
    schedules = config_of(kv, **changes).available_schedules(4, 2)[1]
    assert len(schedules) == 5
    cells = [((0, 7, 33), "zigzag", schedule) for schedule in schedules] + [((0, 1, 20, 48), "contiguous", "ring")]
    answers = ranks.run(on_rank, kv, changes, cells, size=4)
    for number, (bounds, order, schedule) in enumerate(cells):
        mixer, (x, dy) = built(kv, **changes), draw(bounds[-1])
        want = mixer(x.requires_grad_(), Layout(bounds)).out
        want.backward(dy)
        outs, dxs, gradients = zip(*(answer[number] for answer in answers), strict=True)
        layout = Layout(bounds, order, 4)
        pairs = [(layout.unshard(outs), want.detach()), (layout.unshard(dxs), x.grad)]
        pairs += [(sum(g[name] for g in gradients), p.grad) for name, p in mixer.named_parameters()]
        for got, truth in pairs:
            assert (got - truth).norm() <= 1e-10 * truth.norm(), (bounds, order, schedule)


@both_kinds
def test_every_parameter_learns(kv):
    mixer, (x, dy) = built(kv), draw(20)
    mixer(x, Layout((0, 20))).out.backward(dy)
    for name, parameter in mixer.named_parameters():
        assert parameter.grad.norm() > 1e-3 * parameter.norm(), name


@both_kinds
def test_flops_are_those_of_every_product_that_is_needed(kv, monkeypatch):
    mixer, bounds = built(kv), (0, 3, 20)
    monkeypatch.setattr(softmax, "softmax_attention", lambda q, k, v, layout, scale, mask: q)
    with FlopCounterMode(display=False) as counter:
        mixer(draw(20, batch=1)[0], Layout(bounds))
    pairs = int(causal_document_mask(bounds).sum()) * 3 * 4 * 2 * (2 * 4)
    assert mixer.flops(Layout(bounds)) == counter.get_total_flops() + pairs


def test_shared_keys_are_cached_once_for_all_experts():
    cached = {}
    for kv in ("each", "shared"):
        mixer = built(kv)
        cache = mixer.new_cache()
        with torch.no_grad():
            mixer(draw(20)[0], Layout((0, 20)), cache)
        cached[kv] = cache.nbytes
    assert cached["each"] == 3 * cached["shared"] > 0


def test_each_expert_begins_at_the_scale_of_a_softmax_layer():
    config = AttentionExpertsConfig(experts=4, heads=5, head_dim=20)
    mixer, dense = config.build(100, 0, 5, 1e-5), SoftmaxConfig(heads=5, head_dim=20).build(100, 0, 5, 1e-5)
    for module in (mixer, dense):
        initialise(module, seed=0)
    for name in ("qkv", "out"):
        std = getattr(mixer, name).weight.std().item()
        assert std == pytest.approx(getattr(dense, name).weight.std().item(), rel=0.03)


def test_the_router_computes_in_float32_whatever_the_rest_does():
    mixer, x = built("each", torch.bfloat16), draw(20, torch.bfloat16)[0]
    assert torch.equal(mixer.router(x), x.float() @ mixer.router.weight.float().T)
    wide, y = built("each", torch.float32), draw(20, torch.float32)[0]
    want = wide.router(y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wide.router(y), want)
    assert wide.router.full_precision


def test_the_schedule_that_is_chosen_is_of_all_experts_heads():
    # 2 heads do not divide over 4 ranks, those of 2 experts do.
    config = AttentionExpertsConfig(experts=2, heads=2, head_dim=4)
    assert "ulysses" in config.available_schedules(4, 1)[1]
    assert "ulysses" not in config.expert.available_schedules(4, 1)[1]
    told = config.build(DIM, 0, 1, 1e-5).describe_schedule(Layout((0, 64), size=4, attention="auto"), torch.float32)
    assert "ulysses " in told.details


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"heads": 5}, "heads: 5 heads do not divide dim 12"),
        ({"heads": 6, "kv_heads": 4}, "kv_heads: 6 query heads are not a multiple of 4"),
        ({"heads": 4, "head_dim": 5}, "head_dim: 5 has to be even for rotary embedding"),
    ],
)
@both_kinds
def test_heads_that_do_not_fit_are_named_with_their_key(kv, arguments, words):
    (problem,) = AttentionExpertsConfig(experts=3, kv=kv, **arguments).problems(12)
    assert problem.startswith(words)


@both_kinds
def test_shrunk_has_few_experts_and_keeps_what_is_seen_and_shared(kv):
    config = AttentionExpertsConfig(experts=16, heads=32, kv_heads=8, rope_theta=5e5, window=4096, kv=kv)
    small = config.shrunk()
    assert (small.experts, small.heads, small.kv_heads, small.window) == (3, 8, 2, 16)
    assert (small.kv, small.rope_theta) == (kv, 5e5)
