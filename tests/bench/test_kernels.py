"""Kernels of the benchmark: their inputs, forward and backward."""

import pytest
import torch

from longctx.bench.kernels import KERNELS, Shape
from longctx.bench.measure import KernelTask, build_workload, run

SHAPE = Shape(150, 2, 12, "float32")


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
