"""Halos, and the short convolution over ranks, against one rank that holds the whole sequence."""

import pytest
import torch

from longctx.kernels import reference
from longctx.parallel.layout import Layout
from longctx.parallel.linear.convolution import short_convolution
from longctx.parallel.linear.halo import left_halo
from longctx.parallel.traffic import count_traffic
from tests.combinations import few, mostly_slow_rows, pairs, pairs_or_everything
from tests.parallel.cases import ORDERS, PACKINGS, UNEVEN, layout_here

SHORT = {"slices of one token": (0, 2, 5, 8), "slices of two tokens": (0, 16), "one of two": (0, 7, 8, 9, 16)}
"""Packed sequences whose slices, over 4 ranks, are shorter than a window of 3 tokens."""
BOUNDS = [*PACKINGS.values(), *SHORT.values(), *UNEVEN.values()]
BATCH, CHANNELS = 2, 3
MOST_PIECES = 64


def draw(length, width):
    """x, what precedes it, weight, bias, and a gradient of y and of all halos, float64."""
    generator = torch.Generator().manual_seed(length + width)
    shapes = [(BATCH, length, CHANNELS), (BATCH, width, CHANNELS), (CHANNELS, width + 1), (CHANNELS,)]
    shapes += [(BATCH, length, CHANNELS), (MOST_PIECES, BATCH, width, CHANNELS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def halos_on_rank(cases):
    answers = []
    for bounds, order, continued, width in cases:
        layout = layout_here(bounds, order, 4 if continued else 0)
        x, initial, _, _, _, dhalos = draw(bounds[-1], width)
        x, initial = layout.shard(x).requires_grad_(), initial.requires_grad_()
        with count_traffic() as traffic:
            halo = left_halo(x, layout, width, initial=initial if continued else None)
            halo.backward(dhalos[list(layout.pieces_of(layout.rank))])
        answers.append((halo.detach(), x.grad, initial.grad, dict(traffic.calls), dict(traffic.bytes)))
    return answers


def whole_halos(layout, continued, width):
    """The halo of every slice in sequence order, and the gradients of x and of what precedes it, by autograd."""
    x, initial, _, _, _, dhalos = draw(layout.length, width)
    x, initial = x.requires_grad_(), initial.requires_grad_()
    step = layout.piece_length
    padding = x.new_zeros(BATCH, step * layout.pieces - layout.length, CHANNELS)
    line = torch.cat([initial if continued else torch.zeros_like(initial), x, padding], dim=1)
    halos = torch.stack([line[:, n * step : n * step + width] for n in range(layout.pieces)])
    halos.backward(dhalos[: layout.pieces])
    return halos.detach(), x.grad, initial.grad


@pytest.mark.parametrize("size", [1, 2, 4])
@pairs_or_everything
def test_each_slice_gets_the_tokens_before_it_and_their_gradients_go_back(ranks, size, combinations):
    if combinations is pairs and size < 4:
        combinations = few
    cases = combinations(BOUNDS, ORDERS, [False, True], [0, 1, 3, 7])
    answers = ranks.run(halos_on_rank, cases, size=size)
    for number, (bounds, order, continued, width) in enumerate(cases):
        layout = Layout(bounds, order, size)
        want, dx, dinitial = whole_halos(layout, continued, width)
        halos, dxs, dinitials, calls, received = zip(*(answer[number] for answer in answers), strict=True)
        for rank, halo in enumerate(halos):
            assert torch.equal(halo, want[list(layout.pieces_of(rank))]), (bounds, order, width)
        torch.testing.assert_close(layout.unshard(dxs), dx, rtol=1e-12, atol=1e-12)
        for each in dinitials if continued else ():
            torch.testing.assert_close(each, dinitial, rtol=1e-12, atol=1e-12)
        nothing = size == 1 or width == 0
        assert all(made == ({} if nothing else {"all_gather": 2}) for made in calls)
        own = layout.pieces // size
        sent = min(width, layout.piece_length) + width
        want_bytes = (size - 1) * own * BATCH * sent * CHANNELS * 8
        assert all(count == ({} if nothing else {"all_gather": want_bytes}) for count in received)


def convolved_on_rank(cases, taps, dtype):
    answers = []
    for bounds, order, continued in cases:
        layout = layout_here(bounds, order, 4 if continued else 0)
        x, initial, weight, bias, dy, _ = (t.to(dtype) for t in draw(bounds[-1], taps - 1))
        leaves = [leaf.requires_grad_() for leaf in (layout.shard(x), weight, bias, initial)]
        with count_traffic() as traffic:
            y = short_convolution(*leaves[:3], layout, "silu", initial=initial if continued else None)
            y.backward(layout.shard(dy))
        answers.append((y.detach(), [leaf.grad for leaf in leaves], dict(traffic.calls)))
    return answers


def convolved_whole(bounds, continued, taps):
    x, initial, weight, bias, dy, _ = draw(bounds[-1], taps - 1)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias, initial)]
    starts = bounds[1:-1] if continued else bounds[:-1]
    y = reference.short_convolution(*leaves[:3], "silu", starts, initial if continued else None)
    y.backward(dy)
    return y.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(
    ("size", "dtype", "bound", "taps"),
    mostly_slow_rows(
        [
            (*row, taps)
            for row in ((1, torch.float64, 1e-12), (2, torch.float32, 1e-5), (4, torch.float64, 1e-12))
            for taps in (1, 2, 4, 8)
        ],
        lambda size, dtype, bound, taps: (size, taps) in [(1, 4), (2, 4), (4, 1), (4, 4), (4, 8)],
    ),
)
@pairs_or_everything
def test_every_layout_equals_the_reference_on_one_rank(ranks, size, dtype, bound, taps, combinations):
    if combinations is pairs and (size, taps) != (4, 4):
        combinations = few
    cases = combinations(BOUNDS, ORDERS, [False, True])
    answers = ranks.run(convolved_on_rank, cases, taps, dtype, size=size)
    for number, (bounds, order, continued) in enumerate(cases):
        layout = Layout(bounds, order, size)
        want, grads = convolved_whole(bounds, continued, taps)
        ys, parts, calls = zip(*(answer[number] for answer in answers), strict=True)
        dxs, dweights, dbiases, dinitials = zip(*parts, strict=True)
        compared = [("y", layout.unshard(ys), want), ("dx", layout.unshard(dxs), grads[0])]
        compared += [("dweight", sum(dweights), grads[1]), ("dbias", sum(dbiases), grads[2])]
        if continued and taps > 1:
            compared += [("dinitial", each, grads[3]) for each in dinitials]
        for name, x, ref in compared:
            floor = bound * 1e-6
            assert (x - ref).norm() <= bound * ref.norm() + floor, f"{name} {bounds} {order} continued={continued}"
        assert all(made == ({"all_gather": 2} if size > 1 < taps else {}) for made in calls), bounds


