"""The state scan over ranks against the recurrence on one."""

import itertools

import pytest
import torch

from longctx.kernels import lightning, reference
from longctx.parallel.collectives import counted
from longctx.parallel.layout import Layout
from longctx.parallel.scan import state_scan
from tests.parallel.cases import PACKINGS, layout_here


def draw(length, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, length, 3, 4, generator=generator, dtype=dtype) for _ in range(2))
    v, do = (torch.randn(2, length, 3, 5, generator=generator, dtype=dtype) for _ in range(2))
    state, dfinal = (torch.randn(2, 3, 4, 5, generator=generator, dtype=dtype) for _ in range(2))
    return q, k, v, do, state, dfinal, -torch.tensor([0.0, 0.1, 1.5], dtype=dtype)


def whole(bounds, continued, dtype):
    q, k, v, do, state, dfinal, gates = draw(bounds[-1], dtype)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, state)]
    starts = bounds[1:-1] if continued else bounds[:-1]
    out, final = reference.lightning(*leaves[:3], gates, starts, leaves[3] if continued else None)
    torch.autograd.backward([out, final], [do, dfinal])
    return out, final, *(x.grad for x in leaves)


def on_rank(cases, dtype):
    answers = []
    for bounds, order, continued in cases:
        layout = layout_here(bounds, order, 4 if continued else 0)
        q, k, v, do, state, dfinal, gates = draw(bounds[-1], dtype)
        leaves = [layout.shard(x).requires_grad_() for x in (q, k, v)]
        state.requires_grad_()
        with counted() as traffic:
            out, final = state_scan(
                lightning, *leaves, gates, layout, initial_state=state if continued else None, final_state=True
            )
            torch.autograd.backward([out, final], [layout.shard(do), dfinal])
        answers.append((out.detach(), final.detach(), *(x.grad for x in leaves), state.grad, dict(traffic.calls)))
    return answers


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_layout_equals_one_rank(ranks, size, dtype, bound):
    cases = list(itertools.product(PACKINGS.values(), ["contiguous", "zigzag"], [False, True]))
    answers = ranks.run(on_rank, cases, dtype, size=size)
    for number, (bounds, order, continued) in enumerate(cases):
        layout = Layout(bounds, order, size)
        want = whole(bounds, continued, dtype)
        parts = list(zip(*(answer[number] for answer in answers), strict=True))
        got = [layout.unshard(part) for part in (parts[0], *parts[2:5])]
        case = f"{bounds} {order} continued={continued}"
        for name, x, ref in zip(("o", "dq", "dk", "dv"), got, (want[0], *want[2:5]), strict=True):
            assert (x - ref).norm() <= bound * ref.norm(), f"{name} {case}"
        for x in parts[1]:
            assert (x - want[1]).norm() <= bound * want[1].norm(), f"final state {case}"
        if continued:
            dstate = torch.zeros_like(parts[5][0]) if want[5] is None else want[5]
            for x in parts[5]:
                assert (x - dstate).norm() <= bound * dstate.norm(), f"initial state {case}"
        assert all(calls == ({"all_gather": 2} if size > 1 else {}) for calls in parts[6]), case


def received_bytes(length):
    layout = layout_here((0, length), "zigzag")
    q, k, v, do, *_, gates = draw(length)
    leaves = [layout.shard(x).requires_grad_() for x in (q, k, v)]
    with counted() as traffic:
        out, _ = state_scan(lightning, *leaves, gates, layout)
        out.backward(layout.shard(do))
    return traffic.bytes["all_gather"]


def test_bytes_follow_the_formula_and_do_not_grow_with_the_sequence(ranks):
    # 2 passes x 3 other ranks x 2 slices x (B 2 x H 3) x (1 + K 4 x V 5) float64
    want = 2 * 3 * 2 * 6 * 21 * 8
    assert ranks.run(received_bytes, 16, size=4) == [want] * 4
    assert ranks.run(received_bytes, 4096, size=4) == [want] * 4


def outputs_around(order, t):
    layout = layout_here((0, 17, 48), order)
    q, k, v, *_, gates = draw(48, torch.float32)
    before, _ = state_scan(lightning, *map(layout.shard, (q, k, v)), gates, layout)
    for x in (q, k, v):
        x[:, t] = 100.0
    after, _ = state_scan(lightning, *map(layout.shard, (q, k, v)), gates, layout)
    return before, after


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("t", [0, 16, 30, 47])
def test_changing_a_token_leaves_earlier_outputs_on_all_ranks_bitwise_unchanged(ranks, order, t):
    layout = Layout((0, 17, 48), order, 4)
    before, after = (layout.unshard(parts) for parts in zip(*ranks.run(outputs_around, order, t, size=4), strict=True))
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


def test_wrong_arguments_are_refused():
    q, k, v, _, state, _, gates = draw(8)
    layout = Layout((0, 8))
    with pytest.raises(ValueError, match="8 tokens, but the layout gives this rank 4"):
        state_scan(lightning, q, k, v, gates, Layout((0, 4)))
    with pytest.raises(ValueError, match="do not fit"):
        state_scan(lightning, q, k[..., :2], v, gates, layout)
    with pytest.raises(ValueError, match="not continued"):
        state_scan(lightning, q, k, v, gates, layout, initial_state=state)
    with pytest.raises(ValueError, match=r"initial_state .* should be"):
        state_scan(lightning, q, k, v, gates, Layout((0, 8), continued=1), initial_state=state[:1])
    with pytest.raises(ValueError, match="gates have no gradient"):
        state_scan(lightning, q, k, v, gates.requires_grad_(), layout)
