"""Short convolution over ranks, against the equation token by token on one."""

import pytest
import torch

from longctx.kernels import reference
from longctx.parallel.layout import Layout
from longctx.parallel.linear.convolution import short_convolution
from longctx.parallel.traffic import count_traffic
from tests.parallel.cases import layout_here

BATCH, CHANNELS = 2, 3
CASES = [
    # In zigzag order over 4 ranks pieces have 2 tokens, fewer than the 3 that a slice needs; documents of one token.
    ((0, 1, 5, 6, 7, 16), "zigzag", 4, None, 0),
    # Documents begin in the 3 tokens before a slice, and the first one continues.
    ((0, 22, 31, 48), "contiguous", 4, "silu", 5),
    ((0, 7, 33), "zigzag", 3, "silu", 5),
    ((0, 3), "balanced", 2, None, 0),
    ((0, 9, 20), "balanced", 1, "silu", 0),
]


def draw(length, width):
    """x, the tokens before the sequence, weight, bias and dy."""
    generator = torch.Generator().manual_seed(length + width)
    shapes = [(BATCH, length, CHANNELS), (BATCH, width - 1, CHANNELS), (CHANNELS, width), (CHANNELS,)]
    shapes.append((BATCH, length, CHANNELS))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def convolve():
    answers = []
    for bounds, order, width, activation, past in CASES:
        layout = layout_here(bounds, order, past)
        x, *others, dy = draw(bounds[-1], width)
        x, initial, weight, bias = (leaf.requires_grad_() for leaf in (layout.shard(x), *others))
        for gap in layout.padding:
            x.data[:, gap] = float("nan")
        with count_traffic() as traffic:
            y = short_convolution(x, weight, bias, layout, activation, initial=initial if past else None)
            forward = traffic.received
            y.backward(layout.shard(dy))
        grads = [leaf.grad for leaf in (weight, bias, initial)]
        answers.append((y.detach(), x.grad, grads, dict(traffic.calls), forward))
    return answers


@pytest.mark.parametrize("size", [1, 2, 4])
def test_documents_reset_and_every_gradient_equals_one_rank(ranks, size):
    for case, *parts in zip(CASES, *ranks.run(convolve, size=size), strict=True):
        bounds, order, width, activation, past = case
        x, initial, weight, bias, dy = draw(bounds[-1], width)
        leaves = [leaf.requires_grad_() for leaf in (x, weight, bias, initial)]
        starts = bounds[1:-1] if past else bounds[:-1]
        y = reference.short_convolution(x, weight, bias, activation, starts, initial if past else None)
        y.backward(dy)
        layout = Layout(bounds, order, size)
        ys, dxs, grads, _, _ = zip(*parts, strict=True)
        dweights, dbiases, dinitials = zip(*grads, strict=True)
        # The gradients of weight and bias are summands; that of the tokens before the sequence is on every rank.
        got = [layout.unshard(ys), layout.unshard(dxs), sum(dweights), sum(dbiases)]
        wants = [y.detach(), *(leaf.grad for leaf in leaves[:3])]
        for one, want in [*zip(got, wants, strict=True), *((each, initial.grad) for each in dinitials if past)]:
            torch.testing.assert_close(one, want, rtol=1e-12, atol=1e-12, msg=str(case))
        for rank in range(size):
            for gap in layout.for_rank(rank).padding:
                assert (ys[rank][:, gap] == 0).all()
                assert (dxs[rank][:, gap] == 0).all()


@pytest.mark.parametrize("size", [1, 4])
def test_a_slice_receives_only_the_tokens_that_the_taps_reach(ranks, size):
    for answers in ranks.run(convolve, size=size):
        for (bounds, order, width, _, _), (*_, calls, received) in zip(CASES, answers, strict=True):
            layout = Layout(bounds, order, size)
            tail = min(width - 1, layout.piece_length)
            assert received == (size - 1) * (layout.pieces // size) * BATCH * tail * CHANNELS * 8
            # One tap needs no other token.
            assert calls == ({"all_gather": 2} if size > 1 and width > 1 else {})


def test_wrong_arguments_are_refused():
    x, initial, weight, bias, _ = draw(8, 4)
    with pytest.raises(ValueError, match="x has 8 tokens: expected 6"):
        short_convolution(x, weight, bias, Layout((0, 6)))
    with pytest.raises(ValueError, match="has past_tokens = 0"):
        short_convolution(x, weight, bias, Layout((0, 8)), initial=initial)
    with pytest.raises(ValueError, match=r"initial has shape \[2, 2, 3\]: expected .* = \[2, 3, 3\]"):
        short_convolution(x, weight, bias, Layout((0, 8), past_tokens=1), initial=initial[:, 1:])
    with pytest.raises(ValueError, match="activation"):
        short_convolution(x, weight, bias, Layout((0, 8)), "relu")
