"""Hosts of their own for ranks: network namespaces with links of a given speed."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from longctx.errors import UserError
from longctx.launch import hosts
from tests.e2e.jobs import ROOT

can_link = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None, reason="takes root and iproute2"
)


def left_behind():
    listed = [
        subprocess.run(["ip", *what], capture_output=True, text=True, check=True).stdout
        for what in (["netns"], ["link"])
    ]
    return [line for text in listed for line in text.splitlines() if "lcx" in line]


@can_link
def test_a_link_has_the_speed_that_was_asked_for():
    script = "import socket,sys,time\n"
    receive = script + (
        f"s=socket.create_server(('{hosts.address(0)}',5000));c,_=s.accept();n=0;t=None\n"
        "while (b:=c.recv(1<<20)):\n t=t or time.time();n+=len(b)\n"
        "print(8*n/(time.time()-t)/1e9)"
    )
    send = script + (
        "time.sleep(0.5)\n"
        f"c=socket.create_connection(('{hosts.address(0)}',5000));c.sendall(bytes(12_500_000));c.close()"
    )
    with hosts.hosts(2, 0.1) as (first, second):
        receiver = subprocess.Popen([*first, "python3", "-c", receive], stdout=subprocess.PIPE, text=True)
        subprocess.run([*second, "python3", "-c", send], check=True, timeout=60)
        got = float(receiver.communicate(timeout=60)[0])
    assert 0.05 < got <= 0.11
    assert left_behind() == []


@can_link
def test_what_fails_half_way_leaves_nothing(monkeypatch):
    monkeypatch.setattr(hosts, "_shape", lambda *args: hosts._run("ip", "no-such-thing"))
    with pytest.raises(UserError, match="ip no-such-thing"), hosts.hosts(2, 1.0):
        pass
    assert left_behind() == []


def start(code):
    """A process with a host, which says so."""
    body = "import os, signal, sys; from longctx.launch.hosts import hosts\n"
    body += f"with hosts(1, 1.0):\n    print('there', flush=True)\n    {code}"
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(
        [sys.executable, "-c", body], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, **streams
    )
    assert process.stdout.readline() == "there\n"
    return process


@can_link
def test_the_hosts_of_a_killed_process_are_removed_by_the_next_and_those_of_a_live_one_stay():
    live = start("sys.stdin.read()")
    of_the_live = names()
    assert len(of_the_live) == 3  # a namespace, a link and a bridge
    start("os.kill(os.getpid(), signal.SIGKILL)").wait(timeout=60)
    assert len(names()) == 6
    with hosts.hosts(1, 1.0):
        assert len(names()) == 6
        assert of_the_live < names()
    assert names() == of_the_live
    live.communicate("", timeout=60)
    assert left_behind() == []


def names():
    return {re.search(r"lcx\w+", line)[0] for line in left_behind()}


def test_without_root_links_are_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(hosts.shutil, "which", lambda name: f"/sbin/{name}")
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="need root; run as root, or use --gbit none"):
        hosts.check()
    monkeypatch.setattr(hosts.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="the command ip is missing; install iproute2"):
        hosts.check()
