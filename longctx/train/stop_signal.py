"""Stop signals that come before anybody listens to them: noted while a process starts, and handed over.

SIGTERM ends a process that does not listen yet, as while torch is imported. A rank of Slurm's must not end so: srun
sends SIGTERM also to the ranks that are left when one has failed, so that neither the signal nor the job's status tells
a failure from a preemption. A rank that notes the signal meets the others: they stop together, or fail together.

Imports nothing heavy: this comes first.
"""

import signal
from types import FrameType
from typing import Any

_STOP = signal.SIGTERM


class NotedSignal:
    """Handler that only notes a signal."""

    number = 0
    """The signal that came; 0 if none has."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note it."""
        self.number = number


def hold_stop() -> None:
    """Hold SIGTERM back from now on, in the program too that takes this one's place (exec)."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [_STOP])


def note_stop() -> None:
    """Note SIGTERM from now on, and one that was held back. One that is ignored stays ignored."""
    if signal.getsignal(_STOP) == signal.SIG_DFL:
        signal.signal(_STOP, NotedSignal())
    release_stop()


def release_stop() -> None:
    """Hold SIGTERM back no more."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [_STOP])


def listen(number: int, handler: Any) -> int:
    """Set the handler of a signal; return the signal if it was noted before, else 0. One that is ignored stays so."""
    if signal.getsignal(number) == signal.SIG_IGN:
        return 0
    before = signal.signal(number, handler)
    return before.number if isinstance(before, NotedSignal) else 0
