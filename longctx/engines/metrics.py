"""What a run measures, and where it is kept: `metrics.jsonl` and TensorBoard event files.

`metrics.jsonl` holds one JSON object a line, with `kind` first: `run` where training starts or resumes, `step`,
`evaluation`. JSON has no NaN and no infinity, and a loss that became one must not read like the other, so they are
written as the strings "NaN", "Infinity" and "-Infinity" (the mapping of protobuf). `read_metrics` turns them back.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from longctx.errors import UserError

FILE_NAME = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What does not change while a run goes on; written anew each time that it is resumed."""

    parameters: int
    """Trained numbers in the model, over all ranks, each counted once."""
    ranks: int
    mesh: dict[str, int]
    """Ranks along each axis: `{"dp_shard": 2, "cp": 4}`."""
    device: str
    """The model of the processor, as people know it."""
    precision: str
    flops_per_token: float
    """Model FLOPs that training on one token needs, forward and backward, without recomputation."""
    matmul_rate: float
    """FLOP/s that all ranks together reach in matrix products: what `utilisation` is a fraction of."""
    versions: dict[str, str]
    """Versions of the packages that the numbers depend on."""
    step: int = 0
    """The step after which this start of the run goes on; 0 where it starts afresh."""
    attention: dict[str, str] = field(default_factory=dict)
    """For layers whose schedule of attention was to be chosen: what was, and what the others were expected to take."""
    unigram_loss: float | None = None
    """Loss, in nats per token, of a model that knows the token frequencies of the corpus and nothing else."""


@dataclass(frozen=True, slots=True)
class RouterMetrics:
    """A router of heads or of experts over the tokens of one step."""

    imbalance: float
    """Choices of the one that was chosen most, over the mean; 1 where the load is even."""
    entropy: float
    """Mean entropy of the tokens' distributions over heads or experts, in nats."""
    dropped: float
    """Share, 0 to 1, of the choices that a capacity dropped."""


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimizer step, over all ranks."""

    step: int
    """Counted from 1."""
    steps: int
    """Steps of the whole run."""
    loss: float
    """Mean over the valid tokens of the step, in nats per token."""
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Tokens trained on since step 0."""
    tokens_per_second: float
    utilisation: float
    """Model FLOP/s as a fraction, 0 to 1, of `RunInfo.matmul_rate`."""
    memory_bytes: int
    """Peak memory of the fullest rank: resident on a CPU, allocated on a GPU."""
    seconds: float
    """Time of this step."""
    seconds_left: float
    routers: dict[str, RouterMetrics] = field(default_factory=dict)
    """By layer (`blocks.3.ffn`); empty where the model routes nothing."""


@dataclass(frozen=True, slots=True)
class PositionLoss:
    """Mean held-out loss of the tokens that stand at positions `lo` to `hi - 1` of their document's context."""

    lo: int
    hi: int
    loss: float
    """Nats per token; NaN where `tokens` is 0."""
    tokens: int


