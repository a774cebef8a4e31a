"""Training metrics: what a run records, written to `metrics.jsonl`.

`metrics.jsonl` has one JSON object per line with `kind` as its first key: `run` (training starts or resumes), `step`,
`evaluation`, `spike`. JSON has no NaN or infinity, so they are written as the strings "NaN", "Infinity" and "-Infinity"
(as in protobuf's JSON mapping), and `read_metrics` converts them back.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from longctx.errors import UserError
from longctx.files import replace_file, writing

FILE_NAME = "metrics.jsonl"
_STRAGGLES = 0.1
_Step = TypeVar("_Step")


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Constants of a run, recorded when it starts and each time it resumes."""

    parameters: int
    """Number of trainable parameters over all ranks, each counted once."""
    ranks: int
    mesh: dict[str, int]
    """Size of each mesh axis: `{"dp_shard": 2, "cp": 4}`."""
    device: str
    """Model name of the processor."""
    precision: str
    flops_per_token: float
    """Model FLOPs per training token, forward and backward, excluding recomputation."""
    matmul_rate: float
    """Measured matmul FLOP/s of all ranks together: the denominator of `utilisation`."""
    versions: dict[str, str]
    """Versions of the packages that affect the numbers."""
    step: int = 0
    """The step from which the run resumes; 0 for a fresh start."""
    attention: dict[str, str] = field(default_factory=dict)
    """Attention schedules selected by the cost model, by layers, with the estimates for the alternatives."""
    unigram_loss: float | None = None
    """Held-out loss, in nats per token, of a unigram model of the corpus."""
    native: list[str] = field(default_factory=list)
    """Families of C++ kernels that compute on this CPU (`longctx.kernels.native`); none: torch operators, or a GPU."""
    name: str = ""
    """Name of the run; empty in the records of earlier versions, as the three fields that follow are."""
    directory: str = ""
    """The run's directory, as it was given."""
    sequence_length: int = 0
    """Tokens."""
    tokens_per_step: int = 0
    """Of an optimizer step, over all ranks."""
    stage: str = ""
    """Name of the stage; empty if the recipe has no stages."""
    stage_number: int = 0
    """From 0."""
    stage_count: int = 1


@dataclass(frozen=True, slots=True)
class RouterMetrics:
    """Load balance of one router (of heads or experts) over the tokens of a step."""

    imbalance: float
    """Largest load of an expert or head divided by the mean load; 1 if perfectly balanced."""
    entropy: float
    """Mean entropy of the routing distributions of the tokens, in nats."""
    dropped: float
    """Fraction, 0 to 1, of (token, expert) pairs dropped for capacity."""


@dataclass(frozen=True, slots=True)
class WaitMetrics:
    """How much of a step the ranks waited for each other, as shares, 0 to 1, of its time; sampled every 50 ms."""

    median: float
    """Over ranks."""
    least: float
    """That of the rank that waited least: the one that others wait for."""
    rank: int
    """That rank."""

    @property
    def straggler(self) -> int | None:
        """The rank that others wait for during a tenth of the step or more; None if there is none."""
        return self.rank if self.median - self.least >= _STRAGGLES else None


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Metrics of one optimizer step, over all ranks."""

    step: int
    """Numbered from 1."""
    steps: int
    """Total steps of the run."""
    loss: float
    """Mean over the labelled tokens of the step, in nats per token."""
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Tokens trained on so far."""
    tokens_per_second: float
    utilisation: float
    """Model FLOP/s as a fraction, 0 to 1, of `RunInfo.matmul_rate`."""
    memory_bytes: int
    """Peak memory, maximum over ranks: resident set size on a CPU, allocated on a GPU."""
    seconds: float
    """Duration of this step."""
    seconds_left: float
    """Estimated time to the last step."""
    routers: dict[str, RouterMetrics] = field(default_factory=dict)
    """By layer name (`blocks.3.ffn`); empty for a model without routers."""
    waits: WaitMetrics | None = None
    """None with one rank, and on GPUs, where the host does not wait."""


@dataclass(frozen=True, slots=True)
class PositionLoss:
    """Mean held-out loss of the tokens at positions `lo` to `hi - 1` of their document."""

    lo: int
    hi: int
    loss: float
    """Nats per token; NaN if `tokens` is 0."""
    tokens: int


@dataclass(frozen=True, slots=True)
class EvaluationMetrics:
    """Held-out metrics after `step` steps."""

    step: int
    loss: float
    """Mean over all held-out tokens, in nats per token."""
    positions: tuple[PositionLoss, ...]
    """Power-of-two position buckets, in order: [0, 1), [1, 2), [2, 4), [4, 8), …"""
    fluctuation: dict[str, float] = field(default_factory=dict)
    """Routing fluctuation by router: the share of held-out tokens routed differently than at the previous evaluation;
    empty at the first evaluation after a (re)start."""


@dataclass(frozen=True, slots=True)
class SpikeMetrics:
    """A step whose loss or gradient norm jumped (`[spikes]`), over all ranks."""

    step: int
    loss: float
    """Nats per token."""
    usual_loss: float
    """Median over the window."""
    loss_limit: float
    """The loss above which the step is a spike."""
    grad_norm: float
    """Before clipping."""
    usual_grad_norm: float
    grad_norm_limit: float
    in_a_row: int
    """Steps up to this one, without another between them, that were spikes."""
    action: Literal["reported", "skipped", "stopped"]
    """What the run did: `reported`: applied the update; `skipped`: did not apply it; `stopped`: ended, unsaved."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Contents of a `metrics.jsonl`: each step, evaluation and spike once, in order."""

    runs: list[RunInfo]
    steps: list[StepMetrics]
    evaluations: list[EvaluationMetrics]
    spikes: list[SpikeMetrics] = field(default_factory=list)


