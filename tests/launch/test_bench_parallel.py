"""`longctx bench parallel`: its table and file, hosts that come and go, and what it refuses."""

import json
import os
import shutil
import subprocess

import pytest
from typer.testing import CliRunner

from longctx.bench.layers import METHODS
from longctx.errors import UserError
from longctx.launch import hosts
from longctx.launch import main as commands

SMALL = ("--ranks", "2", "--lengths", "64,96", "--heads", "2", "--kv-heads", "2", "--head-dim", "8", "--repeats", "1")
can_link = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None, reason="takes root and iproute2"
)


def invoke(*arguments):
    """Exit status, stdout, stderr."""
    result = CliRunner().invoke(commands.app, ["bench", "parallel", *arguments])
    if isinstance(result.exception, UserError):
        return 2, result.stdout, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def left_behind():
    listed = [
        subprocess.run(["ip", *what], capture_output=True, text=True, check=True).stdout
        for what in (["netns"], ["link"])
    ]
    return [line for text in listed for line in text.splitlines() if "lcx" in line]


def test_every_method_is_measured_and_receives_what_its_formula_says(tmp_path):
    file = tmp_path / "out.json"
    status, out, told = invoke(*SMALL, "--gbit", "none", "--softmax-tokens", "64", "--json", str(file))
    assert status == 0, told
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    names = [(result["task"]["tokens"], result["task"]["method"]) for result in results]
    assert names == [(64, name) for name in METHODS] + [(96, "lasp2"), (96, "lasp1")]
    for result in results:
        assert result["received"] == result["least"]
        assert 0 < result["waited"] <= result["seconds"] == result["times"][0]
        assert METHODS[result["task"]["method"]].title in out


@can_link
def test_ranks_on_hosts_of_their_own_measure_the_same_bytes_and_leave_nothing(tmp_path):
    file = tmp_path / "out.json"
    status, _, told = invoke(*SMALL, "--only", "lasp2", "--gbit", "0.5", "--json", str(file))
    assert status == 0, told
    assert all(each["received"] == each["least"] for each in json.loads(file.read_text(encoding="utf-8"))["results"])
    assert left_behind() == []


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


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--only", "star"), "--only star: unknown method; the methods are lasp2, lasp1"),
        (("--kv-heads", "3"), "--kv-heads 3: must divide --heads 2"),
        (("--ranks", "4"), "--heads 2: must be a multiple of --ranks 4 for ulysses"),
        (("--gbit", "fast"), "--gbit fast: expected a speed in Gbit/s, or none"),
        (("--lengths", "64,x"), "--lengths"),
        (("--json", "gone/out.json"), "--json gone/out.json: there is no directory gone"),
    ],
)
def test_mistakes_are_named_before_anything_is_started(arguments, text):
    status, _, told = invoke(*SMALL, *arguments)
    assert status == 2
    assert text in told


def test_without_root_links_are_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(hosts.shutil, "which", lambda name: f"/sbin/{name}")
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="need root; run as root, or use --gbit none"):
        hosts.check()
    monkeypatch.setattr(hosts.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="the command ip is missing; install iproute2"):
        hosts.check()
