"""Kernel benchmark: every kernel against its peer and the machine's limits, each measured in a fresh process.

A kernel and its peer are measured one after the other, so that other load on the machine affects both. Measurements
that do not fit into the free memory are skipped, and so are peers that would exceed their time limit: for long
sequences, time and memory are estimated from runs at a sixteenth and an eighth of the length. These pilot runs are
never reported as results.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from longctx.bench import flops
from longctx.bench.isolated import IsolatedProcessError, run_isolated
from longctx.bench.kernels import KERNELS, Kernel, Shape
from longctx.bench.measure import KernelTask, Measurement, compare_to_peer, measure, measure_lengths
from longctx.bench.peers import PEERS, Peer
from longctx.bench.rates import MachineRates, measure_rates
from longctx.errors import UserError
from longctx.system import free_bytes

ROW_SECONDS = 60.0
"""Time limit for the repeats of a measurement; one that takes longer runs once."""
PILOT_FROM = 8192
"""Minimum number of tokens for pilot runs on shorter sequences."""
COMPARED_TOKENS = 2048
"""Maximum number of tokens for the comparison of a peer's results with ours."""
BOUNDS = {"float32": 1e-3, "bfloat16": 2e-2}
"""Relative difference up to which a peer counts as the same computation; one bf16 rounding is up to 4e-3."""
MARGIN = 0.8
"""Fraction of the free memory that a measurement may use."""


@dataclass(frozen=True)
class KernelOptions:
    """Options of `longctx bench kernels`."""

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
    """Lengths of the short and the long sequence; None to skip the scaling measurement."""

    @property
    def shape(self) -> Shape:
        """Shape of the inputs."""
        return Shape(self.tokens, self.heads, self.head_dim, self.dtype)


@dataclass(frozen=True)
class KernelRow:
    """Result of a kernel, forward or forward and backward."""

    kernel: str
    backward: bool
    shape: Shape
    measured: Measurement
    tokens_per_second: float
    flops: int | None
    flops_per_second: float | None
    of_limit: float | None
    """FLOP/s as a fraction of the machine's: `MachineRates.limit`."""
    of_copy: float
    """Minimum bytes moved per second as a fraction of the copy rate."""


@dataclass(frozen=True)
class PeerRow:
    """Result of a peer, compared with the row of the same kernel."""

    kernel: str
    backward: bool
    peer: str
    distribution: str
    version: str
    measured: Measurement
    ratio: float
    """The peer's time divided by ours."""
    of_memory: float | None
    """Our memory divided by the peer's."""
    differences: dict[str, float]


@dataclass(frozen=True)
class ScalingRow:
    """Result of a recurrence on a short and a long sequence, with as many heads as fit into memory for the long one."""

    kernel: str
    backward: bool
    heads: int
    tokens: tuple[int, int]
    measured: tuple[Measurement, Measurement]
    tokens_per_second: tuple[float, float]
    ratio: float
    """Throughput on the long sequence divided by that on the short one."""


