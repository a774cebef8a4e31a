"""The scan over segments, in torch and in Triton, against maps that are applied one after the other."""

import itertools

import pytest
import torch

from longctx.kernels.linear.recurrence import Carry, compose, exclusive_scan
from longctx.kernels.linear.segment_scan import compose_segments, scan_segments
from tests.combinations import mostly_slow_rows


def draw(kind, count=5, key_dim=5, value_dim=7):
    generator = torch.Generator().manual_seed(count)
    lead = (count, 2, 3)
    shape = {"scalar": lead, "vector": (*lead, key_dim), "matrix": (*lead, key_dim, key_dim)}[kind]
    transition = -torch.rand(shape, generator=generator)
    if kind == "matrix":
        transition /= key_dim  # keeps states of the same size, as the delta rule's transitions do
    else:
        transition[count // 2] = float("-inf")
    states = torch.randn(*lead, key_dim, value_dim, generator=generator)
    return Carry(transition, states), torch.randn(2, 3, key_dim, value_dim, generator=generator)


def kernels():
    pytest.importorskip("triton", reason="pip install -e '.[triton]' to run the Triton kernels")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    from longctx.kernels.linear import triton_segment_scan

    return triton_segment_scan


def one_by_one(carries, state, order):
    received, wide = {}, state.double()
    for number in order:
        received[number] = wide.float()
        wide = carries[number].carry_over(wide)
    return torch.stack([received[number] for number in sorted(received)]), wide.float()


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


@pytest.mark.parametrize("kind", ["scalar", "vector", "matrix"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("key_dim", "value_dim", "count"),
    [
        *((5, 7, n) for n in (0, 1, 2, 5)),
        *mostly_slow_rows([(40, 33, n) for n in (0, 1, 2, 5)], lambda k, v, n: n == 5),
    ],
)
def test_the_kernels_are_the_loop(kind, reverse, key_dim, value_dim, count):
    triton_scan = kernels()
    carries, state = draw(kind, max(count, 1), key_dim, value_dim)
    carries = Carry(carries.transition[:count], carries.state[:count])
    want, end = scan_segments(carries, state, reverse=reverse)
    scan = triton_scan.scan_matrices if kind == "matrix" else triton_scan.scan_segments_triton
    got, last = scan(carries.transition, carries.state, state, reverse)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(last, end)


@pytest.mark.parametrize(
    ("count", "reverse"),
    mostly_slow_rows(itertools.product([2, 5, 6], [False, True]), lambda *row: row in [(5, True), (6, False)]),
)
def test_composed_matrices_are_the_loop(reverse, count):
    carries, _ = draw("matrix", count, 40, 33)
    want = compose_segments(carries, reverse=reverse)
    transition, state = kernels().compose_matrices(carries.transition, carries.state, reverse)
    torch.testing.assert_close(transition, want.transition)
    torch.testing.assert_close(state, want.state)


def test_a_million_tokens_of_segments_are_as_exact_as_in_float64():
    """512 transitions of the delta rule, products of reflections that shrink by little."""
    generator = torch.Generator().manual_seed(0)
    key = torch.nn.functional.normalize(torch.randn(512, 1, 1, 32, generator=generator, dtype=torch.float64), dim=-1)
    strength = torch.rand(512, 1, 1, 1, 1, generator=generator, dtype=torch.float64)
    transition = torch.eye(32, dtype=torch.float64) - strength * key[..., None] * key[..., None, :]
    states = torch.randn(512, 1, 1, 32, 16, generator=generator, dtype=torch.float64)
    start = torch.randn(1, 1, 32, 16, generator=generator, dtype=torch.float64)
    want, end = scan_segments(Carry(transition, states), start)
    got, last = kernels().scan_matrices(transition.float(), states.float(), start.float(), False)
    assert (got - want).norm() < 1e-6 * want.norm()
    assert (last - end).norm() < 1e-6 * end.norm()


def test_a_state_that_is_not_finite_reaches_no_earlier_segment():
    carries, state = draw("matrix", 5, 6, 6)
    want, _ = kernels().scan_matrices(carries.transition, carries.state, state, False)
    carries.state[3] = float("nan")
    got, last = kernels().scan_matrices(carries.transition, carries.state, state, False)
    assert torch.equal(got[:4], want[:4])
    assert last.isnan().all()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("count", [256, pytest.param(2048, marks=pytest.mark.slow)])
def test_a_scan_over_many_segments_or_ranks_adds_up_no_error(reverse, count):
    """In float32, state by state, the error is 90 times the bound after 256 segments already."""
    generator = torch.Generator().manual_seed(0)
    decays = torch.tensor([1e-9, 3.9e-8, 1e-6, 1e-4])
    transition = -decays.expand(count, 1, -1).contiguous()
    state = torch.randn(count, 1, len(decays), 2, 2, generator=generator)
    state[1:-1] = 0
    carries, start = Carry(transition, state), torch.zeros_like(state[0])
    order = list(range(count))[:: -1 if reverse else 1]
    want = exclusive_scan([Carry(transition[n].double(), state[n].double()) for n in order], start.double())[-2]
    for states in (
        scan_segments(carries, start, reverse=reverse)[0][order[-1]],
        exclusive_scan([carries[n] for n in order], start)[-2],
        kernels().scan_segments_triton(transition, state, start, reverse)[0][order[-1]],
    ):
        assert (states - want).abs().max() < 2e-7 * want.abs().max()
