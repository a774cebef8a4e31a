"""Machine limits: how rates are counted."""

import pytest
import torch

from longctx.bench import rates
from longctx.bench.rates import MachineRates, batched_rate, copy_rate, measure_rates

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "SECONDS", 0.01)
    monkeypatch.setattr(rates, "COPIED", 2**20)


def test_a_batched_product_counts_two_operations_a_multiplication(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_seconds", lambda call, device: 1e-3)
    assert batched_rate(CPU, torch.float32, 8, 16) == pytest.approx(2 * 8 * 16**3 / 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_counts_what_is_read_and_written(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(rates, "_seconds", lambda call, device: 1e-3)
    assert copy_rate(CPU, dtype) == pytest.approx(2 * 2**20 / 1e-3)


def test_everything_is_measured() -> None:
    found = measure_rates("cpu", "float32")
    assert isinstance(found, MachineRates)
    assert found.threads == torch.get_num_threads()
    assert found.best_batched == max(found.batched.values())
    assert min(found.matmul, found.copy, *found.batched.values()) > 0
    assert "8x128x128" in found.batched
