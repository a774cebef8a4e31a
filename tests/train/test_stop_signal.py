"""SIGTERM before anybody listens: held back, noted, and handed over, in processes of their own."""

import os
import signal
import subprocess
import sys

import pytest

NOTED = """
import os, signal, sys
from longctx.train.stop_signal import hold_stop, listen, note_stop, release_stop
def come(): os.kill(os.getpid(), signal.SIGTERM)
heard = []
def handler(number, frame): heard.append(number)
"""


def run(code: str, **options) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", NOTED + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("note_stop(); come(); print(listen(signal.SIGTERM, handler), heard)", "15 []"),
        ("note_stop(); print(listen(signal.SIGTERM, handler)); come(); print(heard)", "0\n[15]"),
        ("hold_stop(); come(); note_stop(); print(listen(signal.SIGTERM, handler))", "15"),
        ("print(listen(signal.SIGTERM, handler)); come(); print(heard)", "0\n[15]"),
    ],
    ids=["noted", "after it was listened to", "held back and noted", "never noted"],
)
def test_a_signal_is_not_lost(code, printed):
    done = run(code)
    assert (done.stdout, done.returncode) == (f"{printed}\n", 0), done.stderr


def test_it_is_held_back_until_it_may_end_the_process():
    done = run("hold_stop(); come(); print('held', flush=True); release_stop(); print('not reached')")
    assert (done.stdout, done.returncode) == ("held\n", -signal.SIGTERM)


def test_it_is_held_back_for_the_program_that_takes_this_ones_place():
    then = NOTED + "note_stop(); print(listen(signal.SIGTERM, handler))"
    done = run(f"hold_stop(); come(); os.execv(sys.executable, [sys.executable, '-c', {then!r}])")
    assert (done.stdout, done.returncode) == ("15\n", 0), done.stderr


def test_one_that_is_ignored_stays_ignored():
    code = "note_stop(); come(); print(listen(signal.SIGTERM, handler), signal.getsignal(signal.SIGTERM))"
    done = run(code, preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), env=os.environ.copy())
    assert done.stdout == "0 1\n", done.stderr
