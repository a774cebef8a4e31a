"""A function in a process of its own: nothing that ran before it is in its memory, its caches or its threads."""

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class AloneError(RuntimeError):
    """The function raised, or its process died. `reason` is one line, the text the whole traceback."""

    def __init__(self, reason: str, text: str, *, died: bool = False) -> None:
        super().__init__(text)
        self.reason, self.died = reason, died


def _serve(pipe: Connection, threads: int | None, function: Callable[..., object], args: tuple[object, ...]) -> None:
    # Ctrl-C reaches every process of a terminal; the one that asked ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        pipe.send((True, function(*args), ""))
    except Exception as error:  # noqa: BLE001 - told to the caller, who raises it
        reason = traceback.format_exception_only(error)[0].splitlines()[0]
        pipe.send((False, reason, traceback.format_exc()))


def alone(threads: int | None, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`function(*args)` in a new process with so many torch threads (torch's own number where None).

    The function has to be importable by name, its arguments and result to be picklable. Raises AloneError.
    """
    assert not kwargs
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(there, threads, function, args), daemon=True)
    process.start()
    there.close()
    try:
        good, result, text = here.recv()
    except EOFError:
        process.join()
        code = process.exitcode
        reason = f"its process ended with status {code}"
        if code == -signal.SIGKILL:
            reason = "its process was killed, as the system does where memory runs out"
        raise AloneError(reason, reason, died=True) from None
    finally:
        process.kill()
        process.join()
        here.close()
    if not good:
        raise AloneError(result, text)
    return result
