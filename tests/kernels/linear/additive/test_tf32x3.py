"""float32 products as the tensor cores compute them: the interpreter multiplies exactly, whatever a kernel asks for."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton._C.libtriton import ir
from triton.runtime import interpreter

from longctx.kernels.linear.recurrence import Segment
from tests.kernels.linear.additive.test_triton import CUDA, Case, check

pytestmark = pytest.mark.skipif(CUDA, reason="for the interpreter; a GPU runs the same comparison by itself")


def to_tf32(x):
    """Round float32 to the 11 bits of tf32, ties away from zero, as cvt.rna does."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def toward_zero(x):
    """Round float64 to float32 toward zero."""
    near = x.astype(np.float32)
    return np.where(np.abs(near.astype(np.float64)) > np.abs(x), np.nextafter(near, np.float32(0)), near)


def tensor_core(a, b, total):
    """Multiply factors in tf32: exact products of 8 numbers at a time, and sums cut to float32 after each."""
    for begin in range(0, a.shape[1], 8):
        part = a[:, begin : begin + 8].astype(np.float64) @ b[begin : begin + 8].astype(np.float64)
        total = toward_zero(total.astype(np.float64) + part)
    return total


def split_product(a, b):
    """Compute the product as Triton's "tf32x3" does: large and small parts, without the product of both small ones."""
    a_large, b_large = to_tf32(a), to_tf32(b)
    a_small, b_small = to_tf32(a - a_large), to_tf32(b - b_large)
    total = tensor_core(a_small, b_large, np.zeros((a.shape[0], b.shape[1]), dtype=np.float32))
    return tensor_core(a_large, b_large, tensor_core(a_large, b_small, total))


@pytest.fixture
def emulated(monkeypatch):
    """Interpret float32 products with that rounding; counts them."""
    count = []
    exact = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, total, input_precision, max_num_imprecise_acc):
        if input_precision != ir.INPUT_PRECISION.TF32x3:
            return exact(self, a, b, total, input_precision, max_num_imprecise_acc)
        count.append(a.data.shape)
        result = split_product(a.data, b.data) + total.data
        return interpreter.TensorHandle(result, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    return count


def test_the_product_is_accurate_to_a_few_bits_of_float32():
    generator = np.random.default_rng(0)
    # Kernels sum at most 64 numbers in a product; longer sums are added outside of the tensor cores.
    for length in (16, 64, 128):
        a, b = (generator.standard_normal(shape).astype(np.float32) for shape in ((16, length), (length, 16)))
        want = a.astype(np.float64) @ b.astype(np.float64)
        assert np.linalg.norm(split_product(a, b) - want) < 2e-6 * np.linalg.norm(want)
        # One product of tf32 alone would not do.
        short = tensor_core(to_tf32(a), to_tf32(b), np.zeros_like(want, dtype=np.float32))
        assert np.linalg.norm(short - want) > 1e-4 * np.linalg.norm(want)


@pytest.mark.parametrize("decay", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("none", "constant")), "scalar"])
@pytest.mark.parametrize("length", [64, pytest.param(1024, marks=pytest.mark.slow)])
def test_all_passes_keep_float32s_accuracy(decay, length, emulated):
    # Weak decays: the state is a long sum.
    case = Case.draw(decay, [Segment(0, length, (length // 3,))], dims=(128, 129), strength=1e-3)
    check(case)
    assert emulated


def test_strong_decays_keep_float32s_accuracy(emulated):
    case = Case.draw("scalar", [Segment(0, 64)], dims=(128, 128))
    levels = torch.tensor([0.0, -1e-3, -0.5, -30.0, -1e4], dtype=torch.float64)
    case.gates = (levels[torch.randint(5, case.gates[0].shape, generator=torch.Generator().manual_seed(3))],)
    check(case)
    assert emulated
