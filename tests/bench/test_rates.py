"""Machine limits: how rates are counted."""

from dataclasses import replace

import pytest
import torch

from longctx.bench import rates
from longctx.bench.rates import MachineRates, batched_rate, copy_rate, in_cache_rate, large_rate, measure_rates
from longctx.kernels.attention import native
from longctx.kernels.native import library

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "SECONDS", 0.01)
    monkeypatch.setattr(rates, "COPIED", 2**20)
    monkeypatch.setattr(rates, "LARGE", (32, 64))
    monkeypatch.setattr(rates, "IN_CACHE", 2)


def test_a_batched_product_counts_two_operations_a_multiplication(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_seconds", lambda call, device: 1e-3)
    assert batched_rate(CPU, torch.float32, 8, 16) == pytest.approx(2 * 8 * 16**3 / 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_counts_what_is_read_and_written(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(rates, "_seconds", lambda call, device, spent: 1e-3)
    assert copy_rate(CPU, dtype) == pytest.approx(2 * 2**20 / 1e-3)


def test_everything_is_measured() -> None:
    found = measure_rates("cpu", "float32")
    assert isinstance(found, MachineRates)
    assert found.threads == torch.get_num_threads()
    assert found.best_batched == max(found.batched.values())
    assert min(found.matmul, found.copy, *found.batched.values()) > 0
    assert "8x128x128" in found.batched
    assert found.native == library.describe()
    assert (found.in_cache is None) == (not native.is_built())
    assert found.limit == max(found.matmul, found.best_batched, found.in_cache or 0.0)


def test_the_limit_of_a_gpu_is_that_of_batched_products() -> None:
    found = replace(measure_rates("cpu", "float32"), device="cuda", matmul=1e30)
    assert found.limit == found.best_batched


def test_a_large_product_is_the_fastest_of_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_seconds", lambda call, device: 1e-3)
    assert large_rate(CPU, torch.float32) == pytest.approx(2 * 64**3 / 1e-3)


@pytest.mark.skipif(not native.is_built(), reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_cache_count_those_of_all_threads(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(rates, "_seconds", lambda call, device: call() and 1e-3)
    flops = 2 * 96 * 64 * 256 * torch.get_num_threads()
    assert native.multiply_in_cache(dtype, 3) == 3 * flops
    assert in_cache_rate(CPU, dtype) == pytest.approx(2 * flops / 1e-3)


def test_without_native_kernels_there_are_no_products_in_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.SWITCH, "0")
    found = measure_rates("cpu", "float32")
    assert found.in_cache is None
    assert found.native == "torch operators: LONGCTX_NATIVE=0 turns the C++ kernels off"
    monkeypatch.delenv(library.SWITCH)
    assert in_cache_rate(CPU, torch.float64) is None
