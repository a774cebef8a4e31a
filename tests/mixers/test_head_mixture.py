"""A mixture of heads in every mixer: what a token does not read is zero and costs nothing; all else is as it was."""

import importlib
from contextlib import ExitStack
from fractions import Fraction
from unittest.mock import patch

import pytest
import torch

from longctx.kernels.dtypes import accumulation_dtype
from longctx.layers.cache import CachedScan
from longctx.layers.output import Output
from longctx.mixers import MIXERS
from longctx.mixers.head_mixture import HeadMixtureConfig
from longctx.model.initialise import initialise
from longctx.parallel.layout import Layout
from tests.mixers.cases import DIM, built, config_of, draw
from tests.parallel.cases import ORDERS, PACKINGS, UNEVEN, layout_here

ROUTED = [letter for letter in MIXERS if config_of(letter).routable() is not None]
each_mixer = pytest.mark.parametrize("letter", ROUTED)


def mix_of(letter, router="learned"):
    heads, group = config_of(letter).routable()
    shared = group if heads > 2 * group else 0
    return HeadMixtureConfig(
        mixers=(MIXERS[letter[0]].name,), shared=shared, active=(heads - shared) // 2, router=router
    )


def routed(letter, dtype=torch.float64, router="learned"):
    mixer, (heads, _) = built(letter, dtype), config_of(letter).routable()
    mixer.add_head_router(mix_of(letter, router), DIM, heads)
    mixer.to(dtype)
    initialise(mixer, seed=3)
    return mixer


def masked(mixer, letter, x, layout):
    """All heads computed, what is not read set to zero, times the weights: the same parameters."""
    module = importlib.import_module(type(mixer).__module__)
    if letter[0] == "S" and mixer.head_router.by_norm:
        q = mixer.qkv(x)[..., : mixer.heads * mixer.head_dim].unflatten(-1, (mixer.heads, -1))
        routing = mixer.head_router(q, layout)
    else:
        routing = mixer.head_router(x, layout)
    shared = mixer.head_router.shared
    there = torch.cat([routing.chosen.new_ones(*x.shape[:2], shared), routing.chosen], dim=-1)[..., None]
    router, mixer.head_router = mixer.head_router, None
    weights, heads = routing.weights[..., None], there.shape[2]
    owner, name = (module, "softmax_attention") if letter[0] == "S" else (CachedScan, "finish")
    right = getattr(owner, name)
    out = type(mixer.out).forward

    def times_weights(self, y):
        return out(self, (y.unflatten(-1, (heads, -1)) * weights).flatten(2)) if self is mixer.out else out(self, y)

    with ExitStack() as stack:
        stack.enter_context(patch.object(owner, name, lambda *args, **kwargs: right(*args, **kwargs) * there))
        stack.enter_context(patch.object(type(mixer.out), "forward", times_weights))
        if letter[0] == "M":
            skip = type(mixer.skip).forward
            stack.enter_context(patch.object(type(mixer.skip), "forward", lambda self, v: skip(self, v) * there))
        result = mixer(x, layout)
    mixer.head_router = router
    return result, routing.report


def gradients(out, report, mixer, x, dy):
    for parameter in mixer.parameters():
        parameter.grad = None
    x.grad = None
    ((out * dy).sum() + 100 * report.loss).backward()
    return {name: p.grad.clone() for name, p in mixer.named_parameters()} | {"x": x.grad.clone()}


@pytest.mark.parametrize("bounds", [(0, 48), (0, 5, 17, 18, 31, 48)], ids=["one document", "packed"])
@pytest.mark.parametrize(("letter", "router"), [*((c, "learned") for c in ROUTED), ("S", "norm")])
def test_it_equals_all_heads_masked(letter, router, bounds):
    mixer, (x, dy) = routed(letter, router=router), draw(48)
    x.requires_grad_()
    layout = Layout(bounds)
    want, report = masked(mixer, letter, x, layout)
    want_grads = gradients(want, report, mixer, x, dy)
    got = mixer(x, layout)
    assert torch.equal(got.report.choice, report.choice)
    assert (got.out - want).norm() <= 1e-11 * want.norm()
    for name, grad in gradients(got.out, got.report, mixer, x, dy).items():
        assert (grad - want_grads[name]).norm() <= 1e-10 * max(want_grads[name].norm(), 1), name


