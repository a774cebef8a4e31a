"""What every registered mixer has to fulfil."""

import importlib
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longctx.mixers import MIXERS
from longctx.parallel.layout import Layout
from tests.combinations import mostly_slow
from tests.mixers.cases import DIM, built, config_of, draw, run
from tests.parallel.cases import PACKINGS, layout_here

each_mixer = pytest.mark.parametrize("letter", MIXERS)


@each_mixer
@pytest.mark.parametrize(
    "bounds",
    mostly_slow(PACKINGS.values(), PACKINGS["ends inside slices"], PACKINGS["a token each"]),
    ids=PACKINGS.keys(),
)
def test_a_packed_document_is_as_it_would_be_alone(letter, bounds):
    mixer, (x, _) = built(letter), draw(bounds[-1])
    packed = run(mixer, x, Layout(bounds))
    alone = [run(mixer, x[:, begin:end], Layout((0, end - begin))) for begin, end in itertools.pairwise(bounds)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-11, atol=1e-12)


def outputs_around(letter, order, times):
    layout = layout_here((0, 17, 48), order)
    mixer, (x, _) = built(letter, torch.float32), draw(48, torch.float32)
    outs = [run(mixer, layout.shard(x), layout).detach()]
    for t in times:
        changed = x.clone()
        changed[:, t] = 50 * torch.randn(2, DIM, generator=torch.Generator().manual_seed(t))
        outs.append(run(mixer, layout.shard(changed), layout).detach())
    return outs


@each_mixer
@pytest.mark.parametrize("order", mostly_slow(["contiguous", "zigzag"], "zigzag"))
def test_changing_a_token_leaves_earlier_outputs_on_all_ranks_bitwise_unchanged(ranks, letter, order):
    times = (0, 11, 16, 30, 47)
    layout = Layout((0, 17, 48), order, 4)
    answers = ranks.run(outputs_around, letter, order, times, size=4)
    before, *after = (layout.unshard(parts) for parts in zip(*answers, strict=True))
    for t, changed in zip(times, after, strict=True):
        assert torch.equal(before[:, :t], changed[:, :t]), t
        assert not torch.equal(before[:, t], changed[:, t]), t
        # It reaches the last token of its document, and no other document.
        assert not torch.equal(before[:, 16 if t < 17 else 47], changed[:, 16 if t < 17 else 47]), t
        assert t >= 17 or torch.equal(before[:, 17:], changed[:, 17:]), t


def outputs_with(letter, order, times, value):
    layout = layout_here((0, 17, 48), order)
    mixer, (x, _) = built(letter, torch.float32), draw(48, torch.float32)
    outs = []
    for t in times:
        changed = x.clone()
        changed[1, t, 3] = value
        outs.append(run(mixer, layout.shard(changed), layout).detach())
    return outs


@each_mixer
@pytest.mark.parametrize("order", mostly_slow(["contiguous", "zigzag"], "zigzag"))
@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_a_token_that_is_not_finite_changes_neither_earlier_outputs_nor_other_documents(ranks, letter, order, value):
    times = (0, 16, 30)
    layout = Layout((0, 17, 48), order, 4)
    before, *_ = (
        layout.unshard(parts) for parts in zip(*ranks.run(outputs_around, letter, order, (), size=4), strict=True)
    )
    answers = ranks.run(outputs_with, letter, order, times, value, size=4)
    for t, changed in zip(times, (layout.unshard(parts) for parts in zip(*answers, strict=True)), strict=True):
        same = torch.ones(before.shape[:2], dtype=torch.bool)
        same[1, t : 17 if t < 17 else 48] = False
        assert torch.equal(before[same], changed[same]), t
        assert not torch.isfinite(changed[1, t]).all(), t


@each_mixer
def test_the_input_may_be_strided_and_is_not_changed(letter):
    mixer, (x, _) = built(letter), draw(20)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    kept = strided.clone()
    torch.testing.assert_close(run(mixer, strided, Layout((0, 20))), run(mixer, x, Layout((0, 20))))
    assert torch.equal(strided, kept)


@each_mixer
def test_bfloat16_stays_near_float64(letter):
    exact, (x, _) = built(letter), draw(48)
    low = built(letter, torch.bfloat16)
    got = run(low, x.bfloat16(), Layout((0, 9, 48)))
    want = run(exact, x.bfloat16().double(), Layout((0, 9, 48)))
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).norm() < 2e-2 * want.norm()


@each_mixer
def test_under_autocast_only_projections_are_rounded(letter):
    mixer, (x, dy) = built(letter, torch.float32), draw(48, torch.float32)
    want = run(built(letter), x.double(), Layout((0, 9, 48)))
    with torch.autocast("cpu", torch.bfloat16):
        got = run(mixer, x, Layout((0, 9, 48)))
    assert (got.double() - want).norm() < 3e-2 * want.norm()
    got.backward(dy.to(got.dtype))
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters())


@each_mixer
def test_a_second_derivative_is_refused(letter):
    mixer, (x, _) = built(letter), draw(20)
    y = run(mixer, x.requires_grad_(), Layout((0, 20)))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


# Decoding from a cache


def in_pieces(mixer, x, pieces):
    """The outputs for `x [B, T, D]` that comes in pieces, and the cache after them."""
    cache = mixer.new_cache()
    with torch.no_grad():
        parts = ((part, Layout((0, part.shape[1]), past_tokens=cache.tokens)) for part in x.split(pieces, dim=1))
        outs = [run(mixer, part, layout, cache) for part, layout in parts]
    return torch.cat(outs, dim=1), cache


