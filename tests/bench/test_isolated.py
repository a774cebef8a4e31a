"""Isolated measurement: results and errors of a function in a new process."""

import os
import signal
import time

import pytest
import torch

from longctx.bench.isolated import IsolatedProcess, IsolatedProcessError, report, run_isolated


def process_and_threads(value: int) -> tuple[int, int, int]:
    return os.getpid(), torch.get_num_threads(), value


def fail() -> None:
    raise ValueError("the cause\nand more")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_ready() -> bool:
    return True


def hang() -> None:
    report("before")
    time.sleep(600)


def test_one_process_calls_one_function_after_the_other_survives_an_error_and_not_its_death() -> None:
    with IsolatedProcess(1) as process:
        first, threads, value = process.call(process_and_threads, 5)
        assert first != os.getpid()
        assert (threads, value) == (1, 5)
        with pytest.raises(IsolatedProcessError, match=r"in fail[\s\S]*and more") as caught:
            process.call(fail)
        assert caught.value.reason == "ValueError: the cause"
        assert not caught.value.died
        assert process.call(process_and_threads, 6) == (first, threads, 6)
        with pytest.raises(IsolatedProcessError, match="was killed") as caught:
            process.call(die)
        assert caught.value.died


def test_a_function_that_hangs_is_ended_after_its_time_and_its_reports_have_arrived() -> None:
    reports: list[object] = []
    with IsolatedProcess() as process:
        process.call(is_ready)  # it has started, and imported this module
        with pytest.raises(IsolatedProcessError, match="more than 2 s") as caught:
            process.call(hang, seconds=2, on_report=reports.append)
    assert caught.value.timed_out
    assert not caught.value.died
    assert reports == ["before"]


def test_output_goes_to_the_log(tmp_path) -> None:
    with IsolatedProcess(log=tmp_path / "log") as process:
        process.call(os.system, "echo a line")
    assert (tmp_path / "log").read_text() == "a line\n"


def test_the_signal_that_ended_a_process_is_named() -> None:
    with pytest.raises(IsolatedProcessError, match="SIGABRT"):
        run_isolated(1, os.abort)
