"""The benchmark: every kernel beside its peer and beside the machine's limits, each in a process of its own.

A kernel and its peer are measured one after the other, so that what else happens on the machine meets both. Nothing is
started that does not fit into the memory that is free, and no peer that is expected to take longer than it may: a long
sequence is first tried at a sixteenth and an eighth of its length. What was tried there decides that alone and is
never shown as a result.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from longctx.bench import flops
from longctx.bench.alone import AloneError, alone
from longctx.bench.kernels import KERNELS, Kernel, Shape
from longctx.bench.machine import Machine, free_bytes, measure_machine
from longctx.bench.measure import Measured, Task, differences, measure, measure_lengths
from longctx.bench.peers import PEERS, Peer
from longctx.errors import UserError

ROW_SECONDS = 60.0
"""How long a measurement may go on repeating; one that takes longer is made once."""
TRIED_FROM = 8192
"""Tokens from which on a measurement is first tried on shorter sequences."""
COMPARED = 2048
"""The most tokens on which a peer's results are compared with ours."""
BOUNDS = {"float32": 1e-3, "bfloat16": 2e-2}
"""How far a peer may be from us to count as the same computation; in bf16 one rounding is up to 4e-3."""
MARGIN = 0.8
"""The share of the free memory that a measurement may take."""


@dataclass(frozen=True)
class Options:
    """What the command was asked for."""

    tokens: int
    heads: int
    head_dim: int
    dtype: str
    device: str
    threads: int | None
    repeats: int
    kernels: tuple[str, ...]
    peers: bool
    peer_seconds: float
    scaling: tuple[int, int] | None
    """A short and a long sequence, in tokens; None to leave them out."""

    @property
    def shape(self) -> Shape:
        """Of the inputs."""
        return Shape(self.tokens, self.heads, self.head_dim, self.dtype)


@dataclass(frozen=True)
class Row:
    """A kernel, forward or forward and backward."""

    kernel: str
    backward: bool
    shape: Shape
    measured: Measured
    tokens_per_second: float
    flops: int | None
    flops_per_second: float | None
    of_batched: float | None
    """FLOP/s, of the machine's largest rate of batched products."""
    of_copy: float
    """Bytes that have to be moved each second, of the machine's rate of copying."""


@dataclass(frozen=True)
class PeerRow:
    """A peer, beside the row of the same kernel."""

    kernel: str
    backward: bool
    peer: str
    distribution: str
    version: str
    measured: Measured
    ratio: float
    """The peer's seconds by ours."""
    of_memory: float | None
    """Our memory by the peer's."""
    differences: dict[str, float]


@dataclass(frozen=True)
class ScalingRow:
    """A recurrence on a short and on a long sequence, with as many heads as the long one has memory for."""

    kernel: str
    backward: bool
    heads: int
    tokens: tuple[int, int]
    measured: tuple[Measured, Measured]
    tokens_per_second: tuple[float, float]
    ratio: float
    """Tokens per second on the long sequence by those on the short one."""


@dataclass
class Report:
    """Everything that was measured, and a line for everything that was not."""

    options: Options
    machine: Machine
    rows: list[Row] = field(default_factory=list)
    peers: list[PeerRow] = field(default_factory=list)
    scaling: list[ScalingRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)
    """Peers whose results are not ours, and which were therefore not measured."""


@dataclass(frozen=True)
class Expectation:
    """What a measurement will take, once."""

    seconds: float
    memory: int


def extrapolate(short: tuple[int, float], middle: tuple[int, float], tokens: int) -> float:
    """`a T + b T^2`, neither negative, through two points (tokens, seconds) of which `middle` is the longer."""
    (t1, y1), (t2, y2) = short, middle
    b = max(0.0, (y2 / t2 - y1 / t1) / (t2 - t1))
    a = y2 / t2 - b * t2
    if a < 0:
        a, b = 0.0, y2 / t2**2
    return a * tokens + b * tokens**2


def gib(size: float) -> str:
    """Bytes as text."""
    return f"{size / 2**30:.1f} GiB"


