"""The scan over segments, in torch and in Triton, against maps that are applied one after the other."""

import pytest
import torch

from longctx.kernels.linear.recurrence import Carry, compose
from longctx.kernels.linear.segment_scan import compose_segments, scan_segments


def draw(kind, count=5, key_dim=5, value_dim=7):
    generator = torch.Generator().manual_seed(count)
    lead = (count, 2, 3)
    shape = {"scalar": lead, "vector": (*lead, key_dim), "matrix": (*lead, key_dim, key_dim)}[kind]
    transition = -torch.rand(shape, generator=generator)
    if kind != "matrix":
        transition[count // 2] = float("-inf")
    states = torch.randn(*lead, key_dim, value_dim, generator=generator)
    return Carry(transition, states), torch.randn(2, 3, key_dim, value_dim, generator=generator)


def one_by_one(carries, state, order):
    received = {}
    for number in order:
        received[number] = state
        state = carries[number].carry_over(state)
    return torch.stack([received[number] for number in sorted(received)]), state


@pytest.mark.parametrize("kind", ["scalar", "vector", "matrix"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_scan_and_whole_are_the_maps_one_after_the_other(kind, reverse, count):
    carries, state = draw(kind, count)
    order = list(reversed(range(count))) if reverse else list(range(count))
    want, end = one_by_one(carries, state, order)
    got, last = scan_segments(carries, state, reverse=reverse)
    assert torch.equal(got, want)
    assert torch.equal(last, end)
    folded = carries[order[0]]
    for number in order[1:]:
        folded = compose(folded, carries[number])
    together = compose_segments(carries, reverse=reverse)
    torch.testing.assert_close(together.transition, folded.transition)
    torch.testing.assert_close(together.state, folded.state)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(5, 7), (40, 33)])
def test_the_kernel_is_the_loop(kind, reverse, key_dim, value_dim):
    pytest.importorskip("triton", reason="pip install 'longctx[triton]' to run the Triton kernels")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    from longctx.kernels.linear.triton_segment_scan import scan_segments_triton

    carries, state = draw(kind, 5, key_dim, value_dim)
    want, end = scan_segments(carries, state, reverse=reverse)
    got, last = scan_segments_triton(carries.transition, carries.state, state, reverse)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(last, end)
