"""How ranks find each other: on one machine unseen by others, elsewhere as told, and with a word where they do not."""

import ipaddress
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest

from longctx.errors import UserError
from longctx.launch.local import run_ranks
from longctx.parallel.local_ranks import PRELOADED
from longctx.parallel.one_machine import STORE
from longctx.train.process_group import process_group
from tests.combinations import mostly_slow
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


@pytest.mark.parametrize("interface", mostly_slow([None, "lo,lo"], None))
def test_ranks_of_one_machine_listen_on_loopback_only(outside, tmp_path, monkeypatch, interface):
    if interface:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    assert run_ranks("tests.train.listening:report", {"folder": str(tmp_path)}, ranks=2, logs=tmp_path) == 0
    for rank in range(2):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert found["addresses"]
        assert all(map(is_loopback, found["addresses"])), found
        assert found["interface"] == (interface or "lo")


@pytest.mark.slow
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


# Elsewhere


def job(**environment: object) -> str:
    """The error of a rank of a job of 2 that waits for a second, in a process forked from one that has torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    variables = os.environ | {"WORLD_SIZE": "2"} | {name: str(value) for name, value in environment.items()}
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(join, variables).result()


def join(variables: dict[str, str]) -> str:
    os.environ.clear()
    os.environ.update(variables)
    try:
        with process_group("cpu", 1.0):
            return "joined"
    except UserError as error:
        return str(error)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


SAME = "Start every rank with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE (2), each with its own RANK"


def test_ranks_that_do_not_come_are_told_with_what_to_check(outside):
    port = free_port()
    said = job(RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert said.startswith(f"rank 0 waited 1 s (parallel.timeout) at MASTER_ADDR:MASTER_PORT 127.0.0.1:{port}")
    assert "1/2 clients joined" in said
    assert f"{SAME}, and let no firewall block the port" in said


@pytest.mark.slow
def test_a_rank_0_that_is_not_there_is_told_with_its_address(outside):
    port = free_port()
    said = job(RANK=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert said.startswith(f"rank 1 cannot join at MASTER_ADDR:MASTER_PORT 127.0.0.1:{port} within 1 s")
    assert "a firewall blocks the port" in said
    assert SAME in said


@pytest.mark.parametrize("rank", mostly_slow([0, 1], 1))
def test_a_host_without_an_address_is_named(outside, rank):
    said = job(RANK=rank, MASTER_ADDR="no-such-host.invalid", MASTER_PORT=free_port())
    assert said.startswith(f"rank {rank} cannot find MASTER_ADDR 'no-such-host.invalid' (")
    assert "the IP address of rank 0's machine" in said


@pytest.mark.slow
def test_a_port_that_another_program_has_is_named(outside):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        said = job(RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert said.startswith(f"rank 0 cannot join at MASTER_ADDR:MASTER_PORT 127.0.0.1:{port}")
    assert "another program has it" in said
