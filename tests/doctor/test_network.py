"""Network: names that other nodes can reach, and interfaces that exist."""

import socket

import pytest

from longctx.doctor.network import Network, check_host_name, check_network, read_network

GOOD = Network("gpu-1", ("10.0.0.5",), {"lo": ("127.0.0.1",), "eth0": ("10.0.0.5",), "ib0": ("10.1.0.5",)})


def test_the_network_is_that_of_this_machine() -> None:
    found = read_network()
    assert found.host_name == socket.gethostname()
    assert "127.0.0.1" in found.interfaces["lo"]


def test_an_unknown_name_resolves_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    assert read_network().resolved == ()


def test_an_address_of_the_node_is_ok() -> None:
    assert check_host_name(GOOD, {}, 2).status == "ok"
    assert check_host_name(Network("a", ("fe80::1", "10.1.0.5"), GOOD.interfaces), {}, 2).status == "ok"


@pytest.mark.parametrize("addresses", [("127.0.1.1",), (), ("169.254.3.4", "::1")])
def test_a_name_that_others_cannot_reach_is_wrong_between_nodes(addresses: tuple[str, ...]) -> None:
    network = Network("gpu-1", addresses, GOOD.interfaces)
    found = check_host_name(network, {}, 2)
    assert found.status == "wrong"
    assert "/etc/hosts" in found.remedy
    assert found.value == f"gpu-1 is {', '.join(addresses) or 'not resolved'} (it has 10.0.0.5)"
    other = check_host_name(Network("gpu-2", (), {"eth0": ("10.0.0.6",)}), {}, 2)
    assert other.remedy == found.remedy, "one line for many nodes"
    assert check_host_name(network, {}, 1).status == "warning", "for a later job of several nodes"
    assert check_host_name(network, {"GLOO_SOCKET_IFNAME": "eth0"}, 2).status == "warning", "gloo does not use it"


def test_an_address_of_another_machine_is_a_warning() -> None:
    found = check_host_name(Network("gpu-1", ("10.9.9.9",), GOOD.interfaces), {}, 2)
    assert (found.value, found.status) == (
        "gpu-1 is 10.9.9.9, of none of its interfaces (it has 10.0.0.5)",
        "warning",
    )


@pytest.mark.parametrize(
    ("variable", "value", "nodes", "is_wrong"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", 2, False),
        ("GLOO_SOCKET_IFNAME", "eth1", 1, True),
        ("GLOO_SOCKET_IFNAME", "eth", 1, True),
        ("NCCL_SOCKET_IFNAME", "eth", 2, False),
        ("NCCL_SOCKET_IFNAME", "=eth", 2, True),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", 2, False),
        ("NCCL_SOCKET_IFNAME", "ens,ib", 2, False),
        ("GLOO_SOCKET_IFNAME", "lo", 1, False),
        ("GLOO_SOCKET_IFNAME", "lo", 2, True),
        ("NCCL_SOCKET_IFNAME", "=lo", 2, True),
    ],
)
def test_interfaces_that_variables_name(variable: str, value: str, nodes: int, is_wrong: bool) -> None:
    name, *found = check_network(GOOD, {variable: value}, nodes)
    assert name.name == "host name"
    assert [(one.name, one.value, one.status) for one in found] == [(variable, value, "wrong")] * is_wrong
    assert all("eth0, ib0" in one.remedy for one in found)
