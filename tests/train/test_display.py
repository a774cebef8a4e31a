"""What a person reads during a run: a panel that fits the terminal, or lines that fit a log."""

import io
import math
from dataclasses import replace
from datetime import datetime
from itertools import pairwise

import pytest
from rich.cells import cell_len
from rich.console import Console

from longctx.engines.metrics import EvaluationMetrics, PositionLoss, RunInfo, StepMetrics, WaitMetrics
from longctx.train.display import (
    LiveDisplay,
    PlainDisplay,
    human_bytes,
    human_count,
    human_duration,
    human_flops,
    human_position,
    make_display,
    sparkline,
)

RUN = RunInfo(
    12_345_678,
    2,
    {"dp_shard": 1, "cp": 2},
    "AMD [EPYC]",
    "fp32",
    7e7,
    178e9,
    {},
    name="mine",
    directory="runs/mine",
    sequence_length=2**20,
    tokens_per_step=2**22,
)
NOW = datetime(2026, 12, 30, 12)


def step(number: int, steps: int = 200, loss: float = 2.1234) -> StepMetrics:
    return StepMetrics(
        step=number,
        steps=steps,
        loss=loss,
        lr=3e-4,
        grad_norm=0.8123,
        tokens=65536 * number,
        tokens_per_second=1.234e6,
        utilisation=0.43,
        memory_bytes=int(3.4 * 2**30),
        seconds=0.5,
        seconds_left=130.0,
    )


def evaluation(number: int, context: int = 2**16) -> EvaluationMetrics:
    edges = [0, *(2**i for i in range(context.bit_length()))]
    buckets = [PositionLoss(lo, hi, 4 - i / 10, 8 * hi) for i, (lo, hi) in enumerate(pairwise(edges))]
    return EvaluationMetrics(number, 2.3456, tuple(buckets))


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def plain() -> tuple[PlainDisplay, io.StringIO, Clock]:
    file, clock = io.StringIO(), Clock()
    return PlainDisplay(Console(file=file, width=80), interval=5.0, clock=clock, now=lambda: NOW), file, clock


def panel(display: LiveDisplay, width: int = 80, height: int = 24) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, record=True)
    console.print(display.render(width, height))
    return console.export_text().splitlines()


def live(clock: Clock | None = None) -> LiveDisplay:
    display = LiveDisplay(Console(file=io.StringIO(), force_terminal=True, width=80), clock or Clock(), lambda: NOW)
    display.start(RUN)
    return display


def test_plain_lines_name_every_number() -> None:
    display, file, _ = plain()
    display.start(RUN)
    display.step(step(140))
    assert file.getvalue().splitlines() == [
        "mine: 12.3M parameters, fp32 · sequences of 1Mi tokens, 4Mi tokens per step · runs/mine",
        "2 ranks (cp 2) on AMD [EPYC] · 178 GFLOP/s matmul rate",
        "step 140/200  loss 2.1234  lr 3.00e-04  grad norm 0.812  1.2M tok/s  43% MFU  3.4 GiB  2m10s left",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (86_399.0, "23h59m left"),
        (187_200.0, "2d04h left (2027-01-01 16:00)"),
        (1e15, "11574074074d01h left"),
    ],
)
def test_an_end_more_than_a_day_away_has_a_date(seconds, words):
    display, file, _ = plain()
    display.step(replace(step(140), seconds_left=seconds))
    assert file.getvalue().endswith(f"3.4 GiB  {words}\n")
    drawn = live()
    drawn.step(replace(step(140), seconds_left=seconds))
    assert any(f" · {words} " in line for line in panel(drawn, width=92))
    assert not any("2027" in line for line in panel(drawn, width=50))
    drawn.close()


def test_a_message_after_the_end_is_the_last_line() -> None:
    display, file, _ = plain()
    display.step(step(1))
    display.step(step(2))
    display.close()
    display.message("Stopped")
    display.close()
    assert [line.split()[0:2] for line in file.getvalue().splitlines()] == [
        ["step", "1/200"],
        ["step", "2/200"],
        ["Stopped"],
    ]
    terminal = Terminal()
    drawn = LiveDisplay(Console(file=terminal, force_terminal=True, width=80, height=24), Clock())
    drawn.start(RUN)
    drawn.step(step(2))
    drawn.close()
    drawn.message("Stopped")
    drawn.close()
    assert terminal.getvalue().endswith("Stopped\n")


