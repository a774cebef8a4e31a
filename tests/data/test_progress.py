"""A bar on a terminal, plain lines elsewhere, nothing when not asked for."""

import io
from functools import partial
from itertools import count

import pytest
from rich.console import Console

from longctx.data import progress
from longctx.data.progress import PreparationProgress


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, shown: bool = True) -> str:
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with PreparationProgress(1000, shown=shown, console=console) as bar:
        for step in range(1, 5):
            bar.update(200, step, step * 12_000_000)
    return console.file.getvalue()


def test_plain_lines_every_ten_seconds(monkeypatch):
    assert shown(monkeypatch, terminal=False).splitlines() == [
        "prepared 40%: 2 documents, 24,000,000 tokens, 2.0 M tokens/s",
        "prepared 80%: 4 documents, 48,000,000 tokens, 2.0 M tokens/s",
    ]


def test_a_bar_on_a_terminal(monkeypatch):
    text = shown(monkeypatch, terminal=True)
    assert "80%" in text
    assert "4 documents, 48,000,000 tokens" in text


def test_nothing_when_not_asked_for(monkeypatch):
    assert shown(monkeypatch, terminal=True, shown=False) == ""
    assert shown(monkeypatch, terminal=False, shown=False) == ""


def test_what_takes_time_besides_preparing_is_said(monkeypatch):
    """Names are those of files: shown, not obeyed, and cut before they take the place of the bar."""
    monkeypatch.setattr(progress.time, "monotonic", partial(next, count()))
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
        with PreparationProgress(1000, shown=True, console=console) as bar:
            bar.announce("fetching [bold]\x07.jsonl")
            bar.announce("writing " + "d/" * 50 + "name")
            bar.announce("")
            bar.update(1000, 1, 1)
        text = console.file.getvalue()
        assert "\x07" not in text
        if terminal:
            assert "preparing" in text
            assert "d/" * 30 not in text
        else:
            assert text == "fetching [bold]\\x07.jsonl\n"
