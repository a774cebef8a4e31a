"""Fast network adapters of a node: InfiniBand, RoCE and EFA, their ports' state and rate."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from longctx.doctor.devices import SYSTEM, attribute, pci_devices
from longctx.doctor.findings import Finding
from longctx.doctor.units import rate

_AMAZON, _EFA = "0x1d0f", "0xefa"
_LEAST_USE = 0.3
"""Share of the adapters' rate below which the network is taken to be another one."""


@dataclass(frozen=True)
class Port:
    """A port of an adapter."""

    device: str
    driver: str
    """`mlx5_core`, `efa`; empty: unknown."""
    state: str
    """`ACTIVE`, `DOWN`, …"""
    gbit: float
    """Gbit/s; 0: unknown."""
    layer: str
    """`InfiniBand`, or `Ethernet` for RoCE; EFA's is unspecified."""


@dataclass(frozen=True)
class Fabric:
    """Adapters of a node."""

    ports: tuple[Port, ...]
    efa: int
    """EFA devices on the PCI bus, with or without a driver."""

    @property
    def is_there(self) -> bool:
        """Whether the node has an adapter."""
        return bool(self.ports) or self.efa > 0

    @property
    def bandwidth(self) -> float:
        """Bytes per second of all active ports."""
        return sum(port.gbit for port in self.ports if port.state == "ACTIVE") * 1e9 / 8


def read_fabric(system: Path = SYSTEM) -> Fabric:
    """Read the adapters of this node from sysfs."""
    ports = [
        _read_port(device, port)
        for device in sorted((system / "class/infiniband").glob("*"))
        for port in sorted((device / "ports").glob("*"))
    ]
    efa = sum(
        attribute(folder, "vendor") == _AMAZON and attribute(folder, "device").startswith(_EFA)
        for folder in pci_devices(system)
    )
    return Fabric(tuple(ports), efa)


def _read_port(device: Path, port: Path) -> Port:
    driver = device / "device" / "driver"
    speed = re.match(r"([\d.]+) Gb/sec", attribute(port, "rate"))
    return Port(
        device=device.name,
        driver=driver.resolve().name if driver.exists() else "",
        state=attribute(port, "state").rpartition(":")[2].strip(),
        gbit=float(speed[1]) if speed else 0.0,
        layer=attribute(port, "link_layer"),
    )


def check_fabric(fabric: Fabric, nodes: int) -> list[Finding]:
    """Check the adapters of a node, one of `nodes`."""
    name = "InfiniBand, EFA"
    if not fabric.is_there:
        return [Finding(name, "none")]
    with_driver = sum(port.driver == "efa" for port in fabric.ports)
    found = []
    if with_driver < fabric.efa:
        found.append(
            Finding(
                name,
                f"{fabric.efa} EFA devices, {with_driver} with a driver",
                "wrong",
                "install AWS's EFA driver on the host (efa_installer.sh), and give a container /dev/infiniband",
            )
        )
    if not fabric.ports:
        return found
    active = [port for port in fabric.ports if port.state == "ACTIVE"]
    down = [port.device for port in fabric.ports if port.state != "ACTIVE"]
    value = (
        ", ".join(f"{count} × {text}" for text, count in Counter(map(_describe, active)).items()) or "no active port"
    )
    if not active:
        remedy = f"no port is active ({', '.join(down)}): see ibstat, cables, and the subnet manager"
        return [*found, Finding(name, value, "wrong" if nodes > 1 else "warning", remedy)]
    if down:
        remedy = "ibstat shows their state; if they are not meant to be used, leave them out: NCCL_IB_HCA=^…"
        return [*found, Finding(name, f"{value}; not active: {', '.join(down)}", "warning", remedy)]
    return [*found, Finding(name, value)]


def _describe(port: Port) -> str:
    kind = "EFA" if port.driver == "efa" else "RoCE" if port.layer == "Ethernet" else "InfiniBand"
    return f"{kind} {port.gbit:g} Gbit/s"


def check_use(adapters: float, measured: float) -> Finding:
    """Check that NCCL uses the adapters: `measured` bytes per second that a node receives, of their `adapters`."""
    value = f"{rate(measured)} per node, of {rate(adapters)} of its adapters"
    if measured >= _LEAST_USE * adapters:
        return Finding("use of adapters", value)
    return Finding(
        "use of adapters",
        value,
        "wrong",
        "NCCL may use TCP instead: NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET longctx doctor prints which network it "
        "chose; install its plugin (EFA: aws-ofi-nccl), set NCCL_IB_HCA, and NCCL_NET_GDR_LEVEL for GPUDirect",
    )
