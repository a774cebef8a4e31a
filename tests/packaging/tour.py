"""The guided tour of docs/architecture.md as a table: `python -m tests.packaging.tour`."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/architecture.md"


@dataclass(frozen=True)
class Stop:
    """A file to open, and the names in it that the page speaks of, the first of which is what to look for."""

    file: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question, the number of files that the page states, and the files in reading order."""

    text: str
    stated: int
    stops: tuple[Stop, ...]


def questions(page: str) -> list[Question]:
    """Parse `**1. Question?** (3 files)` and the numbered list below each."""
    found = []
    for text, stated, body in re.findall(r"^\*\*\d+\. (.+?)\*\* \((\d+) files\)\n\n((?:.+\n)+)", page, re.MULTILINE):
        items = re.split(r"^\d+\. ", body, flags=re.MULTILINE)[1:]
        stops = []
        for item in items:
            file, *names = re.findall(r"`([^`]+)`", item)
            stops.append(Stop(file, tuple(name for name in names if re.fullmatch(r"[A-Za-z_.]+", name))))
        found.append(Question(text, int(stated), tuple(stops)))
    return found


def table() -> str:
    """A line per question: files to open, and which."""
    rows = [(str(len(q.stops)), q.text, ", ".join(stop.file for stop in q.stops)) for q in questions(PAGE.read_text())]
    width = max(len(text) for _, text, _ in rows)
    return "\n".join(f"{count} files  {text:{width}}  {files}" for count, text, files in rows)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
