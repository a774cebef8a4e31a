"""Progress of a preparation on standard error: a bar on a terminal, plain lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from longctx.printable import printable

_LINE_EVERY = 10.0
_NAME = 40


class PreparationProgress:
    """Shows bytes read out of `total`, documents, tokens and tokens per second; shows nothing unless `shown`."""

    def __init__(self, total: int, *, shown: bool, console: Console | None = None) -> None:
        self._total = max(1, total)
        self._shown = shown
        self._console = console or Console(stderr=True)
        self._read = 0.0
        self._started = self._printed = time.monotonic()
        self._bar: Progress | None = None
        if shown and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[counts]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("preparing", total=self._total, counts="")

    def __enter__(self) -> "PreparationProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def announce(self, doing: str) -> None:
        """Say what takes time besides preparing, such as "fetching train-0.parquet"; "": nothing."""
        doing = printable(doing)  # names of files
        if self._bar is not None:
            verb, _, name = doing.partition(" ")
            short = name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"
            self._bar.update(self._task, description=f"{verb} {short}" if doing else "preparing")
        elif doing:
            self._print(doing, time.monotonic(), first=True)

    def update(self, read: float, documents: int, tokens: int) -> None:
        """Report `read` more bytes of input, the documents that have ended, and all tokens so far."""
        self._read += read
        now = time.monotonic()
        rate = tokens / max(now - self._started, 1e-3)
        counts = f"{documents:,} documents, {tokens:,} tokens, {rate / 1e6:.1f} M tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._read, counts=counts)
        else:
            self._print(f"prepared {min(1.0, self._read / self._total):.0%}: {counts}", now)

    def _print(self, line: str, now: float, *, first: bool = False) -> None:
        """Print a line if the last one is `_LINE_EVERY` seconds old; `first`: or if there has been none."""
        if self._shown and (now - self._printed >= _LINE_EVERY or (first and self._printed == self._started)):
            self._printed = now
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
