"""Network of a node: the address of its host name, its interfaces, and those that the environment names."""

import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from longctx.doctor.findings import Finding, Status, few

_BY_PREFIX, _EXACT = ("NCCL_SOCKET_IFNAME",), ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
"""Variables that name interfaces: NCCL's as prefixes, `=` for whole names, `^` for those to leave out."""
_LOOPBACK = "lo"


@dataclass(frozen=True)
class Network:
    """Addresses of a node."""

    host_name: str
    resolved: tuple[str, ...]
    """IP addresses to which the host name resolves here; empty: none."""
    interfaces: Mapping[str, tuple[str, ...]]
    """IP addresses of each interface that is up."""


def read_network() -> Network:
    """Read the addresses of this node."""
    name = socket.gethostname()
    up = {interface for interface, stats in psutil.net_if_stats().items() if stats.isup}
    interfaces = {
        interface: tuple(
            a.address.partition("%")[0] for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6)
        )
        for interface, addresses in psutil.net_if_addrs().items()
        if interface in up
    }
    return Network(name, _resolve(name), interfaces)


def _resolve(name: str) -> tuple[str, ...]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return ()
    return tuple(dict.fromkeys(str(address[0]).partition("%")[0] for *_, address in found))


def check_network(network: Network, environment: Mapping[str, str], nodes: int) -> list[Finding]:
    """Check the addresses of a node, one of `nodes`, and the interfaces that its environment names."""
    return [check_host_name(network, environment, nodes), *_interfaces(network, environment, nodes)]


def check_host_name(network: Network, environment: Mapping[str, str], nodes: int) -> Finding:
    """Check that other nodes can reach this one by the address of its host name.

    torchrun's c10d rendezvous compares that address with the endpoint's to find out which agent is its server; at
    127.0.1.1, Debian's entry in /etc/hosts, all become clients, and wait. gloo listens at it, unless
    GLOO_SOCKET_IFNAME names an interface.
    """
    name, value = "host name", f"{network.host_name} is {few(network.resolved) or 'not resolved'}"
    own = [address for addresses in network.interfaces.values() for address in addresses if _is_reachable(address)]
    suggestion = f" (it has {own[0]})" if own else ""
    # The same text on every node, so that the finding is one line.
    change = (
        "give the node a line 'ADDRESS NAME' in /etc/hosts, or correct the name in DNS, or set GLOO_SOCKET_IFNAME, and "
        "give torchrun --local-addr"
    )
    status: Status = "wrong" if nodes > 1 and "GLOO_SOCKET_IFNAME" not in environment else "warning"
    if not any(_is_reachable(address) for address in network.resolved):
        remedy = f"other nodes cannot reach this one by it, which torchrun and gloo do: {change}"
        return Finding(name, f"{value}{suggestion}", status, remedy)
    if not set(own) & set(network.resolved):
        return Finding(name, f"{value}, of none of its interfaces{suggestion}", "warning", change)
    return Finding(name, value)


def _is_reachable(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return not (parsed.is_loopback or parsed.is_link_local or parsed.is_unspecified)


def _interfaces(network: Network, environment: Mapping[str, str], nodes: int) -> list[Finding]:
    there = ", ".join(interface for interface in network.interfaces if interface != _LOOPBACK) or "none but lo"
    found = []
    for variable in (*_BY_PREFIX, *_EXACT):
        text = environment.get(variable, "")
        if not text or text.startswith("^"):
            continue
        names = text.removeprefix("=").split(",")
        by_prefix = variable in _BY_PREFIX and not text.startswith("=")
        chosen = [one for one in network.interfaces if _matches(one, names, by_prefix)]
        if not chosen:
            remedy = (
                f"no interface of that name is up; this node has {there}: set {variable} to one of them, or unset it"
            )
            found.append(Finding(variable, text, "wrong", remedy))
        elif nodes > 1 and chosen == [_LOOPBACK]:
            remedy = (
                f"it keeps this node's ranks from those of others; this node has {there}: name one of them, or unset it"
            )
            found.append(Finding(variable, text, "wrong", remedy))
    return found


def _matches(interface: str, names: list[str], by_prefix: bool) -> bool:
    return any(interface.startswith(name) if by_prefix else interface == name for name in names)