def on_rank(letter, cases):
    mixer, answers = routed(letter), []
    for bounds, order in cases:
        layout = layout_here(bounds, order)
        x, dy = (layout.shard(t).clone() for t in draw(bounds[-1]))
        x.requires_grad_()
        out, report, _ = mixer(x, layout)
        grads = gradients(out, report, mixer, x, dy)
        answers.append((out.detach(), report.loss.detach(), report.counts, report.entropy, grads))
    return answers


@pytest.mark.parametrize(
    ("letter", "size"),
    [
        *((letter, 2) for letter in ROUTED),
        *(pytest.param(c, 4, marks=[] if c in "LSE" else pytest.mark.slow) for c in ROUTED),
    ],
)
def test_ranks_change_nothing(ranks, letter, size):
    every = [(bounds, order) for bounds in (*PACKINGS.values(), *UNEVEN.values()) for order in ORDERS]
    cases = every[size + ord(letter) % 5 :: 9]
    mixer, answers = routed(letter), ranks.run(on_rank, letter, cases, size=size)
    for number, (bounds, order) in enumerate(cases):
        layout, (x, dy) = Layout(bounds, order, size), draw(bounds[-1])
        x.requires_grad_()
        out, report, _ = mixer(x, Layout(bounds))
        want = gradients(out, report, mixer, x, dy)
        parts, losses, counts, entropies, grads = zip(*(answer[number] for answer in answers), strict=True)
        assert (layout.unshard(parts) - out).norm() <= 1e-10 * out.norm(), f"{bounds} {order}"
        torch.testing.assert_close(sum(losses), report.loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(sum(entropies), report.entropy, rtol=1e-12, atol=0)
        assert torch.equal(sum(counts), report.counts)
        got = {name: sum(g[name] for g in grads) for name in want if name != "x"}
        got["x"] = layout.unshard([g["x"] for g in grads])
        for name, grad in want.items():
            assert (got[name] - grad).norm() <= 1e-10 * max(grad.norm(), 1), f"{name}: {bounds} {order}"


@each_mixer
def test_a_later_token_changes_no_earlier_output(letter):
    mixer, (x, _) = routed(letter, torch.float32), draw(48, torch.float32)
    before = mixer(x, Layout((0, 17, 48))).out
    for t in (0, 16, 30, 47):
        changed = x.clone()
        changed[:, t] = 50 * torch.randn(2, DIM, generator=torch.Generator().manual_seed(t))
        after = mixer(changed, Layout((0, 17, 48))).out
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t], after[:, t])


@torch.no_grad()
@each_mixer
def test_a_document_in_pieces_is_as_it_would_be_whole(letter):
    mixer, (x, _) = routed(letter), draw(20)
    whole, cache, got = mixer(x, Layout((0, 20))).out, mixer.new_cache(), []
    for piece in x.split([7, 1, 1, 5, 1, 5], dim=1):
        layout = Layout((0, piece.shape[1]), past_tokens=cache.tokens)
        got.append(mixer(piece, layout, cache).out)
    torch.testing.assert_close(torch.cat(got, dim=1), whole, rtol=1e-10, atol=1e-11)


