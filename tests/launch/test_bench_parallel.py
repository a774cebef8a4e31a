"""`longctx bench parallel`: its table and file, hosts that come and go, and what it refuses."""

import contextlib
import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from typer.testing import CliRunner

from longctx.bench.layers import METHODS
from longctx.errors import UserError
from longctx.launch import main as commands
from tests.e2e.jobs import ROOT
from tests.launch.test_hosts import can_link, left_behind

SMALL = ("--ranks", "2", "--lengths", "64,96", "--heads", "2", "--kv-heads", "2", "--head-dim", "8", "--repeats", "1")


def invoke(*arguments):
    """Exit status, stdout, stderr."""
    result = CliRunner().invoke(commands.app, ["bench", "parallel", *arguments])
    if isinstance(result.exception, UserError):
        return 2, result.stdout, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


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


@pytest.mark.slow
@can_link
def test_ranks_on_hosts_of_their_own_measure_the_same_bytes_and_leave_nothing(tmp_path):
    file = tmp_path / "out.json"
    status, _, told = invoke(*SMALL, "--only", "lasp2", "--gbit", "0.5", "--json", str(file))
    assert status == 0, told
    assert all(each["received"] == each["least"] for each in json.loads(file.read_text(encoding="utf-8"))["results"])
    assert left_behind() == []


@pytest.mark.slow
def test_ranks_end_with_a_benchmark_that_is_killed(tmp_path):
    command = [sys.executable, "-m", "longctx", "bench", "parallel", *SMALL, "--gbit", "none", "--repeats", "1000000"]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    process = psutil.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ranks, end = [], time.monotonic() + 120
    try:
        while len(ranks) < 2:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
            ranks = process.children()
        process.kill()
        process.wait()
        assert psutil.wait_procs(ranks, timeout=60)[1] == []
    finally:
        for each in (process, *ranks):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


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
