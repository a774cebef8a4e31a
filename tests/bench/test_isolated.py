"""Isolated measurement: results and errors of a function in a new process."""

import os
import signal

import pytest
import torch

from longctx.bench.isolated import IsolatedProcessError, run_isolated


def process_and_threads(value: int) -> tuple[int, int, int]:
    return os.getpid(), torch.get_num_threads(), value


def fail() -> None:
    raise ValueError("the cause\nand more")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_result_comes_from_another_process() -> None:
    process, threads, value = run_isolated(1, process_and_threads, 5)
    assert process != os.getpid()
    assert (threads, value) == (1, 5)


def test_an_error_comes_with_its_reason_and_its_traceback() -> None:
    with pytest.raises(IsolatedProcessError, match=r"in fail[\s\S]*and more") as caught:
        run_isolated(1, fail)
    assert caught.value.reason == "ValueError: the cause"
    assert not caught.value.died


def test_a_process_that_is_killed_is_distinguished_from_an_error() -> None:
    with pytest.raises(IsolatedProcessError, match="was killed") as caught:
        run_isolated(1, die)
    assert caught.value.died
