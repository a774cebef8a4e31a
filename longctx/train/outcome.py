"""Outcome of a run, for the script of its job: a file says that a signal stopped it, and that it can go on.

The exit status of a job of many ranks does not: schedulers kill the others when one fails, so that a job whose first
rank failed may end with the status of a signal.
"""

from pathlib import Path

STOPPED = "stopped"
"""File in the run directory: a signal stopped the run before its last step; it goes on when it is started again."""


def clear_outcome(out: Path) -> None:
    """Forget how the start before ended."""
    (out / STOPPED).unlink(missing_ok=True)


def mark_stopped(out: Path, when: str) -> None:
    """Say that a signal stopped the run, and when: `after step 12`. The checkpoints in `out` are complete."""
    (out / STOPPED).write_text(f"{when}\n", encoding="utf-8")