def received_bytes(length, dtype):
    layout = layout_here((0, length), "zigzag")
    x, _, weight, bias, dy, _ = draw(length, 3)
    x = layout.shard(x).to(dtype).requires_grad_()
    with count_traffic() as traffic:
        short_convolution(x, weight, bias, layout).backward(layout.shard(dy).to(dtype))
    return traffic.bytes["all_gather"]


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 8), (torch.bfloat16, 2)])
def test_bytes_follow_the_formula_and_do_not_grow_with_the_sequence(ranks, dtype, size):
    # 2 passes x 3 other ranks x 2 slices x batch 2 x 3 tokens x 3 channels
    want = 2 * 3 * 2 * 2 * 3 * 3 * size
    assert ranks.run(received_bytes, 32, dtype, size=4) == [want] * 4
    assert ranks.run(received_bytes, 1024, dtype, size=4) == [want] * 4


def outputs_around(order, times):
    layout = layout_here((0, 17, 48), order)
    outs = []
    for t in (None, *times):
        x, _, weight, bias, _, _ = (y.float() for y in draw(48, 3))
        if t is not None:
            x[:, t] = 100.0
        outs.append(short_convolution(layout.shard(x), weight, bias, layout, "silu"))
    return outs


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_changing_a_token_leaves_what_does_not_see_it_bitwise_unchanged_on_all_ranks(ranks, order):
    times = (0, 5, 16, 30, 47)
    layout = Layout((0, 17, 48), order, 4)
    answers = ranks.run(outputs_around, order, times, size=4)
    before, *after = (layout.unshard(parts) for parts in zip(*answers, strict=True))
    for t, changed in zip(times, after, strict=True):
        seen = min(t + 4, 17 if t < 17 else 48)
        assert torch.equal(before[:, :t], changed[:, :t])
        assert not torch.equal(before[:, t:seen], changed[:, t:seen])
        assert torch.equal(before[:, seen:], changed[:, seen:])


