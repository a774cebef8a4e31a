"""Vector decays of the additive Triton kernels: chunks of every size, strong decays, bf16, parts of the backward pass.

`test_triton` has what holds for all decays.
"""

import pytest
import torch

pytest.importorskip("triton")

from longctx.kernels.linear import tuning
from longctx.kernels.linear.additive import triton as additive
from longctx.kernels.linear.additive import triton_vector
from longctx.kernels.linear.recurrence import Inputs, Segment
from longctx.kernels.linear.reference import linear_recurrence
from longctx.kernels.linear.triton_launch import LaunchPlan
from tests.combinations import mostly_slow
from tests.kernels.linear.additive.test_triton import Case, check, distance, pytestmark  # noqa: F401 - marks this too

SMALL = tuning.TileSizes(chunk=64, block_k=16, block_v=16, warps=4, stages=1)


@pytest.mark.parametrize("chunk", mostly_slow([16, 64, 128], 16, 64))
@pytest.mark.parametrize(
    "starts",
    [pytest.param((), id="no start", marks=pytest.mark.slow), pytest.param((30, 31, 70, 100), id="inside")],
)
def test_chunks_of_every_size_equal_the_reference(chunk, starts):
    case = Case.draw("vector", [Segment(0, 140, starts), Segment(140, 150)], dims=(20, 12), strength=0.5)
    sizes = {**SMALL, "chunk": chunk}
    with tuning.override_tiles("prepare/vector", sizes), tuning.override_tiles("summary/vector", sizes):
        check(case)


def test_several_query_heads_and_blocks_of_channels_in_chunks_of_64():
    case = Case.draw("vector", [Segment(0, 70, (33,))], heads=(4, 2, 1, 2), dims=(36, 20), strength=0.2)
    with tuning.override_tiles("prepare/vector", SMALL):
        check(case)


@pytest.mark.parametrize("chunk", [32, 64])
def test_pairs_after_decays_to_nothing_are_as_exact_as_others(chunk):
    """Outputs token by token: a difference of cumulative sums of -10000 would lose the small decays after them."""
    length = 64
    case = Case.draw("vector", [Segment(0, length)], dims=(8, 4), strength=1e-2)
    case.gates[0][:, 5:40:2] = -1e4
    q, k, v, gates, _, states, _ = case.on_device()
    with tuning.override_tiles("prepare/vector", {**SMALL, "chunk": chunk}):
        out, _ = additive.apply(Inputs(q, k, v, gates), case.segments, states)
    want, _ = linear_recurrence(case.q, case.k, case.v, *case.gates, initial_state=case.states[0])
    for token in range(length):
        assert distance(out[:, token], want[:, token]) < 1e-5, token


@pytest.mark.parametrize("strength", mostly_slow([2.0, 0.05], 0.05))
def test_bfloat16_multiplies_in_bf16_and_adds_log_decays_in_float32(strength):
    case = Case.draw("vector", [Segment(0, 70, (30,)), Segment(70, 80)], dims=(40, 24), strength=strength)
    for name in ("q", "k", "v", "do"):
        setattr(case, name, getattr(case, name).bfloat16().double())
    check(case, bound=2e-2, dtype=torch.bfloat16)


def test_parts_of_the_backward_pass_equal_all_of_it():
    case = Case.draw("vector", [Segment(0, 40, (7,))])
    q, k, v, gates, do, states, dends = case.on_device()
    inputs = Inputs(q, k, v, gates)
    dq, dk, dv, _, dstates = additive.apply_grad(inputs, case.segments, do, states, dends, True)
    assert torch.equal(additive.query_grad(inputs, case.segments, do, states), dq)
    for got, want in zip(additive.key_value_grad(inputs, case.segments, do, dends), (dk, dv, dstates), strict=True):
        assert torch.equal(got, want)


def test_scratch_for_few_segments_at_a_time_gives_the_same(monkeypatch):
    case = Case.draw("vector", Segment(0, 36, (20,)).cut(16), batch=2, dims=(6, 4))
    q, k, v, gates, do, states, dends = case.on_device()

    def run():
        inputs = Inputs(q, k, v, gates)
        grads = additive.apply_grad(inputs, case.segments, do, states, dends, True)
        return *additive.apply(inputs, case.segments, states), *grads[:3], *grads[3], grads[4]

    want = run()
    launched = []
    launch = LaunchPlan.launch

    def counting(self, kernel, *arguments, **constants):
        launched.append(kernel)
        launch(self, kernel, *arguments, **constants)

    monkeypatch.setattr(LaunchPlan, "launch", counting)
    monkeypatch.setattr(triton_vector, "SCRATCH", 1)
    for got, all_at_once in zip(run(), want, strict=True):
        assert torch.equal(got, all_at_once)
    assert launched.count(triton_vector.prepare_kernel) == 2 * len(case.segments)
