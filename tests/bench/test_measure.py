"""One measurement: its inputs, its gradients, what it counts."""

import pytest
import torch

from longctx.bench.kernels import KERNELS, Shape
from longctx.bench.measure import KernelTask, Measurement, build_workload, measure, measure_lengths, run

SHAPE = Shape(150, 2, 12, "float32")
TOKENS = 150 * 2 * 12 * 4
"""Bytes of a tensor of tokens."""


def task(kernel: str, *, backward: bool = False, shape: Shape = SHAPE) -> KernelTask:
    return KernelTask(kernel, False, backward, shape, "cpu", 2, 10.0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_runs_forward_and_backward(kernel: str) -> None:
    made = build_workload(task(kernel, backward=True), SHAPE)
    out = run(made, None)
    assert out.shape[:2] == (1, SHAPE.tokens)
    run(made, torch.ones_like(out))
    for name, leaf in made.leaves.items():
        assert (leaf.grad is None) == (name in made.constants), name
        assert leaf.isfinite().all(), name
        assert leaf.grad is None or leaf.grad.isfinite().all(), name


@pytest.mark.parametrize("kernel", KERNELS)
def test_inputs_are_the_same_each_time(kernel: str) -> None:
    first, second = (build_workload(task(kernel), SHAPE).leaves for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_decays_are_logarithms_and_stay_away_from_zero() -> None:
    for kernel in KERNELS:
        leaves = build_workload(task(kernel), SHAPE).leaves
        if "log_decay" in leaves:
            assert leaves["log_decay"].max() <= -0.001
            assert leaves["log_decay"].dtype == torch.float32


def test_attention_differentiates_as_torch_does() -> None:
    shape = Shape(70, 2, 12, "float64")
    made = build_workload(task("attention", backward=True, shape=shape), shape)
    do = torch.randn(1, 70, 2, 12, dtype=torch.float64)
    out = run(made, do)
    again = [leaf.detach().requires_grad_() for leaf in made.leaves.values()]
    want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in again), is_causal=True)
    want.transpose(1, 2).backward(do)
    torch.testing.assert_close(out, want.transpose(1, 2).detach())
    for leaf, other in zip(made.leaves.values(), again, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad)


def test_bytes_of_a_forward_pass() -> None:
    """q, k and v are read, o is written; the decays are 8 bytes."""
    found = measure(task("lightning"))
    assert found.input_bytes == 3 * TOKENS + 8
    assert found.moved == 4 * TOKENS + 8
    assert 1 <= len(found.times) <= 2
    assert found.seconds > 0


def test_bytes_of_a_backward_pass() -> None:
    """do is an input too; q, k, v and do are read, and the gradients of q, k, v written."""
    found = measure(task("lightning", backward=True))
    assert found.input_bytes == 4 * TOKENS + 8
    assert found.moved == (4 + 4 + 3) * TOKENS + 16


def test_bf16_halves_them() -> None:
    found = measure(task("lightning", shape=Shape(150, 2, 12, "bfloat16")))
    assert found.input_bytes == 3 * TOKENS // 2 + 8


def test_several_lengths() -> None:
    found = measure_lengths(task("gated-unit"), (100, 50))
    assert all(isinstance(one, Measurement) for one in found)
    assert [one.input_bytes for one in found] == [100 * 2 * 2 * 12 * 4, 50 * 2 * 2 * 12 * 4]


def test_memory_holds_the_results() -> None:
    """32 MiB of output and nothing else of that size; Linux counts pages in batches."""
    found = measure(task("rms-norm", shape=Shape(8192, 8, 128, "float32")))
    assert found.memory is not None
    assert 31 * 2**20 <= found.memory < 44 * 2**20