@dataclass(frozen=True, slots=True)
class EvaluationMetrics:
    """The loss on held-out documents after `step` steps."""

    step: int
    loss: float
    """Mean over all held-out tokens, in nats per token."""
    positions: tuple[PositionLoss, ...]
    """Buckets of position by powers of two, in order: [0, 1), [1, 2), [2, 4), [4, 8), …"""
    fluctuation: dict[str, float] = field(default_factory=dict)
    """For each router the share of held-out tokens whose heads or experts are others than at the evaluation before;
    empty at the first evaluation after a start."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """The content of a `metrics.jsonl`: each step and each evaluation once, in order."""

    runs: list[RunInfo]
    steps: list[StepMetrics]
    evaluations: list[EvaluationMetrics]


Record = RunInfo | StepMetrics | EvaluationMetrics


class MetricsWriter:
    """Appends to `directory/metrics.jsonl` and, with `tensorboard`, to event files in `directory/tensorboard/`.

    A line is handed to the operating system before the call returns, so that `kill -9` loses none. `after_step` is
    the step after which the run goes on: what stands in the files for later steps belongs to an attempt that was
    given up, and is dropped, so that a curve holds each step once. With 0 the run starts afresh and nothing is kept.

    Raises UserError where a `metrics.jsonl` in the directory cannot be read, except for a last line cut short, which
    is what a crash leaves and is dropped.
    """

    def __init__(self, directory: Path, tensorboard: bool, after_step: int = 0) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / FILE_NAME
        _drop_later_lines(path, after_step)
        self._file = path.open("a", encoding="ascii")
        self._board: Any = None
        if tensorboard:
            # Takes seconds to import, which a run that does not ask for it need not pay.
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                str(directory / "tensorboard"), purge_step=after_step + 1 if after_step else 0, flush_secs=10
            )

    def run(self, info: RunInfo) -> None:
        """Record a start or a resumption of the run."""
        self._write(info)
        if self._board is not None:
            rows = "".join(f"| {key} | {value} |\n" for key, value in asdict(info).items())
            self._board.add_text("run", f"| | |\n|---|---|\n{rows}", info.step)

    def step(self, metrics: StepMetrics) -> None:
        """Record a step."""
        self._write(metrics)
        self._scalars(
            metrics.step,
            {
                "train/loss": metrics.loss,
                "train/lr": metrics.lr,
                "train/grad_norm": metrics.grad_norm,
                "train/tokens": metrics.tokens,
                "speed/tokens_per_second": metrics.tokens_per_second,
                "speed/utilisation": metrics.utilisation,
                "speed/step_seconds": metrics.seconds,
                "memory/peak_gib": metrics.memory_bytes / 2**30,
                **{
                    f"routing_{name}/{layer}": value
                    for layer, router in metrics.routers.items()
                    for name, value in asdict(router).items()
                },
            },
        )

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """Record an evaluation; buckets without tokens have no scalar."""
        self._write(metrics)
        # Zero-padded, because TensorBoard sorts its charts by name.
        by_position = {f"heldout_by_position/{b.lo:08d}": b.loss for b in metrics.positions if b.tokens}
        fluctuation = {f"routing_fluctuation/{layer}": share for layer, share in metrics.fluctuation.items()}
        self._scalars(metrics.step, {"heldout/loss": metrics.loss, **by_position, **fluctuation})

    def close(self) -> None:
        """Flush and close the files. May be called twice."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, record: Record) -> None:
        fields = {"kind": _KIND_OF[type(record)], **asdict(record)}
        self._file.write(json.dumps(_to_json(fields), allow_nan=False) + "\n")
        self._file.flush()

    def _scalars(self, step: int, scalars: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)


def read_metrics(path: Path) -> Metrics:
    """Read a `metrics.jsonl`, also while a run writes it or after one was killed.

    Steps and evaluations come in order, each once: where a step stands twice, the later line holds.

    Raises UserError where the file is missing or a line is no record; a last line cut short is left out.
    """
    if not path.is_file():
        raise UserError(f"no metrics at {path}; train a run first, or name the {FILE_NAME} in a run's directory")
    runs: list[RunInfo] = []
    steps: dict[int, StepMetrics] = {}
    evaluations: dict[int, EvaluationMetrics] = {}
    for _, record in _read_lines(path):
        match record:
            case RunInfo():
                runs.append(record)
            case StepMetrics():
                steps[record.step] = record
            case EvaluationMetrics():
                evaluations[record.step] = record
    return Metrics(runs, [steps[i] for i in sorted(steps)], [evaluations[i] for i in sorted(evaluations)])


_KINDS: dict[str, type[Record]] = {"run": RunInfo, "step": StepMetrics, "evaluation": EvaluationMetrics}
_KIND_OF = {record: kind for kind, record in _KINDS.items()}
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _read_lines(path: Path) -> list[tuple[bytes, Record]]:
    """Each whole line, with its newline, and the record in it."""
    lines = path.read_bytes().splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break  # only the last line can lack it: the writer was killed within it, or is within it now
        try:
            records.append((line, _parse(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number}: not a record of this version of longctx ({type(error).__name__}: {error}); "
                "delete the line, or move the file away"
            ) from error
    return records


def _parse(line: bytes) -> Record:
    fields = _from_json(json.loads(line))
    record = _KINDS[fields.pop("kind")]
    if record is EvaluationMetrics:
        fields["positions"] = tuple(PositionLoss(**bucket) for bucket in fields["positions"])
    if record is StepMetrics and "routers" in fields:
        fields["routers"] = {layer: RouterMetrics(**router) for layer, router in fields["routers"].items()}
    return record(**fields)


def _drop_later_lines(path: Path, after_step: int) -> None:
    """Keep what the first `after_step` steps wrote. The file is the old one or the new one, whenever this stops."""
    if not path.exists():
        return
    # At 0 not even the old file's content matters, so a damaged one does not stop a fresh run.
    lines = _read_lines(path) if after_step else []
    kept = b"".join(line for line, record in lines if _belongs(record, after_step))
    if kept == path.read_bytes():
        return
    aside = path.with_name(path.name + ".partial")
    with aside.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _belongs(record: Record, after_step: int) -> bool:
    if isinstance(record, RunInfo):
        return record.step < after_step  # one that started at this very step was given up before its first checkpoint
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