def bfloat16_sum():
    # Slices of one token: the first is read by all others. 1 + 2^-8 is 1 in bfloat16.
    layout = layout_here((0, 4), "contiguous")
    x = torch.zeros(1, 1, 1, dtype=torch.bfloat16).requires_grad_()
    dhalo = torch.zeros(1, 1, 3, 1, dtype=torch.bfloat16)
    if layout.rank:
        dhalo[0, 0, 3 - layout.rank] = 1 if layout.rank == 1 else 2.0**-8
    left_halo(x, layout, 3).backward(dhalo)
    return x.grad


def test_gradients_from_several_ranks_are_summed_before_the_cast(ranks):
    first, *others = ranks.run(bfloat16_sum, size=4)
    assert first.item() == 1 + 2.0**-7
    assert [x.item() for x in others] == [0, 0, 0]


def test_wrong_arguments_are_refused():
    x, initial, weight, bias, _, _ = draw(8, 3)
    with pytest.raises(ValueError, match=r"x has shape \[8, 3\]: expected \[batch, tokens, channels\]"):
        left_halo(x[0], Layout((0, 8)), 3)
    with pytest.raises(ValueError, match="x has 8 tokens: expected 4, this rank's share of the layout"):
        left_halo(x, Layout((0, 8), size=2), 3)
    with pytest.raises(ValueError, match="width is -1: expected a number of tokens"):
        left_halo(x, Layout((0, 8)), -1)
    with pytest.raises(ValueError, match="has past_tokens = 0"):
        left_halo(x, Layout((0, 8)), 3, initial=initial)
    with pytest.raises(ValueError, match=r"initial has shape \[2, 2, 3\]: expected .* = \[2, 3, 3\]"):
        left_halo(x, Layout((0, 8), past_tokens=1), 3, initial=initial[:, 1:])
    with pytest.raises(ValueError, match=r"initial is torch.float32 on cpu: expected torch.float64 on cpu"):
        left_halo(x, Layout((0, 8), past_tokens=1), 3, initial=initial.float())
    with pytest.raises(ValueError, match="this layout is over 2 ranks and has no process group"):
        left_halo(x[:, :4], Layout((0, 8), size=2), 3)
    with pytest.raises(ValueError, match="x has 8 tokens: expected 4, this rank's share of the layout"):
        short_convolution(x, weight, bias, Layout((0, 8), size=2))
    with pytest.raises(ValueError, match=r"weight has shape \[2, 4\]: expected \[channels, taps\] = \[3, 4\]"):
        short_convolution(x, weight[:2], bias, Layout((0, 8)))
    with pytest.raises(ValueError, match=r"initial has shape \[2, 2, 3\]: expected .* = \[2, 3, 3\]"):
        short_convolution(x, weight, bias, Layout((0, 8), past_tokens=1), initial=initial[:, 1:])
