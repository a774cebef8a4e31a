"""Isolated measurement: runs a function in a new process, with fresh memory, caches and threads."""

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class IsolatedProcessError(RuntimeError):
    """The function raised, or its process died. `reason` is one line; the message is the full traceback."""

    def __init__(self, reason: str, text: str, *, died: bool = False) -> None:
        super().__init__(text)
        self.reason, self.died = reason, died


def _serve(pipe: Connection, threads: int | None, function: Callable[..., object], args: tuple[object, ...]) -> None:
    # Ctrl-C reaches every process of the terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        pipe.send((True, function(*args), ""))
    except Exception as error:  # noqa: BLE001 - sent to the parent, which raises it
        reason = traceback.format_exception_only(error)[0].splitlines()[0]
        pipe.send((False, reason, traceback.format_exc()))


def run_isolated(threads: int | None, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `function(*args)` in a new process with `threads` torch threads (None: torch's default).

    The function must be importable by name, its arguments and result picklable. Raises IsolatedProcessError.
    """
    assert not kwargs
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, threads, function, args), daemon=True)
    process.start()
    sender.close()
    try:
        succeeded, result, text = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode
        reason = f"its process ended with status {code}"
        if code == -signal.SIGKILL:
            reason = "its process was killed, probably for running out of memory"
        raise IsolatedProcessError(reason, reason, died=True) from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if not succeeded:
        raise IsolatedProcessError(result, text)
    return result