PIECES = [(7, 1, 1, 5, 1, 13), (1, 1, 2, 9, 1, 14), (2, 26), (1,) * 28, (28,)]


@each_mixer
@pytest.mark.parametrize("pieces", PIECES, ids=str)
def test_a_document_in_pieces_is_as_it_would_be_whole(letter, pieces):
    mixer, (x, _) = built(letter), draw(28)
    want = run(mixer, x, Layout((0, 28))).detach()
    got, cache = in_pieces(mixer, x, pieces)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    assert cache.tokens == 28


@each_mixer
def test_in_pieces_bfloat16_stays_near_float64(letter):
    got, _ = in_pieces(built(letter, torch.bfloat16), draw(48, torch.bfloat16)[0], (9, 1, 1, 30, *[1] * 7))
    want = run(built(letter), draw(48, torch.bfloat16)[0].double(), Layout((0, 48)))
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).norm() < 2e-2 * want.norm()


@each_mixer
def test_in_pieces_under_autocast_only_projections_are_rounded(letter):
    (x, _), mixer = draw(48, torch.float32), built(letter, torch.float32)
    want = run(built(letter), x.double(), Layout((0, 48)))
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = in_pieces(mixer, x, (9, 1, 1, 30, *[1] * 7))
    assert (got.double() - want).norm() < 3e-2 * want.norm()


def work_of_a_token(mixer, tokens):
    """FLOPs, as torch counts them, of a token that comes after so many, and the bytes of the cache then."""
    _, cache = in_pieces(mixer, draw(tokens)[0], [*[5] * (tokens // 5)])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(mixer, draw(1)[0], Layout((0, 1), past_tokens=tokens), cache)
    return counter.get_total_flops(), cache.nbytes


@each_mixer
def test_neither_work_nor_memory_of_a_token_grows_with_those_before_where_mathematics_does_not_make_it(letter):
    config = config_of(letter)
    remembers_keys = "window" in type(config).model_fields
    if remembers_keys:
        config = config.model_copy(update={"window": 9})
    mixer = config.build(DIM, 1, 4, 1e-5).double()
    (early, small), (late, large) = work_of_a_token(mixer, 10), work_of_a_token(mixer, 200)
    assert 0 < early == late
    if remembers_keys:
        # Room for 8 keys and the 5 of a piece, and half as much again: B 2 x 2 heads of 4 + 4 channels, float64.
        assert large <= 1.5 * (8 + 5) * 2 * 2 * 8 * 8
    else:
        assert 0 < small == large


def test_the_kv_cache_holds_every_token_and_at_most_half_as_much_room_more():
    _, cache = in_pieces(built("S"), draw(90)[0], (60, *[1] * 30))
    of_a_token = 2 * 2 * (4 + 4) * 8  # B 2 x 2 key/value heads of 4 channels and 4, float64
    assert 90 * of_a_token <= cache.nbytes <= 1.5 * 90 * of_a_token


@each_mixer
def test_a_layout_that_does_not_continue_the_cache_is_refused_and_changes_nothing(letter):
    mixer, (x, _) = built(letter), draw(10)
    want, _ = in_pieces(mixer, x, (4, 6))
    got, cache = in_pieces(mixer, x[:, :4], (4,))
    with torch.no_grad():
        for layout, words in (
            (Layout((0, 6)), r"continues 0 tokens, but the cache holds 4; use Layout\(\(0, n\), past_tokens=4\)"),
            (Layout((0, 6), past_tokens=5), "continues 5 tokens"),
            (Layout((0, 2, 6), past_tokens=4), "2 documents on 1 ranks"),
            (Layout((0, 12), size=2, past_tokens=4), "1 documents on 2 ranks"),
        ):
            with pytest.raises(ValueError, match=words):
                run(mixer, x[:, 4:], layout, cache)
    with pytest.raises(ValueError, match=r"under torch\.no_grad"):
        run(mixer, x[:, 4:], Layout((0, 6), past_tokens=4), cache)
    with torch.no_grad():
        rest = run(mixer, x[:, 4:], Layout((0, 6), past_tokens=4), cache)
    assert torch.equal(torch.cat([got, rest], dim=1), want)


@each_mixer
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_the_ranks_work_adds_up_to_that_of_one(letter, order):
    mixer, bounds = built(letter), PACKINGS["ends inside slices"]
    shares = [mixer.flops(Layout(bounds, order, 4, rank)) for rank in range(4)]
    assert sum(shares) == mixer.flops(Layout(bounds))


@each_mixer
def test_shrunk_is_the_same_kind_of_mixer_and_fits_the_width_that_is_verified_with(letter):
    small = config_of(letter).shrunk()
    assert type(small) is MIXERS[letter[0]]
    assert small.problems(32) == []
    assert run(small.build(32, 0, 1, 1e-5), torch.zeros(1, 3, 32), Layout((0, 3))).shape == (1, 3, 32)


def test_letters_and_names_are_of_one_mixer_each():
    assert all(kind.letter == letter and len(letter) == 1 for letter, kind in MIXERS.items())
    assert len({kind.name for kind in MIXERS.values()}) == len(MIXERS)


@each_mixer
def test_every_mixer_is_compared_with_its_equations(letter):
    """In the test file of its module, where linear mixers have a table of them."""
    module = MIXERS[letter].__module__.rpartition(".")[2]
    tests = importlib.import_module(f"tests.mixers.test_{module}")
    assert letter in getattr(tests, "EQUATIONS", {}) or letter in ("L", "S", "A")