def test_a_straggler_is_shown_and_balanced_ranks_are_not() -> None:
    for waits, shown in ((WaitMetrics(0.42, 0.02, 3), True), (WaitMetrics(0.42, 0.35, 3), False)):
        display, file, _ = plain()
        display.step(replace(step(140), waits=waits))
        assert ("3.4 GiB  42% waiting for rank 3  2m10s left" in file.getvalue()) == shown
        drawn = live()
        drawn.step(replace(step(140), waits=waits))
        assert any("waiting" in line and "42% for rank 3" in line for line in panel(drawn)) == shown
        drawn.close()


@pytest.mark.parametrize("kind", [PlainDisplay, LiveDisplay])
def test_names_in_messages_are_shown_and_not_obeyed(kind) -> None:
    terminal = Terminal()
    kind(Console(file=terminal, force_terminal=True, width=80, height=24)).message(
        "Done: \x1b]0;owned\x07\nSaved: a\x9b"
    )
    assert terminal.getvalue() == "Done: \\x1b]0;owned\\x07\nSaved: a\\x9b\n"


def test_plain_lines_are_seconds_apart_but_for_the_first_and_the_last() -> None:
    display, file, clock = plain()
    for number in range(1, 24):
        display.step(step(number, steps=23))
        clock.now += 1
    display.close()
    display.close()
    shown = [line.split()[1] for line in file.getvalue().splitlines()]
    assert shown == ["1/23", "6/23", "11/23", "16/23", "21/23", "23/23"]


def test_a_run_that_stops_early_shows_the_step_it_reached() -> None:
    display, file, _ = plain()
    for number in (1, 2, 3):
        display.step(step(number))
    display.close()
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["1/200", "3/200"]


def test_plain_evaluations_are_always_shown_after_their_step() -> None:
    display, file, _ = plain()
    display.step(step(1))
    display.step(step(2))
    display.evaluation(evaluation(2))
    display.message("[saved] step 2")
    lines = file.getvalue().splitlines()
    assert lines[1].startswith("step 2/200  loss")
    assert lines[2] == (
        "step 2  held-out loss 2.3456  from position 0: 4.000  8: 3.600  128: 3.200  2Ki: 2.800  32Ki: 2.400"
    )
    assert lines[3] == "[saved] step 2"


def test_plain_evaluations_without_tokens_by_position() -> None:
    display, file, _ = plain()
    display.evaluation(EvaluationMetrics(2, math.nan, (PositionLoss(0, 1, math.nan, 0),)))
    assert file.getvalue().startswith("step 2  held-out loss nan")


@pytest.mark.parametrize("width", [30, 48, 64, 80, 120, 300])
@pytest.mark.parametrize("context", [1, 4096, 2**20])
def test_the_panel_fits_the_terminal(width: int, context: int) -> None:
    display = live()
    for number in range(1, 100):
        display.step(step(number))
    display.evaluation(evaluation(90, context))
    lines = panel(display, width)
    display.close()
    assert {cell_len(line) for line in lines} == {min(width, 92)}
    assert len(lines) <= 24


def test_the_panel_shows_every_number() -> None:
    display = live()
    display.step(step(140))
    display.evaluation(evaluation(100))
    text = "\n".join(panel(display))
    display.close()
    for part in (
        "longctx · mine · 12.3M parameters, fp32",
        "sequences of 1Mi tokens, 4Mi tokens per step · runs/mine",
        "2 ranks (cp 2) on AMD [EPYC]",
        "140/200 steps · 9.2M tokens · 2m10s left",
        "2.1234",
        "2.3456 at step 100",
        "3.00e-04",
        "0.812",
        "1.2M tok/s",
        "43% of 178 GFLOP/s",
        "3.4 GiB peak",
        "held-out loss by position, step 100",
    ):
        assert part in text


def test_the_panels_chart_falls_with_the_loss() -> None:
    display = live()
    display.step(step(1))
    display.evaluation(evaluation(1, context=8))
    lines = panel(display)
    display.close()
    first = next(i for i, line in enumerate(lines) if "by position" in line) + 1
    assert [line.strip("│ ") for line in lines[first : first + 5]] == [
        "████",
        "████ ████ ▁▁▁▁",
        "████ ████ ████ ▁▁▁▁",
        "from 0         2",
        "loss 4.00      3.80",
    ]


def test_a_low_terminal_goes_without_the_chart() -> None:
    display = live()
    display.step(step(1))
    display.evaluation(evaluation(1))
    text = "\n".join(panel(display, height=12))
    display.close()
    assert "by position" not in text
    assert "2.3456" in text


