"""What the ranks of the tests' jobs do in place of training; no torch, so that they start at once."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from longctx.errors import UserError
from longctx.health.beat import FOLDER, Beat, FolderBoard

RANK = int(os.environ["RANK"])
LOCAL_RANK = int(os.environ["LOCAL_RANK"])
LONG = 60.0


PEER_LOST = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer."
"""What a collective says when another rank is gone."""


def _ready(folder: str) -> None:
    draft = Path(folder, f"draft-{RANK}")
    draft.write_text(str(os.getpid()))
    draft.replace(Path(folder, f"ready-{RANK}"))


def _wait_for(folder: str, name: str) -> None:
    while not Path(folder, name).exists():
        time.sleep(0.005)


def describe(folder: str) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
    Path(folder, f"rank-{RANK}.txt").write_text(" ".join(os.environ[name] for name in names))


def talk(folder: str) -> None:
    sys.stdout.write(f"stdout of {RANK}, a terminal: {sys.stdout.isatty()}\n")
    sys.stderr.write(f"stderr of {RANK}\n")


def user_error(folder: str) -> None:
    raise UserError(f"data.path: there is no such directory [as rank {RANK} sees it]")


def user_error_on_1(folder: str) -> None:
    if RANK == 1:
        raise UserError("only here")
    time.sleep(LONG)


def crash_on_1(folder: str) -> None:
    """Rank 1 fails, and rank 0 because of that, which is noted first: rank 1 still closes what it had open."""
    if LOCAL_RANK == 0:
        _wait_for(folder, "crashed")
        raise RuntimeError(PEER_LOST)
    try:
        raise KeyError("the cause")
    finally:
        Path(folder, "crashed").touch()
        time.sleep(0.3)


def crash_on_both(folder: str) -> None:
    """Rank 1 fails first, but is kept by a thread that never ends."""
    if RANK == 0:
        _wait_for(folder, "crashed")
        time.sleep(0.2)
        raise IndexError("later")
    threading.Thread(target=time.sleep, args=(LONG,)).start()
    Path(folder, "crashed").touch()
    raise KeyError("the cause")


def end_itself_on_1(folder: str) -> None:
    """Rank 1 says why and ends its process, as the monitor of a rank does."""
    if RANK == 1:
        sys.stderr.write("error: step 3: it has waited for 9 s.\nmore\n")
        sys.stderr.flush()
        os._exit(1)
    time.sleep(LONG)


def exit_3_on_1(folder: str) -> None:
    if RANK == 1:
        sys.exit(3)
    time.sleep(LONG)


def hang(folder: str) -> None:
    _ready(folder)
    time.sleep(LONG)


def stop_reporting_on_1(folder: str) -> None:
    """Rank 1 reports once, as if it were stopped then; rank 0 waits for it, and writes its stacks when it is asked."""
    board = FolderBoard(Path(os.environ[FOLDER]))
    beat = Beat(0, "node1", os.getpid(), "step 7", 0.0, 60.0, 0.5, "", 0.0, "longctx.model.ffn:128 in forward")
    began = time.monotonic()
    for number in range(int(LONG / 0.05)):
        waited = time.monotonic() - began
        board.post(RANK, replace(beat, number=number, collective="barrier" * (RANK == 0), waited=waited))
        if RANK == 1:
            time.sleep(LONG)
        if board.is_hang_declared():
            Path(folder, "logs", "rank-0.stacks").touch()
        time.sleep(0.05)


def lose_peer(folder: str) -> None:
    """Rank 1 waits to be killed; rank 0 fails once it has been."""
    _ready(folder)
    if RANK == 1:
        time.sleep(LONG)
    _wait_for(folder, "ready-1")
    peer = Path("/proc", Path(folder, "ready-1").read_text(), "status")
    while peer.exists() and "zombie" not in peer.read_text():
        time.sleep(0.001)
    raise RuntimeError(PEER_LOST)


def save_at_sigterm(folder: str) -> None:
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    helper = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({LONG})"])
    _ready(folder)
    while not stopping:
        time.sleep(0.01)
    time.sleep(0.3)
    if helper.poll() is not None:
        raise RuntimeError("what the rank needs to save was stopped before it")
    Path(folder, f"saved-{RANK}").touch()


def fail_at_sigterm(folder: str) -> None:
    def fail(number: int, frame: object) -> None:
        raise OSError("no space left")

    signal.signal(signal.SIGTERM, fail)
    _ready(folder)
    time.sleep(LONG)


def ignore_sigterm(folder: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _ready(folder)
    time.sleep(LONG)


def leave_a_child(folder: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({LONG})"])
    Path(folder, f"child-{RANK}").write_text(str(child.pid))


def stop_as_one(folder: str) -> int:
    """All ranks have saved and stopped because rank 1 got SIGTERM; they end one after the other."""
    time.sleep(0.2 * RANK)
    return 128 + signal.SIGTERM
