"""What is measured of the machine is of the right kind and disturbs nothing; the numbers themselves are its own."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from longctx import system as machine
from longctx.system import device_name, free_bytes, matmul_rate, peak_memory_bytes

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def test_the_rate_counts_two_operations_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose product of size n takes n³ · 2e-9 s the rate is 1 GFLOP/s."""
    clock = 0.0
    sizes = []

    class Mm:
        def __call__(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            nonlocal clock
            sizes.append(a.shape[0])
            clock += 2e-9 * a.shape[0] ** 3
            return out

    monkeypatch.setattr(torch, "mm", Mm())
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    assert matmul_rate(CPU, torch.float32, seconds=30.0) == pytest.approx(1e9)
    assert max(sizes) == 1024, "the largest whose product takes less than a twelfth of the time"


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_is_measured_in_about_the_time_asked(device: torch.device, dtype: torch.dtype) -> None:
    matmul_rate(device, dtype, seconds=0.01)
    start = time.perf_counter()
    rate = matmul_rate(device, dtype, seconds=0.1)
    assert time.perf_counter() - start >= 0.1
    assert rate > 1e6


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_the_random_state_is_left_alone(device: torch.device) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4, device=device)
    torch.manual_seed(3)
    matmul_rate(device, torch.float32, seconds=0.01)
    assert torch.equal(torch.rand(4, device=device), expected)


def test_memory_is_the_peak_and_in_bytes() -> None:
    before = peak_memory_bytes(CPU)
    block = torch.ones(2**25)  # 128 MiB
    held = peak_memory_bytes(CPU)
    assert held >= block.nbytes
    del block
    assert peak_memory_bytes(CPU) == pytest.approx(held, rel=0.05), "a peak does not fall"
    assert before <= held < 2**44


def test_free_memory_is_that_of_the_system() -> None:
    assert 0 < free_bytes("cpu") < 2**50


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_not_that_of_the_parent() -> None:
    """The peak that getrusage gives a child starts at its parent's."""
    ballast = torch.ones(2**26)  # 256 MiB, many times an interpreter that reads one file
    program = f"""
import sys, types
class Torch(types.ModuleType):  # the import of torch would be most of what is measured
    def __getattr__(self, name): return object
sys.modules["torch"] = Torch("torch")
source = compile(open({machine.__file__!r}).read(), "machine", "exec")
names = {{"__name__": "machine"}}
exec(source, names)
print(names["peak_memory_bytes"](types.SimpleNamespace(type="cpu")))
"""
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(child.stdout) < ballast.nbytes / 4


def test_without_proc_the_operating_system_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    own = peak_memory_bytes(CPU)
    monkeypatch.setattr(machine, "_field", lambda *_: None)
    assert peak_memory_bytes(CPU) >= own * 0.95
    assert device_name(CPU)


def test_a_field_of_proc(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: A: B\nmodel name\t: C\n")
    assert machine._field(path, "model name") == "A: B"
    assert machine._field(path, "model") is None
    assert machine._field(tmp_path / "nowhere", "model") is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_rates_own_buffers_do_not_count_as_memory() -> None:
    device = torch.device("cuda")
    held = torch.cuda.memory_allocated(device)
    matmul_rate(device, torch.bfloat16, seconds=0.05)
    assert peak_memory_bytes(device) == held
    assert device_name(device) == torch.cuda.get_device_name(device)
