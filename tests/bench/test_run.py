"""What is measured beside what, what is left out, and the line that says why."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from longctx.bench import run as bench
from longctx.bench.isolated import IsolatedProcessError
from longctx.bench.measure import KernelTask, Measurement
from longctx.bench.peers import Peer
from longctx.bench.rates import MachineRates
from longctx.bench.run import Benchmark, KernelOptions, Report, extrapolate
from longctx.errors import UserError
from longctx.kernels.linear.additive import chunked as additive

MACHINE = MachineRates(
    name="a processor",
    cores=2,
    threads=1,
    torch="2.13.0",
    python="3.11",
    dtype="float32",
    device="cpu",
    matmul=1.5e11,
    batched={"8x128x128": 8e10, "8x256x256": 1e11},
    in_cache=2e11,
    copy=1e10,
    native="C++ kernels",
)
GIB = 2**30


class Imagined:
    """Processes whose measurements are made up: ours take 1 s for each 65,536 tokens, peers three times as long."""

    def __init__(self) -> None:
        self.tasks: list[KernelTask] = []
        self.peer_seconds: Callable[[int], float] = lambda tokens: 3.0 * tokens / 65536
        self.memory: Callable[[KernelTask], int] = lambda task: 2**20
        self.differences = {"o": 1e-6, "dq": 2e-6}
        self.fails: Callable[[KernelTask], IsolatedProcessError | None] = lambda task: None

    def __call__(self, threads: int | None, function: Callable[..., Any], *args: Any) -> Any:
        return getattr(self, function.__name__)(*args)

    def measure_rates(self, device: str, dtype: str) -> MachineRates:
        return MACHINE

    def differences_of(self, task: KernelTask) -> dict[str, float]:
        return self.differences

    def measure(self, task: KernelTask) -> Measurement:
        self.tasks.append(task)
        error = self.fails(task)
        if error is not None:
            raise error
        seconds = self.peer_seconds(task.shape.tokens) if task.peer else task.shape.tokens / 65536
        return Measurement(seconds, [seconds], 100, self.memory(task), 10**9)

    def measure_lengths(self, task: KernelTask, lengths: tuple[int, ...]) -> list[Measurement]:
        return [self.measure(replace(task, shape=replace(task.shape, tokens=length))) for length in lengths]

    def full(self) -> list[tuple[bool, bool]]:
        """Which of the measurements at full length were made: (peer, backward)."""
        return [(task.peer, task.backward) for task in self.tasks if task.shape.tokens == 65536]


@pytest.fixture
def imagined(monkeypatch: pytest.MonkeyPatch) -> Imagined:
    made = Imagined()

    def run_isolated(threads: int | None, function: Callable[..., Any], *args: Any) -> Any:
        if function is bench.compare_to_peer:
            return made.differences_of(*args)
        return made(threads, function, *args)

    monkeypatch.setattr(bench, "run_isolated", run_isolated)
    monkeypatch.setattr(bench, "free_bytes", lambda device: 64 * GIB)
    monkeypatch.setattr(Peer, "missing", lambda self: None)
    monkeypatch.setattr(bench.importlib.metadata, "version", lambda name: "1.0")
    return made


def options(**changed: Any) -> KernelOptions:
    values: dict[str, Any] = {
        "tokens": 65536,
        "heads": 8,
        "head_dim": 128,
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "repeats": 5,
        "kernels": ("lightning",),
        "peers": True,
        "peer_seconds": 180.0,
        "scaling": None,
    }
    return KernelOptions(**(values | changed))


def report(**changed: Any) -> Report:
    return Benchmark(options(**changed), lambda line: None).run()


def test_a_peer_is_measured_right_after_us(imagined: Imagined) -> None:
    found = report()
    assert imagined.full() == [(False, False), (True, False), (False, True), (True, True)]
    assert [row.ratio for row in found.peers] == [3.0, 3.0]
    assert [row.of_memory for row in found.peers] == [1.0, 1.0]
    assert [row.differences for row in found.peers] == [{"o": 1e-6}, {"o": 1e-6, "dq": 2e-6}]
    assert found.notes == found.disagreements == []


def test_rates_and_shares(imagined: Imagined) -> None:
    forward, both = report(peers=False).rows
    assert forward.flops == 65536 * 8 * ((additive.CHUNK + 1) * 256 + 65536)
    assert both.flops == 3 * forward.flops, "the backward pass counts twice the forward pass"
    assert forward.tokens_per_second == 65536
    assert forward.flops_per_second == pytest.approx(forward.flops)
    assert forward.of_limit == pytest.approx(forward.flops / 2e11), "of the fastest products"
    assert forward.of_copy == pytest.approx(0.1)
    assert both.backward


def test_no_peer_is_touched_without_peers(imagined: Imagined) -> None:
    assert report(peers=False).peers == []
    assert not any(task.peer for task in imagined.tasks)


def test_a_kernel_without_a_peer_has_rows(imagined: Imagined) -> None:
    found = report(kernels=("gla", "kda"))
    assert [row.kernel for row in found.rows] == ["gla", "gla", "kda", "kda"]
    assert found.peers == []


def test_a_peer_that_is_expected_to_take_too_long_is_left_out(imagined: Imagined) -> None:
    """Its time grows with the square: 1 s at 8192 is 64 s at 65,536."""
    imagined.peer_seconds = lambda tokens: (tokens / 8192) ** 2
    found = report(peer_seconds=60.0)
    assert imagined.full() == [(False, False), (False, True)]
    assert found.peers == []
    assert found.notes == [
        f"lightning: HF MiniMax, {passes} skipped: a run is estimated to exceed --peer-seconds (60 s)"
        for passes in ("forward", "forward and backward")
    ]
    assert len(report(peer_seconds=65.0).peers) == 2


def test_what_takes_long_is_announced(imagined: Imagined) -> None:
    imagined.peer_seconds = lambda tokens: (tokens / 8192) ** 2
    told: list[str] = []
    Benchmark(options(), told.append).run()
    assert told[:2] == [
        "lightning, forward: about 1.0 s per run",
        "lightning: HF MiniMax, forward: about 64.0 s per run",
    ]


def test_short_sequences_are_not_tried_first(imagined: Imagined) -> None:
    report(tokens=8191, peer_seconds=0.0)
    assert {task.shape.tokens for task in imagined.tasks} == {8191}


def test_what_does_not_fit_into_memory_is_left_out(imagined: Imagined) -> None:
    imagined.memory = lambda task: 8 * GIB if task.peer and task.backward else 2**20
    found = report()
    assert imagined.full() == [(False, False), (True, False), (False, True)]
    assert found.notes == [
        "lightning: HF MiniMax, forward and backward skipped: it needs about 64.0 GiB, and 64.0 GiB of memory is free"
    ]


def test_inputs_that_do_not_fit_are_an_error_at_once(imagined: Imagined) -> None:
    with pytest.raises(UserError, match=r"--tokens 16777216: q, k, v and o need 256.0 GiB, and 64.0 GiB of memory"):
        report(tokens=2**24)
    assert imagined.tasks == []


def test_a_peer_that_computes_something_else_is_not_measured(imagined: Imagined) -> None:
    imagined.differences = {"o": 2e-3, "dq": float("nan"), "dk": 1e-7}
    found = report()
    assert imagined.full() == [(False, False), (False, True)]
    (line,) = found.disagreements
    assert "HF MiniMax computes something else" in line
    assert "o 2.0e-03, dq nan on 2,048 tokens exceed 1e-03" in line
    imagined.differences = {"o": 2e-3}
    assert report(dtype="bfloat16").disagreements == []


def test_a_peer_that_is_missing_gives_a_line(imagined: Imagined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peer, "missing", lambda self: f"{self.distribution} is not here")
    found = report()
    assert found.notes == ["lightning: HF MiniMax skipped: transformers is not here"]
    assert len(found.rows) == 2


def test_a_peer_that_fails_gives_a_line(imagined: Imagined) -> None:
    imagined.fails = lambda task: (
        IsolatedProcessError("TypeError: no bf16", "...") if task.peer and task.backward else None
    )
    found = report()
    assert len(found.peers) == 1
    assert found.notes == ["lightning: HF MiniMax, forward and backward skipped: TypeError: no bf16"]


def test_our_own_error_is_raised(imagined: Imagined) -> None:
    imagined.fails = lambda task: IsolatedProcessError("TypeError: wrong", "the traceback")
    with pytest.raises(IsolatedProcessError, match="the traceback"):
        report()


def test_a_kernel_whose_process_is_killed_gives_a_line(imagined: Imagined) -> None:
    imagined.fails = lambda task: IsolatedProcessError("it was killed", "", died=True) if task.backward else None
    found = report(peers=False, scaling=(1024, 4096))
    assert found.notes == [
        "lightning, forward and backward skipped: it was killed",
        "lightning, forward and backward, 4,096 tokens skipped: it was killed",
    ]
    assert len(found.rows) == len(found.scaling) == 1


def test_scaling_is_measured_for_recurrences_alone(imagined: Imagined) -> None:
    found = report(kernels=("lightning", "attention", "rms-norm"), peers=False, scaling=(1024, 4096))
    assert [(row.kernel, row.backward) for row in found.scaling] == [("lightning", False), ("lightning", True)]
    row = found.scaling[0]
    assert row.tokens == (1024, 4096)
    assert row.tokens_per_second == (65536, 65536)
    assert (row.ratio, row.heads) == (1.0, 8)


def test_scaling_takes_as_many_heads_as_there_is_memory_for(imagined: Imagined) -> None:
    """A head takes 16 GiB at the long length, and four fifths of 64 may be taken."""
    imagined.memory = lambda task: task.shape.heads * GIB * task.shape.tokens // 16384
    found = report(tokens=4096, peers=False, scaling=(16384, 2**18))
    assert found.notes == []
    assert [row.heads for row in found.scaling] == [3, 3]
    used = [(task.shape.tokens, task.shape.heads) for task in imagined.tasks if task.shape.tokens != 4096]
    assert used == [(16384, 8), (16384, 3), (2**18, 3)] * 2, "both lengths with the same heads"


def test_scaling_that_one_head_has_no_memory_for_is_left_out(imagined: Imagined) -> None:
    imagined.memory = lambda task: 2 * GIB
    found = report(peers=False, scaling=(16384, 2**20))
    assert found.scaling == []
    assert found.notes[0] == (
        "lightning, forward, 1,048,576 tokens skipped: it needs about 128.0 GiB, and 64.0 GiB of memory is free"
    )


@pytest.mark.parametrize(
    "true",
    [lambda t: 3 * t, lambda t: 2 * t + 5 * t * t, lambda t: 7 * t * t],
    ids=["linear", "both", "square"],
)
def test_times_are_extrapolated_as_a_line_and_a_square(true: Callable[[float], float]) -> None:
    assert extrapolate((2, true(2)), (4, true(4)), 32) == pytest.approx(true(32))


def test_neither_part_is_negative() -> None:
    assert extrapolate((2, 2.0), (4, 2.0), 8) == pytest.approx(4.0), "faster than linear: a line through the longer"
    assert extrapolate((2, 1.0), (4, 16.0), 8) == pytest.approx(64.0), "beyond square: a square through the longer"
