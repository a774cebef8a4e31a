"""metrics.jsonl: whole after a crash, each step once after a resumption, valid JSON whatever the loss."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.engines.metrics import (
    EvaluationMetrics,
    Metrics,
    MetricsWriter,
    PositionLoss,
    RunInfo,
    SpikeMetrics,
    StepMetrics,
    WaitMetrics,
    read_last_step,
    read_metrics,
)
from longctx.errors import UserError

RUN = RunInfo(
    parameters=1_000_000,
    ranks=2,
    mesh={"dp_shard": 1, "cp": 2},
    device="a processor",
    precision="fp32",
    flops_per_token=6e6,
    matmul_rate=1e11,
    versions={"torch": "2.13.0"},
    unigram_loss=3.1,
)


def step(number: int, loss: float = 2.5) -> StepMetrics:
    return StepMetrics(
        step=number,
        steps=20,
        loss=loss,
        lr=1e-3,
        grad_norm=0.5,
        tokens=1024 * number,
        tokens_per_second=1e4,
        utilisation=0.4,
        memory_bytes=2**30,
        seconds=0.1,
        seconds_left=2.0,
    )


def evaluation(number: int, loss: float = 2.6) -> EvaluationMetrics:
    return EvaluationMetrics(number, loss, (PositionLoss(0, 1, 4.0, 8), PositionLoss(1, 2, math.inf, 8)))


def spike(number: int) -> SpikeMetrics:
    return SpikeMetrics(number, 9.0, 2.5, 2.7, 30.0, 0.5, 1.5, in_a_row=1, action="skipped")


def write(directory: Path, first: int, last: int, after_step: int = 0) -> None:
    """A start of the run: steps `first` to `last`, an evaluation after each fifth."""
    with MetricsWriter(directory, after_step) as writer:
        writer.write(replace(RUN, step=after_step))
        for number in range(first, last + 1):
            writer.write(step(number))
            if number % 4 == 0:
                writer.write(spike(number))
            if number % 5 == 0:
                writer.write(evaluation(number))


def read(directory: Path) -> Metrics:
    return read_metrics(directory / "metrics.jsonl")


def test_what_was_written_is_read(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "new" / "run") as writer:
        writer.write(RUN)
        writer.write(step(1))
        writer.write(evaluation(1))
        writer.write(spike(1))
    assert read(tmp_path / "new" / "run") == Metrics([RUN], [step(1)], [evaluation(1)], [spike(1)])


def test_the_last_step_is_found_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, 1, 5)
    with path.open("ab") as file:
        file.write(b'{"kind": "step", "step": 6, ')  # as a crash leaves it
    assert read_last_step(path) == step(5)
    path.write_bytes(b"no record\n" + path.read_bytes())
    assert read_last_step(path) == step(5), "no earlier line is parsed"
    path.write_bytes(b"no record\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: not a record"):
        read_last_step(path)
    path.write_bytes(b"")
    assert read_last_step(path) is None


def test_waits_are_read_too_and_a_step_without_them(tmp_path: Path) -> None:
    written = [replace(step(1), waits=WaitMetrics(median=0.5, least=0.25, rank=3)), step(2)]
    with MetricsWriter(tmp_path) as writer:
        for metrics in written:
            writer.write(metrics)
    assert read(tmp_path).steps == written
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text(lines[1].replace(', "waits": null', "") + "\n")
    assert read(tmp_path).steps == [step(2)], "of an earlier version"


@pytest.mark.parametrize(
    ("median", "least", "straggler"), [(0.5, 0.375, 2), (0.5, 0.41, None), (0.05, 0.0, None), (1.0, 0.0, 2)]
)
def test_a_straggler_is_waited_for_during_a_tenth_of_the_step(median, least, straggler) -> None:
    assert WaitMetrics(median, least, rank=2).straggler == straggler


def test_each_line_is_an_object_that_names_its_kind(tmp_path: Path) -> None:
    write(tmp_path, 5, 5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", "step", "evaluation"]
    assert lines[1]["loss"] == 2.5
    assert lines[2]["positions"][0] == {"lo": 0, "hi": 1, "loss": 4.0, "tokens": 8}


@pytest.mark.parametrize(("loss", "text"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")])
def test_a_loss_that_is_not_finite_is_a_string(tmp_path: Path, loss: float, text: str) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    with MetricsWriter(tmp_path) as writer:
        writer.write(step(1, loss))
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)["loss"] == text
    (metrics,) = read(tmp_path).steps
    assert math.isnan(metrics.loss) if math.isnan(loss) else metrics.loss == loss


@given(st.floats(allow_nan=False))
def test_numbers_come_back_bitwise(tmp_path_factory: pytest.TempPathFactory, loss: float) -> None:
    directory = tmp_path_factory.mktemp("run")
    with MetricsWriter(directory) as writer:
        writer.write(step(1, loss))
    assert read(directory).steps[0].loss == loss


def test_a_killed_run_loses_no_step(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from longctx.engines.metrics import MetricsWriter, StepMetrics
writer = MetricsWriter(Path({str(tmp_path)!r}))
for number in range(1, 4):
    writer.write(StepMetrics(number, 9, 2.5, 1e-3, 0.5, 10, 1.0, 0.5, 1, 0.1, 1.0))
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert killed.returncode == -signal.SIGKILL
    assert [metrics.step for metrics in read(tmp_path).steps] == [1, 2, 3]


def test_a_resumed_run_holds_each_step_once(tmp_path: Path) -> None:
    write(tmp_path, 1, 13)
    write(tmp_path, 11, 17, after_step=10)  # 11 to 13 came after the checkpoint
    write(tmp_path, 11, 20, after_step=10)  # and no checkpoint was written before the next crash
    metrics = read(tmp_path)
    assert [m.step for m in metrics.steps] == list(range(1, 21))
    assert [m.step for m in metrics.evaluations] == [5, 10, 15, 20]
    assert [m.step for m in metrics.spikes] == [4, 8, 12, 16, 20]
    assert [info.step for info in metrics.runs] == [0, 10]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 21))


def test_a_fresh_start_keeps_nothing(tmp_path: Path) -> None:
    write(tmp_path, 1, 5)
    (tmp_path / "metrics.jsonl").open("a").write("damaged\n")
    write(tmp_path, 1, 2)
    assert [m.step for m in read(tmp_path).steps] == [1, 2]
    assert len(read(tmp_path).runs) == 1


@pytest.mark.parametrize("cut", [1, 40])
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    write(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [m.step for m in read(tmp_path).steps] == [1, 2]
    write(tmp_path, 3, 4, after_step=3)
    assert [m.step for m in read(tmp_path).steps] == [1, 2, 3, 4]


def test_the_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, 8)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def crash(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", crash)
        with pytest.raises(UserError, match="no space left"):
            MetricsWriter(tmp_path, after_step=5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_step_written_twice_counts_as_its_later_line(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for loss in (2.7, 2.6):
            writer.write(evaluation(5, loss))
    assert [m.loss for m in read(tmp_path).evaluations] == [2.6]


@pytest.mark.parametrize(
    "line",
    ["damaged", "7", "[]", '{"step": 1}', '{"kind": "other"}', '{"kind": "step", "step": 1}', '"\\u00e9"', "[" * 9999],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    write(tmp_path, 1, 1)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 3: not a record"):
        read_metrics(path)
    with pytest.raises(UserError, match="line 3"):
        MetricsWriter(tmp_path, after_step=1)


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(RUN)
        with writer._file, open("/dev/full", "wb", buffering=0) as full:
            writer._file = full
            with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: No space left on device\. Make it"):
                writer.write(step(1))


def test_a_directory_that_cannot_be_made_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/metrics\.jsonl cannot be written: File exists"):
        MetricsWriter(tmp_path / "file")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics at .*nowhere\.jsonl; train a run first"):
        read_metrics(tmp_path / "nowhere.jsonl")
