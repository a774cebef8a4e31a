"""Functions that torch.compile fuses on CUDA: into one kernel that moves each byte once, seen without a GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

from longctx.kernels import fusion, loss, pointwise
from longctx.kernels.fusion import fused
from longctx.layers import rotary

ROWS, WIDTH, HEADS, VOCABULARY = 4096, 2048, 16, 128256
FLOAT, DOUBLE = torch.float32, torch.float64


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def cases():
    """By name: a function, its arguments, its elements, and the kernels and bytes per element that it takes in bf16."""
    x, scale, wide = empty(ROWS, WIDTH), empty(WIDTH), empty(ROWS, 2 * WIDTH)
    elements = ROWS * WIDTH
    yield "norm", pointwise._norm_rows, (x, scale, 1e-6), elements, 1, 4
    yield "norm, gate", pointwise._norm_rows, (x, x, 1e-6), elements, 1, 6
    # A sum over rows beside one over columns is two more kernels, which read the inputs again.
    yield "norm, grad", pointwise._norm_rows_grad, (x, x, scale, 1e-6), elements, 3, 10
    yield "norm, gate, grad", pointwise._norm_rows_grad, (x, x, x, 1e-6), elements, 1, 10
    yield "gated norm", pointwise._gated_norm_rows, (x, x, scale, 1e-6, "silu"), elements, 1, 6
    yield "gated norm, grad", pointwise._gated_norm_rows_grad, (x, x, x, scale, 1e-6, "silu"), elements, 3, 16
    yield "swiglu", pointwise._swiglu_rows, (wide,), elements, 1, 6
    yield "swiglu, grad", pointwise._swiglu_rows_grad, (wide, x), elements, 1, 10
    logits, targets = empty(ROWS, VOCABULARY), empty(ROWS, 1, dtype=torch.int64)
    number, here = empty(ROWS, dtype=FLOAT), empty(ROWS, dtype=torch.bool)
    # The logit of the label, one per token, is a kernel over tokens.
    yield "cross-entropy", loss._row_terms, (logits, targets, here), ROWS * VOCABULARY, 2, 2
    arguments = logits, number, targets, here, number
    yield "cross-entropy, grad", loss._logits_grad, arguments, ROWS * VOCABULARY, 1, 4
    heads, angle = empty(1, ROWS, HEADS, 128), empty(1, ROWS, 1, 64, dtype=DOUBLE)
    yield "rotary", rotary._rotate, (heads, angle, angle), ROWS * HEADS * 128, 1, 4.5


@pytest.fixture(scope="module")
def compiled():
    """Kernels, other operators, and bytes per element of each case."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.kernels.test_fusion"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("name", "kernels", "bytes_"), [(case[0], *case[4:]) for case in cases()])
def test_a_function_is_so_many_kernels_that_move_so_many_bytes(compiled, name, kernels, bytes_):
    found = compiled[name]
    assert found["kernels"] == kernels
    assert found["others"] == 1, "more than the allocation of the result"
    assert found["bytes"] == pytest.approx(bytes_, rel=0.01)


def test_on_a_cpu_the_function_is_called_as_it_is():
    def double(x):
        return 2 * x

    assert fused(double)(torch.ones(3)).tolist() == [2.0] * 3
    assert fused(double).__wrapped__ is double


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def test_on_a_gpu_the_compiled_function_is_called_and_rows_are_dynamic(monkeypatch):
    marked = []
    monkeypatch.setattr(fusion, "_compiled", lambda function: lambda *x: ("compiled", function(*x)))
    monkeypatch.setattr(torch._dynamo, "maybe_mark_dynamic", lambda x, dim: marked.append((tuple(x.shape), dim)))

    def add(x, y, z):
        return x + y + z

    x, y = torch.ones(4, 3).as_subclass(OnGPU), torch.ones(3).as_subclass(OnGPU)
    kind, result = fused(add)(x, y, 1.0)
    assert kind == "compiled"
    assert result.sum() == 36
    assert marked == [((4, 3), 0)]


@pytest.mark.slow
def test_compiled_functions_compute_the_same():
    """By torch.compile's code for CPUs."""
    for name, function, arguments, *_ in cases():
        generator = torch.Generator().manual_seed(0)

        def draw(x, generator=generator):
            if not isinstance(x, torch.Tensor):
                return x
            shape = [n if n <= 128 else n // 32 for n in x.shape]
            if x.dtype == torch.int64:
                return torch.randint(0, 100, shape, generator=generator)
            real = torch.randn(shape, generator=generator)
            return real > 0 if x.dtype == torch.bool else real.to(DOUBLE if x.dtype == DOUBLE else FLOAT)

        drawn = [draw(x) for x in arguments]
        want = function.__wrapped__(*(x.clone() if isinstance(x, torch.Tensor) else x for x in drawn))
        got = torch.compile(function.__wrapped__, fullgraph=True)(*drawn)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


if __name__ == "__main__":
    from tests.offline_inductor import compile_for_cuda, pretend_gpu

    pretend_gpu()
    results = {}
    for name, function, arguments, elements, *_ in cases():
        found = compile_for_cuda(function.__wrapped__, *arguments)
        results[name] = {"kernels": found.kernels, "others": found.others, "bytes": found.bytes_ / elements}
    sys.stdout.write(json.dumps(results) + "\n")
