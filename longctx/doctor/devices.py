"""Devices of a node: GPUs that the kernel sees and that torch sees, their driver and memory; main memory."""

import re
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from longctx.doctor.findings import Finding
from longctx.doctor.units import size
from longctx.system import device_name

SYSTEM = Path("/sys")
DRIVER = Path("/proc/driver/nvidia/version")
_NVIDIA, _DISPLAY = "0x10de", "0x03"
_TAKEN = 0.1


@dataclass(frozen=True)
class Devices:
    """Devices of this node, as a process sees them."""

    kind: str
    """Type of the device that its rank uses, `cpu` or `cuda`."""
    name: str
    """Model of this rank's device."""
    memory: int
    """Bytes of this rank's device: of its GPU; on a CPU, of the node divided by its ranks."""
    free: int
    """Free bytes of the same."""
    main_memory: int
    """Bytes of the node's main memory."""
    seen: int
    """GPUs that torch sees."""
    present: int
    """NVIDIA GPUs on the PCI bus."""
    driver: str
    """Version of the NVIDIA driver; empty: none is loaded."""


def read_devices(device: torch.device, local_ranks: int, system: Path = SYSTEM, driver: Path = DRIVER) -> Devices:
    """Read the devices of this node. `device`: that of this rank, one of `local_ranks` on the node."""
    main = psutil.virtual_memory()
    if device.type == "cuda":
        free, memory = torch.cuda.mem_get_info(device)
    else:
        free, memory = main.available // local_ranks, main.total // local_ranks
    return Devices(
        kind=device.type,
        name=device_name(device),
        memory=memory,
        free=free,
        main_memory=main.total,
        seen=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        present=sum(_is_gpu(folder) for folder in pci_devices(system)),
        driver=_driver_version(driver),
    )


def pci_devices(system: Path) -> list[Path]:
    """Return the folders of the devices on the PCI bus."""
    return sorted((system / "bus/pci/devices").glob("*"))


def attribute(folder: Path, name: str) -> str:
    """Return the text of a file of a device; empty if there is none."""
    try:
        return (folder / name).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _is_gpu(folder: Path) -> bool:
    return attribute(folder, "vendor") == _NVIDIA and attribute(folder, "class").startswith(_DISPLAY)


def _driver_version(file: Path) -> str:
    match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", attribute(file.parent, file.name))
    return match[1] if match else ""


def check_devices(devices: Devices, local_ranks: int) -> list[Finding]:
    """Check the devices of a node with `local_ranks` ranks."""
    found = [_gpus(devices, local_ranks), Finding("main memory", size(devices.main_memory))]
    if devices.driver:
        found.insert(1, Finding("NVIDIA driver", devices.driver))
    if devices.kind == "cuda":
        found.append(_memory(devices))
    return found


def _gpus(devices: Devices, local_ranks: int) -> Finding:
    if devices.seen == 0 and devices.present == 0:
        return Finding("devices", f"{devices.name}, no GPU")
    value = f"{devices.seen} × {devices.name}" if devices.kind == "cuda" else f"{devices.seen} GPUs that torch sees"
    if devices.seen == 0:
        cause = f"driver {devices.driver}" if devices.driver else "no NVIDIA driver is loaded"
        return Finding(
            "devices",
            f"{devices.present} GPUs, of which torch {torch.__version__} sees none ({cause})",
            "wrong",
            "see whether nvidia-smi works here, whether the container has the GPUs (docker run --gpus all), whether "
            "CUDA_VISIBLE_DEVICES is empty, and whether torch is a CUDA build for this driver (torch.version.cuda)",
        )
    if devices.seen < local_ranks:
        return Finding(
            "devices",
            f"{value}, for {local_ranks} ranks on the node",
            "wrong",
            "start one rank per GPU, and ask the scheduler for as many GPUs (Slurm: --gpus-per-node)",
        )
    if 0 < devices.seen < devices.present:
        return Finding(
            "devices",
            f"{value} of {devices.present} in the node",
            "warning",
            "ask the scheduler for all of them, or see CUDA_VISIBLE_DEVICES and nvidia-smi: one may have failed",
        )
    return Finding("devices", value)


def _memory(devices: Devices) -> Finding:
    value = f"{size(devices.free)} free of {size(devices.memory)}"
    if devices.free >= (1 - _TAKEN) * devices.memory:
        return Finding("device memory", value)
    return Finding(
        "device memory",
        value,
        "warning",
        "another process holds the rest: nvidia-smi names it; end it, or go elsewhere",
    )
