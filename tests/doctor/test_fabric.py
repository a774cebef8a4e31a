"""Adapters: what sysfs says of them, and whether NCCL uses them."""

from dataclasses import replace
from pathlib import Path

from longctx.doctor.fabric import Fabric, Port, check_fabric, check_use, read_fabric
from tests.doctor.test_devices import pci

UP = Port("mlx5_0", "mlx5_core", "ACTIVE", 400.0, "InfiniBand")


def port(system: Path, device: str, driver: str, **attributes: str) -> None:
    folder = system / "class/infiniband" / device / "ports/1"
    folder.mkdir(parents=True)
    for name, value in attributes.items():
        (folder / name).write_text(value + "\n")
    target = system / "bus/pci/drivers" / driver
    target.mkdir(parents=True, exist_ok=True)
    (system / "class/infiniband" / device / "device").mkdir()
    (system / "class/infiniband" / device / "device/driver").symlink_to(target)


def test_ports_and_efa_devices_are_read(tmp_path: Path) -> None:
    port(tmp_path, "mlx5_0", "mlx5_core", state="4: ACTIVE", rate="400 Gb/sec (4X NDR)", link_layer="InfiniBand")
    port(tmp_path, "mlx5_1", "mlx5_core", state="1: DOWN", rate="2.5 Gb/sec (1X SDR)", link_layer="Ethernet")
    pci(tmp_path, 1, vendor="0x1d0f", device="0xefa2")
    pci(tmp_path, 2, vendor="0x1d0f", device="0xec20")
    down = Port("mlx5_1", "mlx5_core", "DOWN", 2.5, "Ethernet")
    found = read_fabric(tmp_path)
    assert found == Fabric((UP, down), efa=1)
    assert found.bandwidth == 50e9


def test_no_adapter_is_ok() -> None:
    (found,) = check_fabric(Fabric((), 0), 2)
    assert (found.value, found.status) == ("none", "ok")


def test_active_ports_are_counted() -> None:
    (found,) = check_fabric(Fabric((UP, replace(UP, device="mlx5_1")), 0), 2)
    assert (found.value, found.status) == ("2 × InfiniBand 400 Gbit/s", "ok")
    efa = Port("rdmap0", "efa", "ACTIVE", 100.0, "Unspecified")
    (found,) = check_fabric(Fabric((efa,), 1), 2)
    assert (found.value, found.status) == ("1 × EFA 100 Gbit/s", "ok")


def test_ports_that_are_down_are_named() -> None:
    down = replace(UP, device="mlx5_7", state="DOWN")
    (found,) = check_fabric(Fabric((UP, down), 0), 2)
    assert (found.value, found.status) == ("1 × InfiniBand 400 Gbit/s; not active: mlx5_7", "warning")
    (found,) = check_fabric(Fabric((down,), 0), 2)
    assert (found.value, found.status) == ("no active port", "wrong")
    (found,) = check_fabric(Fabric((down,), 0), 1)
    assert found.status == "warning", "one node does without"


def test_efa_without_its_driver_is_wrong() -> None:
    (found,) = check_fabric(Fabric((), 4), 1)
    assert (found.value, found.status) == ("4 EFA devices, 0 with a driver", "wrong")


def test_collectives_far_below_the_adapters_rate_are_wrong() -> None:
    assert check_use(50e9, 30e9).status == "ok"
    found = check_use(50e9, 1.1e9)
    assert (found.value, found.status) == ("1.1 GB/s per node, of 50 GB/s of its adapters", "wrong")
    assert "NCCL_DEBUG_SUBSYS=INIT,NET" in found.remedy
