"""Steps of the GPU benchmark that decide: what is wrong, how long a sequence fits, which configurations run."""

import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu_kernels, gpu_peers, gpu_train
from benchmarks.gpu_recurrences import RECURRENCES, draw, with_gradients
from benchmarks.gpu_shape import Shape
from benchmarks.gpu_timing import kernels_of, milliseconds

CPU = torch.device("cpu")


def checked(dtype: torch.dtype, name: str, error: float) -> bool:
    want = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = want + error * want.norm() / want.numel() ** 0.5
    return "wrong" not in gpu_kernels.compare((name,), (got,), (want,), dtype)


def test_a_difference_beyond_the_bound_is_wrong_and_so_is_nan() -> None:
    assert checked(torch.float32, "dq", 0.9e-5)
    assert not checked(torch.float32, "dq", 1.1e-5)
    assert checked(torch.float32, "dlog_decay", 4e-5)
    assert checked(torch.bfloat16, "o", 1e-2)
    assert not checked(torch.bfloat16, "o", 3e-2)
    assert not checked(torch.bfloat16, "o", math.nan)


def test_a_gradient_of_a_constant_decay_in_16_bits_must_be_finite() -> None:
    want = torch.ones(3, dtype=torch.float64)
    compare = gpu_kernels.compare
    assert "wrong" not in compare(("dlog_decay",), (5 * want,), (want,), torch.bfloat16)
    assert "wrong" in compare(("dlog_decay",), (math.nan * want,), (want,), torch.bfloat16)
    assert "wrong" in compare(("dlog_decay",), (1.1 * want,), (want,), torch.float32)


def test_a_kernel_that_is_wrong_in_its_last_head_is_found(monkeypatch) -> None:
    def broken(inputs, starts=()):
        out, *grads = with_gradients(inputs, starts)
        if inputs.q.dtype == torch.float32:
            out[:, -1, -1] += 1
        return out, *grads

    monkeypatch.setattr(gpu_kernels, "with_gradients", broken)
    result = gpu_kernels.check_recurrence("additive/scalar", "float32", Shape(20, 3, 8), "cpu", False)
    assert result["wrong"]
    assert result["error"].startswith("o ")


@pytest.mark.parametrize("kind", RECURRENCES)
def test_results_are_named_in_their_order(kind: str) -> None:
    inputs = draw(kind, Shape(6, 2, 4), torch.float64, CPU)
    shapes = {"o": inputs.v.shape, "dq": inputs.q.shape, "dk": inputs.k.shape, "dv": inputs.v.shape}
    gates = dict(zip([name for name in inputs.names if name not in shapes], inputs.gates, strict=True))
    wanted = shapes | {name: gate.shape for name, gate in gates.items()}
    got = dict(zip(inputs.names, with_gradients(inputs.double()), strict=True))
    assert {name: x.shape for name, x in got.items()} == wanted


def test_the_minimum_traffic_of_a_call() -> None:
    shape = Shape(10, 3, 8)
    assert gpu_kernels.min_bytes("additive/constant", shape, 2) == (4 * 480, 11 * 480)
    assert gpu_kernels.min_bytes("delta/vector", shape, 2) == (4 * 480 + 960 + 120, 11 * 480 + 3 * 1080)


def test_a_timing_is_the_median_and_says_what_the_host_took() -> None:
    times = milliseconds(lambda: sum(range(1000)), CPU, 3)
    assert 0 < times["least_ms"] <= times["ms"] <= times["most_ms"]
    assert 0 < times["host_ms"] <= times["most_ms"]


def test_kernels_are_listed_by_the_time_they_take() -> None:
    x = torch.randn(64, 64)
    rows = kernels_of(lambda: (x @ x).relu_(), CPU, 2)
    assert len(rows) == 2
    assert rows[0]["ms"] >= rows[1]["ms"]


def measured(tokens: int, gib: float, seconds: float = 1.0) -> dict:
    return {"tokens": tokens, "memory_gib": gib, "step_seconds": seconds}


def test_the_longest_sequence_is_extrapolated_from_the_memory_of_two() -> None:
    short, long = measured(32768, 22.0), measured(65536, 24.0)
    tokens, limit = gpu_train.longest_length(short, long, 0.0, 80.0, 1000.0)
    assert limit == "memory"
    predicted = 24.0 + (tokens - 65536) * 2.0 / 32768
    assert tokens % gpu_train.GRAIN == 0
    assert 0.92 * 80 - 1.0 <= predicted <= 0.92 * 80


def test_a_long_step_limits_the_longest_sequence_by_its_time() -> None:
    short, long = measured(32768, 22.0), measured(65536, 24.0, seconds=2.0)
    assert gpu_train.longest_length(short, long, 0.0, 80.0, 8.0) == (4 * 65536, "time")
    tokens, limit = gpu_train.longest_length(short, long, 1 / 65536, 80.0, 8.0)
    assert limit == "time"
    assert tokens == 2 * 65536  # twice the tokens, each with twice the FLOPs


def test_the_configurations_of_a_peer_are_the_nearest_to_blocks_of_64() -> None:
    best = gpu_peers.distance({"BK": 64, "BV": 64}, 4, 3)
    assert best == 0
    assert gpu_peers.distance({"BK": 128, "BV": 64}, 4, 3) > gpu_peers.distance({"BK": 64, "BV": 64}, 4, 2)
    assert gpu_peers.distance({"HAS_BIAS": 5}, 4, 3) == 0


def test_the_autotuner_tries_at_most_that_many(monkeypatch) -> None:
    from triton.runtime.autotuner import Autotuner

    configs = [SimpleNamespace(kwargs={"BK": size}, num_warps=4, num_stages=3) for size in (16, 32, 64, 128)]
    monkeypatch.setattr(Autotuner, "prune_configs", lambda tuner, arguments: configs)
    gpu_peers.restrict_autotuner(2)
    assert [x.kwargs["BK"] for x in Autotuner.prune_configs(None, {})] == [64, 32]


def test_a_peer_that_computes_something_else_is_wrong() -> None:
    x = torch.ones(5)
    assert "wrong" not in gpu_peers.compare(("o", "dq"), (x, x), (1.01 * x, x))
    assert gpu_peers.compare(("o", "dq"), (x, x), (x, 2 * x))["error"] == "dq 1.0e+00"
