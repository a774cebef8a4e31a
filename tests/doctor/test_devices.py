"""Devices: what the PCI bus, the driver and torch say, and where they disagree."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longctx.doctor.devices import Devices, check_devices, read_devices
from longctx.doctor.findings import Finding

GIB = 2**30
H100 = Devices("cuda", "H100", 80 * GIB, 79 * GIB, 1000 * GIB, seen=8, present=8, driver="550.54.15")


def bad(devices: Devices, local_ranks: int = 8) -> list[Finding]:
    return [one for one in check_devices(devices, local_ranks) if one.status != "ok"]


def pci(system: Path, number: int, **attributes: str) -> None:
    folder = system / "bus/pci/devices" / f"0000:00:{number:02x}.0"
    folder.mkdir(parents=True)
    for name, value in attributes.items():
        (folder / name.rstrip("_")).write_text(value + "\n")


def test_gpus_and_driver_are_those_of_the_kernel(tmp_path: Path) -> None:
    pci(tmp_path, 1, vendor="0x10de", class_="0x030200")
    pci(tmp_path, 2, vendor="0x10de", class_="0x030200")
    pci(tmp_path, 3, vendor="0x10de", class_="0x068000")  # an NVSwitch
    pci(tmp_path, 4, vendor="0x1234", class_="0x030000")
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5 2024\nGCC version: 12\n")
    found = read_devices(torch.device("cpu"), 2, tmp_path, driver)
    assert (found.present, found.driver, found.kind) == (2, "550.54.15", "cpu")
    assert found.memory == found.main_memory // 2
    driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build\n")
    assert read_devices(torch.device("cpu"), 2, tmp_path, driver).driver == "570.86.10"
    assert read_devices(torch.device("cpu"), 2, tmp_path, tmp_path / "none").driver == ""


def test_a_gpus_memory_is_the_devices_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 4))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    found = read_devices(torch.device("cuda", 1), 8, tmp_path, tmp_path / "none")
    assert (found.kind, found.name, found.free, found.memory, found.seen) == ("cuda", "H100", 3, 4, 8)


def test_a_node_as_it_should_be_is_ok() -> None:
    assert bad(H100) == []
    assert [(one.name, one.value) for one in check_devices(H100, 8)][:2] == [
        ("devices", "8 × H100"),
        ("NVIDIA driver", "550.54.15"),
    ]
    laptop = replace(H100, kind="cpu", name="EPYC", seen=0, present=0, driver="")
    assert check_devices(laptop, 2)[0].value == "EPYC, no GPU"


def test_gpus_that_torch_does_not_see_are_wrong() -> None:
    (found,) = bad(replace(H100, kind="cpu", seen=0))
    assert found.status == "wrong"
    assert "8 GPUs, of which torch" in found.value
    assert "driver 550.54.15" in found.value
    (found,) = bad(replace(H100, kind="cpu", seen=0, driver=""))
    assert "no NVIDIA driver is loaded" in found.value


def test_fewer_gpus_than_ranks_are_wrong() -> None:
    (found,) = bad(replace(H100, kind="cpu", name="EPYC", seen=4))
    assert (found.value, found.status) == ("4 GPUs that torch sees, for 8 ranks on the node", "wrong")


def test_a_gpu_that_torch_misses_is_a_warning() -> None:
    (found,) = bad(replace(H100, seen=7), local_ranks=7)
    assert (found.value, found.status) == ("7 × H100 of 8 in the node", "warning")


def test_memory_that_another_process_holds_is_a_warning() -> None:
    (found,) = bad(replace(H100, free=40 * GIB))
    assert (found.value, found.status) == ("40.0 GiB free of 80.0 GiB", "warning")