Record = RunInfo | StepMetrics | EvaluationMetrics | SpikeMetrics


class MetricsWriter:
    """Appends to `directory/metrics.jsonl`.

    Each line reaches the operating system before the call returns, so `kill -9` loses none. `after_step` is the step
    from which the run resumes: records of later steps belong to an abandoned attempt and are dropped, so a curve has
    each step once. With 0 the run starts afresh and drops all records.

    Raises UserError if a `metrics.jsonl` in the directory cannot be read or, from any method, written. A truncated
    last line, as a crash leaves it, is dropped.
    """

    def __init__(self, directory: Path, after_step: int = 0) -> None:
        self._path = directory / FILE_NAME
        with writing(self._path):
            directory.mkdir(parents=True, exist_ok=True)
            _drop_later_lines(self._path, after_step)
            # Unbuffered: a line that a full disk did not take is not written again by close().
            self._file = self._path.open("ab", buffering=0)

    def write(self, record: Record) -> None:
        """Append a record."""
        fields = {"kind": _KIND_OF[type(record)], **asdict(record)}
        with writing(self._path):
            self._file.write(json.dumps(_to_json(fields), allow_nan=False).encode("ascii") + b"\n")

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> Metrics:
    """Read a `metrics.jsonl`, which a run may still be writing or may have been killed while writing.

    Steps, evaluations and spikes are sorted and unique: of duplicates the later line counts.

    Raises UserError if the file is missing or a line is not a record; a truncated last line is ignored.
    """
    if not path.is_file():
        raise UserError(f"no metrics at {path}; train a run first, or name the {FILE_NAME} in a run's directory")
    runs: list[RunInfo] = []
    steps: dict[int, StepMetrics] = {}
    evaluations: dict[int, EvaluationMetrics] = {}
    spikes: dict[int, SpikeMetrics] = {}
    for _, record in _read_lines(path):
        match record:
            case RunInfo():
                runs.append(record)
            case StepMetrics():
                steps[record.step] = record
            case EvaluationMetrics():
                evaluations[record.step] = record
            case SpikeMetrics():
                spikes[record.step] = record
    return Metrics(runs, _in_order(steps), _in_order(evaluations), _in_order(spikes))


def read_last_step(path: Path) -> StepMetrics | None:
    """Return the last step of a `metrics.jsonl`, None if it has none. Parses from the end, no line before that step.

    Raises UserError if a line that it parses is not a record.
    """
    for number, line in reversed(_complete_lines(path)):
        record = _parse_line(path, number, line)
        if isinstance(record, StepMetrics):
            return record
    return None


def _in_order(by_step: Mapping[int, _Step]) -> list[_Step]:
    return [by_step[step] for step in sorted(by_step)]


_KINDS: dict[str, type[Record]] = {
    "run": RunInfo,
    "step": StepMetrics,
    "evaluation": EvaluationMetrics,
    "spike": SpikeMetrics,
}
_KIND_OF = {record: kind for kind, record in _KINDS.items()}
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _read_lines(path: Path) -> list[tuple[bytes, Record]]:
    """Parse every complete line; return it, with its newline, and its record."""
    return [(line, _parse_line(path, number, line)) for number, line in _complete_lines(path)]


def _complete_lines(path: Path) -> list[tuple[int, bytes]]:
    lines = path.read_bytes().splitlines(keepends=True)
    # Only the last line can lack its end: the writer was killed in the middle of it, or is still writing it.
    return list(takewhile(lambda numbered: numbered[1].endswith(b"\n"), enumerate(lines, start=1)))


def _parse_line(path: Path, number: int, line: bytes) -> Record:
    try:
        return _parse(line)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}, line {number}: not a record of this version of longctx ({type(error).__name__}: {error}); "
            "delete the line, or move the file away"
        ) from error


def _parse(line: bytes) -> Record:
    fields = _from_json(json.loads(line))
    record = _KINDS[fields.pop("kind")]
    if record is EvaluationMetrics:
        fields["positions"] = tuple(PositionLoss(**bucket) for bucket in fields["positions"])
    if record is StepMetrics and "routers" in fields:
        fields["routers"] = {layer: RouterMetrics(**router) for layer, router in fields["routers"].items()}
    if record is StepMetrics and fields.get("waits") is not None:
        fields["waits"] = WaitMetrics(**fields["waits"])
    return record(**fields)


def _drop_later_lines(path: Path, after_step: int) -> None:
    """Drop the records after step `after_step`, atomically: a crash leaves the old file or the new one."""
    if not path.exists():
        return
    # At 0 nothing is kept, so a damaged file does not stop a fresh run.
    lines = _read_lines(path) if after_step else []
    kept = b"".join(line for line, record in lines if _is_kept(record, after_step))
    if kept == path.read_bytes():
        return
    replace_file(path, kept)


def _is_kept(record: Record, after_step: int) -> bool:
    if isinstance(record, RunInfo):
        return record.step < after_step  # a start at this very step was abandoned before its first checkpoint
    return record.step <= after_step


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return value