class Benchmark:
    """A run of the benchmark; `tell` is given a line for what takes long."""

    def __init__(self, options: Options, tell: Callable[[str], None]) -> None:
        self.options, self.tell = options, tell

    def run(self) -> Report:
        """Measure everything that was asked for. Raises UserError where not even the inputs fit into memory."""
        options = self.options
        one = options.tokens * options.heads * options.head_dim * options.shape.torch_dtype.itemsize
        free = self._free()
        if 4 * one > MARGIN * free:
            raise UserError(
                f"--tokens {options.tokens}: q, k, v and o are {gib(4 * one)}, and {gib(free)} of memory are free; "
                "take fewer tokens, heads or channels"
            )
        machine = alone(options.threads, measure_machine, options.device, options.dtype)
        self.report = Report(options, machine)
        for name in options.kernels:
            self._kernel(KERNELS[name])
        if options.scaling is not None:
            for name in options.kernels:
                if KERNELS[name].recurrent:
                    for backward in (False, True):
                        self._scaling(self._task(name, backward), options.scaling)
        return self.report

    def _task(self, kernel: str, backward: bool, *, peer: bool = False) -> Task:
        options = self.options
        return Task(kernel, peer, backward, options.shape, options.device, options.repeats, ROW_SECONDS)

    def _free(self) -> int:
        return free_bytes(self.options.device)

    def _kernel(self, kernel: Kernel) -> None:
        """A kernel's rows, and those of its peer."""
        peer = PEERS.get((kernel.name, self.options.device)) if self.options.peers else None
        found = self._compare(peer) if peer is not None else None
        for backward in (False, True):
            task = self._task(kernel.name, backward)
            measured = self._measured(task, kernel.name)
            if measured is None:
                continue
            row = self._row(kernel, backward, measured)
            self.report.rows.append(row)
            if peer is not None and found is not None:
                theirs = self._measured(replace(task, peer=True), f"{kernel.name}: {peer.title}")
                if theirs is not None:
                    self.report.peers.append(self._peer_row(peer, row, theirs, found))

    def _row(self, kernel: Kernel, backward: bool, measured: Measured) -> Row:
        shape, machine = self.options.shape, self.report.machine
        needed = None if kernel.flops is None else kernel.flops(shape) * (1 + flops.BACKWARD if backward else 1)
        rate = None if needed is None else needed / measured.seconds
        return Row(
            kernel=kernel.name,
            backward=backward,
            shape=shape,
            measured=measured,
            tokens_per_second=shape.tokens / measured.seconds,
            flops=needed,
            flops_per_second=rate,
            of_batched=None if rate is None else rate / machine.best_batched,
            of_copy=measured.moved / measured.seconds / machine.copy,
        )

    def _compare(self, peer: Peer) -> dict[str, float] | None:
        """How far the peer's results are from ours; None, with a line, where it cannot be measured beside us."""
        missing = peer.missing()
        if missing is not None:
            self.report.notes.append(f"{peer.kernel}: {peer.title} left out: {missing}")
            return None
        options = self.options
        shape = replace(options.shape, tokens=min(options.tokens, COMPARED))
        task = replace(self._task(peer.kernel, True), shape=shape)
        try:
            found = alone(options.threads, differences, task)
        except AloneError as error:
            self.report.notes.append(f"{peer.kernel}: {peer.title} left out: {error.reason}")
            return None
        bound = BOUNDS[options.dtype]
        # NaN is not within any bound.
        far = {name: value for name, value in found.items() if not value <= bound}
        if far:
            told = ", ".join(f"{name} {value:.1e}" for name, value in far.items())
            self.report.disagreements.append(
                f"{peer.kernel}: {peer.title} computes something else and is not measured: relative differences of "
                f"{told} on {shape.tokens:,} tokens, more than {bound:.0e}"
            )
            return None
        return found

    def _peer_row(self, peer: Peer, row: Row, measured: Measured, found: dict[str, float]) -> PeerRow:
        ours, theirs = row.measured.memory, measured.memory
        return PeerRow(
            kernel=row.kernel,
            backward=row.backward,
            peer=peer.title,
            distribution=peer.distribution,
            version=importlib.metadata.version(peer.distribution),
            measured=measured,
            ratio=measured.seconds / row.measured.seconds,
            of_memory=ours / theirs if ours is not None and theirs else None,
            differences=found if row.backward else {"o": found["o"]},
        )

    def _measured(self, task: Task, name: str) -> Measured | None:
        """Measure a task; None, with a line, where it does not fit, or is a peer that takes too long or fails."""
        what = _named(name, task.backward)
        try:
            expected = self._expectation(task)
            if expected is None:
                self.tell(what)
            elif self._fits(what, expected.memory) and self._in_time(what, task, expected.seconds):
                self.tell(f"{what}: about {expected.seconds:.1f} s each time")
            else:
                return None
            return alone(self.options.threads, measure, task)
        except AloneError as error:
            self._left_out(what, error, peer=task.peer)
            return None

    def _left_out(self, what: str, error: AloneError, *, peer: bool) -> None:
        """A line for a measurement that failed; what our own kernels raise is raised."""
        if not (peer or error.died):
            raise error
        self.report.notes.append(f"{what} left out: {error.reason}")

    def _fits(self, what: str, needed: int) -> bool:
        free = self._free()
        if needed > MARGIN * free:
            self.report.notes.append(
                f"{what} left out: it needs about {gib(needed)}, and {gib(free)} of memory are free"
            )
            return False
        return True

    def _in_time(self, what: str, task: Task, seconds: float) -> bool:
        limit = self.options.peer_seconds
        if task.peer and seconds > limit:
            self.report.notes.append(
                f"{what} left out: it is expected to take longer than the {limit:g} s that --peer-seconds gives it"
            )
            return False
        return True

    def _expectation(self, task: Task) -> Expectation | None:
        """From shorter sequences; None where the sequence is short itself."""
        tokens = task.shape.tokens
        if tokens < TRIED_FROM:
            return None
        lengths = (tokens // 8, tokens // 16)
        tried = replace(task, seconds=0.0)
        middle, short = alone(self.options.threads, measure_lengths, tried, lengths)
        seconds = extrapolate((lengths[1], short.seconds), (lengths[0], middle.seconds), tokens)
        return Expectation(seconds, int(_whole(middle) * tokens / lengths[0]))

    def _scaling(self, task: Task, lengths: tuple[int, int]) -> None:
        """The short sequence with all heads, or with as many as the long one has memory for, then the long one."""
        short, long = lengths
        what = f"{_named(task.kernel, task.backward)}, {long:,} tokens"
        heads = task.shape.heads
        try:
            while True:
                few = replace(task, shape=replace(task.shape, tokens=short, heads=heads))
                first = alone(self.options.threads, measure, few)
                needed, free = int(_whole(first) * long / short), self._free()
                if heads == 1 or needed <= MARGIN * free:
                    break
                heads = max(1, min(heads // 2, int(heads * MARGIN * free / needed)))
            if not self._fits(what, needed):
                return
            self.tell(f"{what}, {heads} heads: about {first.seconds * long / short:.1f} s each time")
            second = alone(self.options.threads, measure, replace(few, shape=replace(few.shape, tokens=long)))
        except AloneError as error:
            self._left_out(what, error, peer=False)
            return
        rates = short / first.seconds, long / second.seconds
        self.report.scaling.append(
            ScalingRow(task.kernel, task.backward, heads, lengths, (first, second), rates, rates[1] / rates[0])
        )


def _named(name: str, backward: bool) -> str:
    return f"{name}, {'forward and backward' if backward else 'forward'}"


def _whole(measured: Measured) -> int:
    """Inputs and what comes on top of them, in bytes."""
    # Where the peak cannot be measured, as much again for the results and twice that for what is kept in between.
    memory = 3 * measured.input_bytes if measured.memory is None else measured.memory
    return measured.input_bytes + memory
