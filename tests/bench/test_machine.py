"""The machine's limits are counted rightly."""

import pytest
import torch

from longctx.bench import machine
from longctx.bench.machine import Machine, batched_rate, copy_rate, free_bytes, measure_machine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SECONDS", 0.01)
    monkeypatch.setattr(machine, "COPIED", 2**20)


def test_a_batched_product_counts_two_operations_a_multiplication(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_seconds", lambda call, device: 1e-3)
    assert batched_rate(CPU, torch.float32, 8, 16) == pytest.approx(2 * 8 * 16**3 / 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_counts_what_is_read_and_written(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(machine, "_seconds", lambda call, device: 1e-3)
    assert copy_rate(CPU, dtype) == pytest.approx(2 * 2**20 / 1e-3)


def test_everything_is_measured() -> None:
    found = measure_machine("cpu", "float32")
    assert isinstance(found, Machine)
    assert found.threads == torch.get_num_threads()
    assert found.best_batched == max(found.batched.values())
    assert min(found.matmul, found.copy, *found.batched.values()) > 0
    assert "8x128x128" in found.batched


def test_free_memory_is_that_of_the_system() -> None:
    assert 0 < free_bytes("cpu") < 2**50
