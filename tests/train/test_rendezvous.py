"""How ranks find each other: on one machine unseen by others."""

import ipaddress
import json
import os
import subprocess
import sys

import pytest

from longctx.launch.local import run_ranks
from longctx.parallel.one_machine import STORE
from longctx.train.process_group import process_group
from tests.e2e.jobs import ROOT
from tests.train.listening import use_groups

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", STORE)


@pytest.fixture
def outside(monkeypatch):
    """A process that is no rank of anything."""
    for name in (*TORCHRUN, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


# On one machine


@pytest.mark.parametrize("interface", [None, "lo,lo"])
def test_ranks_of_one_machine_listen_on_loopback_only(outside, tmp_path, monkeypatch, interface):
    if interface:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    assert run_ranks("tests.train.listening:report", {"folder": str(tmp_path)}, ranks=2, logs=tmp_path) == 0
    for rank in range(2):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert found["addresses"]
        assert all(map(is_loopback, found["addresses"])), found
        assert found["interface"] == (interface or "lo")


def test_a_rank_alone_listens_on_loopback_only(outside):
    code = "import os; from longctx.train.process_group import process_group\n"
    code += "from tests.train.listening import use_groups\n"
    code += "with process_group('cpu', 60.0): print(*use_groups(), os.environ['GLOO_SOCKET_IFNAME'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *addresses, interface = done.stdout.split()
    assert addresses
    assert all(map(is_loopback, addresses))
    assert interface == "lo"


def test_a_rank_alone_leaves_the_environment_as_it_was(outside):
    before = dict(os.environ)
    with process_group("cpu", 60.0):
        assert os.environ["WORLD_SIZE"] == "1"
    assert os.environ == before


def test_pools_of_local_ranks_listen_on_loopback_only(ranks):
    for found in ranks.run(use_groups, size=2):
        assert found
        assert all(map(is_loopback, found))