def test_before_the_first_step_the_panel_says_how_long_it_takes() -> None:
    clock = Clock()
    display = live(clock)
    clock.now += 42
    assert "first step, 42s so far" in "\n".join(panel(display))
    display.close()
    assert "stopped before the first step" in "\n".join(panel(display))


def test_time_advances_during_a_long_step() -> None:
    clock = Clock()
    display = live(clock)
    display.step(replace(step(1), seconds=70.0, seconds_left=700.0))
    clock.now += 40
    text = "\n".join(panel(display))
    display.close()
    assert "11m00s left" in text
    assert "1m10s, now 40s" in text


@pytest.mark.parametrize(
    ("number", "words"), [(200, "200/200 steps · 13.1M tokens · done in 1m05s"), (7, "stopped after 1m05s")]
)
def test_the_last_state_stays_on_the_screen(number: int, words: str) -> None:
    clock, terminal = Clock(), Terminal()
    display = LiveDisplay(Console(file=terminal, force_terminal=True, width=80, height=24), clock)
    display.start(RUN)
    clock.now += 65
    display.step(step(number))
    display.message("saved [step] 200")
    display.close()
    display.close()
    output = terminal.getvalue()
    assert words in output[output.rindex("longctx · ") :]
    assert "saved [step] 200" in output
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l"), "the cursor is shown again"


def test_a_narrowed_terminal_takes_more_rows_away() -> None:
    """Eighty columns in a terminal of forty: each of the panel's rows now takes two, and all of them go."""
    terminal = Terminal()
    console = Console(file=terminal, force_terminal=True, width=80, height=24)
    display = LiveDisplay(console, Clock())
    display.start(RUN)
    rows = len(panel(display))
    terminal.truncate(0)
    console.width = 40
    display.close()
    assert terminal.getvalue().count("\x1b[1A") == 2 * rows - 1


def test_a_loss_that_is_not_finite_is_shown() -> None:
    display = live()
    for number, loss in enumerate((3.0, math.nan, 2.0), start=1):
        display.step(step(number, loss=loss))
    display.step(replace(step(4, loss=math.inf), grad_norm=math.nan, seconds_left=math.inf))
    text = "\n".join(panel(display))
    display.close()
    assert "inf █×▁×" in text
    assert "? left" in text


def test_the_panel_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_display(Console(file=Terminal())), LiveDisplay)
    assert isinstance(make_display(Console(file=io.StringIO())), PlainDisplay)


def test_lines_where_a_panel_cannot_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Latin(Terminal):
        encoding = "latin-1"

    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_display(Console(file=Latin())), PlainDisplay)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(make_display(Console(file=io.StringIO())), PlainDisplay), "a build server's log"
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_display(Console(file=Terminal())), PlainDisplay)


def test_a_sparkline_goes_from_the_lowest_to_the_highest() -> None:
    assert sparkline((1, 2, 3, 4, 5, 6, 7, 8), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline((1, 1, 1), 8) == "▁▁▁"
    assert sparkline((), 8) == ""
    assert sparkline((math.nan, math.inf), 8) == "××"


def test_a_long_sparkline_shows_means_of_neighbours() -> None:
    assert sparkline((0, 2, 6, 8, 15), 3) == "▁▄█"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (0.8, "0.8"),
        (640, "640"),
        (999.4, "999"),
        (999.6, "1.0k"),
        (1234, "1.2k"),
        (99_960, "100k"),
        (1_234_567, "1.2M"),
        (999_999_999, "1.0G"),
        (3.1e14, "310T"),
        (math.nan, "?"),
    ],
)
def test_counts(value: float, text: str) -> None:
    assert human_count(value) == text


def test_bytes_and_flops() -> None:
    assert human_bytes(512) == "512 B"
    assert human_bytes(int(3.4 * 2**30)) == "3.4 GiB"
    assert human_bytes(1023.9 * 2**20) == "1.0 GiB"
    assert human_flops(8.89e10) == "88.9 GFLOP/s"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1000, "1000"), (1024, "1Ki"), (1536, "1536"), (2**20, "1Mi"), (3 * 2**30, "3Gi")]
)
def test_positions(value: int, text: str) -> None:
    assert human_position(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0s"),
        (0, "0s"),
        (0.0123, "12ms"),
        (0.42, "0.4s"),
        (9.96, "10s"),
        (59.6, "1m00s"),
        (130, "2m10s"),
        (3599.7, "1h00m"),
        (11_100, "3h05m"),
        (187_200, "2d04h"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert human_duration(seconds) == text