@each_mixer
def test_every_heads_state_contains_tokens_that_no_query_of_it_reads(letter):
    """Reading is per token, writing is not: a head that was not read before knows all earlier tokens when it is."""
    mixer, (x, _) = routed(letter), draw(20)
    chosen = mixer.head_router(x, Layout((0, 20))).chosen[0]
    # A token whose routed heads are all others than those of some later one.
    early, late = next(
        (s, t) for t in range(20) for s in range(t) if chosen[t].any() and not (chosen[s] & chosen[t]).any()
    )
    changed = x.clone()
    changed[0, early] *= 1.5  # the same router's choice, other keys and values
    mixer.out.weight.data[:, : mixer.head_router.shared * mixer.out.in_features // mixer.heads] = 0
    before, after = (mixer(each, Layout((0, 20))) for each in (x, changed))
    assert torch.equal(before.report.choice, after.report.choice)
    assert not torch.equal(before.out[0, late], after.out[0, late])


@each_mixer
def test_half_precision_and_autocast(letter):
    exact, (x, dy) = routed(letter), draw(48)
    low = routed(letter, torch.bfloat16)
    out = low(x.bfloat16(), Layout((0, 9, 48))).out
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    mixer = routed(letter, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = mixer(x.float(), Layout((0, 9, 48)))
    want = exact(x, Layout((0, 9, 48)))
    assert torch.equal(got.report.choice, want.report.choice), "the router computes in float32"
    assert (got.out.double() - want.out).norm() < 3e-2 * want.out.norm()
    got.out.backward(dy.to(got.out.dtype))
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters())


@each_mixer
def test_heads_that_are_not_read_are_not_counted(letter):
    plain, mixed, layout = built(letter), routed(letter), Layout((0, 48))
    saved = plain.flops(layout) + 48 * mixed.head_router.flops_per_token - mixed.flops(layout)
    # At least their share of the output projection.
    assert saved >= 48 * mixed.head_router.inactive_heads * 2 * DIM * plain.out.in_features // mixed.heads
    shares = [mixed.flops(Layout(PACKINGS["ends inside slices"], "zigzag", 4, rank)) for rank in range(4)]
    assert sum(shares) == mixed.flops(Layout(PACKINGS["ends inside slices"]))


def test_in_a_softmax_layer_all_that_is_of_a_query_head_is_saved():
    plain, layout = built("S"), Layout((0, 48))
    learned, by_norm = routed("S"), routed("S", router="norm")
    keys = 48 * 2 * DIM * 2 * plain.kv_heads * plain.head_dim
    of_heads = plain.flops(layout) - keys
    read = Fraction(plain.heads - learned.head_router.inactive_heads, plain.heads)
    assert learned.flops(layout) - 48 * learned.head_router.flops_per_token == keys + read * of_heads
    queries = 48 * 2 * DIM * by_norm.head_router.inactive_heads * plain.head_dim
    assert by_norm.flops(layout) == keys + read * of_heads + queries


def test_with_all_heads_read_and_a_router_of_zeros_the_layer_is_the_dense_one():
    for letter in ROUTED:
        plain, (x, _), (heads, _) = built(letter), draw(20), config_of(letter).routable()
        want = plain(x, Layout((0, 20)))
        plain.add_head_router(HeadMixtureConfig(mixers=("any",), active=heads), DIM, heads)
        plain.head_router.weight = torch.nn.Parameter(torch.zeros(heads, DIM, dtype=torch.float64))
        torch.testing.assert_close(plain(x, Layout((0, 20))).out, want, rtol=1e-11, atol=1e-12)


def test_an_output_of_a_layer_that_does_not_route_is_its_output_alone():
    mixer, (x, _) = built("L"), draw(20)
    out = mixer(x, Layout((0, 20)))
    assert isinstance(out, torch.Tensor)
    assert Output.of(out) == Output(out)
    assert accumulation_dtype(out.dtype) == out.dtype


def test_what_is_reported_of_schedules_is_of_shared_and_of_routed_heads():
    def told(shared, router=True):
        mixer = built("S")
        if router:
            mixer.add_head_router(HeadMixtureConfig(mixers=("softmax",), shared=shared, active=1), DIM, 6)
        return mixer.describe_schedule(Layout((0, 4096), "zigzag", 2), torch.float32)

    brief = told(3).brief.split("; ")
    assert [part.split(": ")[0] for part in brief] == ["shared heads", "routed heads"]
    assert all(part.endswith(" ms estimated") for part in brief)

    shared, rest = told(3).details.split("; routed heads: ")
    assert shared.startswith("shared heads: ")
    # Six query heads divide over two ranks; three of them, and one of keys and values, do not.
    assert "ulysses" in told(0, router=False).details
    assert "ulysses" not in shared + rest
    assert told(0).details.startswith("routed heads: ")
    assert "ulysses" in told(0).details