@dataclass
class Report:
    """All results, and a line for each skipped measurement."""

    options: KernelOptions
    machine: MachineRates
    rows: list[KernelRow] = field(default_factory=list)
    peers: list[PeerRow] = field(default_factory=list)
    scaling: list[ScalingRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Skipped measurements and the reasons."""
    disagreements: list[str] = field(default_factory=list)
    """Peers whose results differ from ours, and that were therefore not measured."""


@dataclass(frozen=True)
class Estimate:
    """Estimated time and memory of one run."""

    seconds: float
    memory: int


def extrapolate(short: tuple[int, float], middle: tuple[int, float], tokens: int) -> float:
    """Extrapolate `a T + b T^2`, a and b nonnegative, from two points (tokens, seconds); `middle` is the longer."""
    (t1, y1), (t2, y2) = short, middle
    b = max(0.0, (y2 / t2 - y1 / t1) / (t2 - t1))
    a = y2 / t2 - b * t2
    if a < 0:
        a, b = 0.0, y2 / t2**2
    return a * tokens + b * tokens**2


def gib(size: float) -> str:
    """Format bytes in GiB."""
    return f"{size / 2**30:.1f} GiB"


class Benchmark:
    """A run of the benchmark; `log` receives a line before each measurement."""

    def __init__(self, options: KernelOptions, log: Callable[[str], None]) -> None:
        self.options, self.log = options, log

    def run(self) -> Report:
        """Run all measurements. Raises UserError if not even the inputs fit into memory."""
        options = self.options
        tensor = options.tokens * options.heads * options.head_dim * options.shape.torch_dtype.itemsize
        free = self._free()
        if 4 * tensor > MARGIN * free:
            raise UserError(
                f"--tokens {options.tokens}: q, k, v and o need {gib(4 * tensor)}, and {gib(free)} of memory is free; "
                "reduce --tokens, --heads or --head-dim"
            )
        machine = run_isolated(options.threads, measure_rates, options.device, options.dtype)
        self.report = Report(options, machine)
        for name in options.kernels:
            self._kernel(KERNELS[name])
        if options.scaling is not None:
            for name in options.kernels:
                if KERNELS[name].recurrent:
                    for backward in (False, True):
                        self._scaling(self._task(name, backward), options.scaling)
        return self.report

    def _task(self, kernel: str, backward: bool, *, peer: bool = False) -> KernelTask:
        options = self.options
        return KernelTask(kernel, peer, backward, options.shape, options.device, options.repeats, ROW_SECONDS)

    def _free(self) -> int:
        return free_bytes(self.options.device)

    def _kernel(self, kernel: Kernel) -> None:
        """Measure a kernel and its peer, forward and with backward."""
        peer = PEERS.get((kernel.name, self.options.device)) if self.options.peers else None
        peer_differences = self._compare(peer) if peer is not None else None
        for backward in (False, True):
            task = self._task(kernel.name, backward)
            measured = self._measured(task, kernel.name)
            if measured is None:
                continue
            row = self._row(kernel, backward, measured)
            self.report.rows.append(row)
            if peer is not None and peer_differences is not None:
                theirs = self._measured(replace(task, peer=True), f"{kernel.name}: {peer.title}")
                if theirs is not None:
                    self.report.peers.append(self._peer_row(peer, row, theirs, peer_differences))

    def _row(self, kernel: Kernel, backward: bool, measured: Measurement) -> KernelRow:
        shape, machine = self.options.shape, self.report.machine
        count = None if kernel.flops is None else kernel.flops(shape) * (1 + flops.BACKWARD if backward else 1)
        rate = None if count is None else count / measured.seconds
        return KernelRow(
            kernel=kernel.name,
            backward=backward,
            shape=shape,
            measured=measured,
            tokens_per_second=shape.tokens / measured.seconds,
            flops=count,
            flops_per_second=rate,
            of_limit=None if rate is None else rate / machine.limit,
            of_copy=measured.moved / measured.seconds / machine.copy,
        )

    def _compare(self, peer: Peer) -> dict[str, float] | None:
        """Compare the peer's results with ours; None, with a note, if the peer cannot be measured."""
        missing = peer.missing()
        if missing is not None:
            self.report.notes.append(f"{peer.kernel}: {peer.title} skipped: {missing}")
            return None
        options = self.options
        shape = replace(options.shape, tokens=min(options.tokens, COMPARED_TOKENS))
        task = replace(self._task(peer.kernel, True), shape=shape)
        try:
            peer_differences = run_isolated(options.threads, compare_to_peer, task)
        except IsolatedProcessError as error:
            self.report.notes.append(f"{peer.kernel}: {peer.title} skipped: {error.reason}")
            return None
        bound = BOUNDS[options.dtype]
        # NaN is not within any bound.
        beyond = {name: value for name, value in peer_differences.items() if not value <= bound}
        if beyond:
            values = ", ".join(f"{name} {value:.1e}" for name, value in beyond.items())
            self.report.disagreements.append(
                f"{peer.kernel}: {peer.title} computes something else and is not measured: relative differences "
                f"{values} on {shape.tokens:,} tokens exceed {bound:.0e}"
            )
            return None
        return peer_differences

    def _peer_row(
        self, peer: Peer, row: KernelRow, measured: Measurement, peer_differences: dict[str, float]
    ) -> PeerRow:
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
            differences=peer_differences if row.backward else {"o": peer_differences["o"]},
        )

    def _measured(self, task: KernelTask, name: str) -> Measurement | None:
        """Measure a task; None, with a note, if it does not fit, or is a peer that fails or takes too long."""
        what = _named(name, task.backward)
        try:
            estimate = self._estimate(task)
            if estimate is None:
                self.log(what)
            elif self._fits(what, estimate.memory) and self._in_time(what, task, estimate.seconds):
                self.log(f"{what}: about {estimate.seconds:.1f} s per run")
            else:
                return None
            return run_isolated(self.options.threads, measure, task)
        except IsolatedProcessError as error:
            self._note_failure(what, error, peer=task.peer)
            return None

    def _note_failure(self, what: str, error: IsolatedProcessError, *, peer: bool) -> None:
        """Note a failed measurement; errors of our own kernels are raised."""
        if not (peer or error.died):
            raise error
        self.report.notes.append(f"{what} skipped: {error.reason}")

    def _fits(self, what: str, needed: int) -> bool:
        free = self._free()
        if needed > MARGIN * free:
            self.report.notes.append(f"{what} skipped: it needs about {gib(needed)}, and {gib(free)} of memory is free")
            return False
        return True

    def _in_time(self, what: str, task: KernelTask, seconds: float) -> bool:
        limit = self.options.peer_seconds
        if task.peer and seconds > limit:
            self.report.notes.append(f"{what} skipped: a run is estimated to exceed --peer-seconds ({limit:g} s)")
            return False
        return True

    def _estimate(self, task: KernelTask) -> Estimate | None:
        """Estimate time and memory from pilot runs on shorter sequences; None for a short sequence."""
        tokens = task.shape.tokens
        if tokens < PILOT_FROM:
            return None
        lengths = (tokens // 8, tokens // 16)
        pilot = replace(task, seconds=0.0)
        middle, short = run_isolated(self.options.threads, measure_lengths, pilot, lengths)
        seconds = extrapolate((lengths[1], short.seconds), (lengths[0], middle.seconds), tokens)
        return Estimate(seconds, int(_total_bytes(middle) * tokens / lengths[0]))

    def _scaling(self, task: KernelTask, lengths: tuple[int, int]) -> None:
        """Measure the short and the long sequence, with all heads or as many as fit into memory for the long one."""
        short, long = lengths
        what = f"{_named(task.kernel, task.backward)}, {long:,} tokens"
        heads = task.shape.heads
        try:
            while True:
                short_task = replace(task, shape=replace(task.shape, tokens=short, heads=heads))
                first = run_isolated(self.options.threads, measure, short_task)
                needed, free = int(_total_bytes(first) * long / short), self._free()
                if heads == 1 or needed <= MARGIN * free:
                    break
                heads = max(1, min(heads // 2, int(heads * MARGIN * free / needed)))
            if not self._fits(what, needed):
                return
            self.log(f"{what}, {heads} heads: about {first.seconds * long / short:.1f} s per run")
            long_task = replace(short_task, shape=replace(short_task.shape, tokens=long))
            second = run_isolated(self.options.threads, measure, long_task)
        except IsolatedProcessError as error:
            self._note_failure(what, error, peer=False)
            return
        rates = short / first.seconds, long / second.seconds
        self.report.scaling.append(
            ScalingRow(task.kernel, task.backward, heads, lengths, (first, second), rates, rates[1] / rates[0])
        )


def _named(name: str, backward: bool) -> str:
    return f"{name}, {'forward and backward' if backward else 'forward'}"


def _total_bytes(measured: Measurement) -> int:
    """Return the memory of the inputs and the run in bytes."""
    # If the peak cannot be measured, assume the size of the inputs for the results and twice that for intermediates.
    memory = 3 * measured.input_bytes if measured.memory is None else measured.memory
    return measured.input_bytes + memory
