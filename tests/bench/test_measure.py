"""One measurement: its inputs, its gradients, what it counts."""

from longctx.bench.kernels import Shape
from longctx.bench.measure import KernelTask, Measurement, measure, measure_lengths

SHAPE = Shape(150, 2, 12, "float32")
TOKENS = 150 * 2 * 12 * 4
"""Bytes of a tensor of tokens."""


def task(kernel: str, *, backward: bool = False, shape: Shape = SHAPE) -> KernelTask:
    return KernelTask(kernel, False, backward, shape, "cpu", 2, 10.0)


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
    found = measure_lengths(task("swiglu"), (100, 50))
    assert all(isinstance(one, Measurement) for one in found)
    assert [one.input_bytes for one in found] == [100 * 2 * 2 * 12 * 4, 50 * 2 * 2 * 12 * 4]


def test_memory_holds_the_results() -> None:
    """32 MiB of output and nothing else of that size; Linux counts pages in batches."""
    found = measure(task("rms-norm", shape=Shape(8192, 8, 128, "float32")))
    assert found.memory is not None
    assert 31 * 2**20 <= found.memory < 44 * 2**20
