"""Machines of a run's ranks: whose an address is."""

import socket
from ipaddress import ip_address

import pytest

from longctx.train.machines import Machine, gather_machines, name_peers, this_machine

BRIDGE = "172.17.0.1"
MACHINES = [
    Machine("node0", frozenset({"10.0.0.6", BRIDGE})),
    *[Machine("node1", frozenset({"10.0.0.7", "fe80::7", BRIDGE}))] * 3,
    Machine("node2", frozenset({"10.0.0.8"})),
]


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("10.0.0.8", "rank 4 on node2 (10.0.0.8)"),
        ("10.0.0.7", "one of ranks 1-3 on node1 (10.0.0.7)"),
        ("fe80:0::7", "one of ranks 1-3 on node1 (fe80:0::7)"),
        (BRIDGE, f"a rank at {BRIDGE}"),
        ("10.0.0.9", "a rank at 10.0.0.9"),
    ],
    ids=["one rank", "several", "IPv6", "an address of several machines", "of none"],
)
def test_an_address_is_that_of_ranks_on_one_host_or_stays_an_address(address, named):
    assert name_peers(address, MACHINES) == named


def test_this_machine_has_its_name_and_no_address_that_others_cannot_mean():
    machine = this_machine()
    assert machine.host == socket.gethostname()
    assert not any(ip_address(address).is_loopback for address in machine.addresses)


def test_every_rank_knows_all_machines(ranks):
    assert ranks.run(gather_machines, size=2) == [(this_machine(), this_machine())] * 2
