"""Machines of a run's ranks, by address: an error of the network names an address, and a person looks for a host."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

import psutil
import torch.distributed as dist

from longctx.health.diagnosis import name_ranks


@dataclass(frozen=True)
class Machine:
    """Where a rank runs."""

    host: str
    addresses: frozenset[str]
    """Those at which other machines may reach it."""


def this_machine() -> Machine:
    """Return the machine of this process."""
    networks = (socket.AF_INET, socket.AF_INET6)
    found = [one.address for each in psutil.net_if_addrs().values() for one in each if one.family in networks]
    # A link-local address has its interface behind it, which an error does not name.
    addresses = frozenset(str(ip_address(text.partition("%")[0])) for text in found)
    return Machine(socket.gethostname(), frozenset(one for one in addresses if not ip_address(one).is_loopback))


def gather_machines() -> tuple[Machine, ...]:
    """Return the machine of each rank, in order. Collective."""
    each: list[Machine] = [Machine("", frozenset())] * dist.get_world_size()
    dist.all_gather_object(each, this_machine())
    return tuple(each)


def name_peers(address: str, machines: Sequence[Machine]) -> str:
    """Return the ranks that may have an address, as `ranks 8-15 on node1 (10.0.0.7)`.

    Where no machine has it, or several do, such as that of a bridge of containers: `a rank at 10.0.0.7`.
    """
    ranks = [rank for rank, machine in enumerate(machines) if str(ip_address(address)) in machine.addresses]
    hosts = {machines[rank].host for rank in ranks}
    if len(hosts) != 1:
        return f"a rank at {address}"
    one_of = "one of " if len(ranks) > 1 else ""
    return f"{one_of}{name_ranks(ranks)} on {hosts.pop()} ({address})"
