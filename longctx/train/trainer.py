"""Training loop: data, steps, evaluation, checkpoints and metrics of a recipe, run by every rank.

In each step, the context-parallel ranks of a data-parallel group read the same sequences and keep their own slices, and
the engine takes one optimizer step over all ranks. The data cursor is the number of sequences read, so a run resumes
with the same tokens on any number of ranks.
"""

import importlib.metadata
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from longctx import system
from longctx.checkpoint.read import list_checkpoints, name_of
from longctx.checkpoint.retention import HeldOut
from longctx.checkpoint.save import Checkpointer
from longctx.checkpoint.trainer_state import TrainerState
from longctx.data.blend import repetition_warnings
from longctx.data.loader import Sequence as Packed
from longctx.engines.base import Batch
from longctx.engines.metrics import (
    FILE_NAME,
    RunInfo,
    SpikeMetrics,
    StepMetrics,
    WaitMetrics,
)
from longctx.engines.router_stats import NonFiniteLogitsError, RoutingFluctuation
from longctx.errors import UserError
from longctx.files import writing
from longctx.health.flight_recorder import FOLDER, record_collectives
from longctx.health.monitor import Monitor, monitored
from longctx.kernels.native import library
from longctx.parallel.attention.cost_model import ScheduleChoice
from longctx.parallel.collectives import all_gather
from longctx.parallel.link_speeds import ASSUMED, Speeds, measure_speeds
from longctx.parallel.rank_errors import raise_on_all_ranks
from longctx.recipe import Recipe, check, dump
from longctx.train import spikes
from longctx.train.agreement import check_agreement
from longctx.train.batches import Cursor, Prefetcher, to_batch
from longctx.train.build_engine import build_engine
from longctx.train.display import make_display
from longctx.train.evaluate import evaluate, unigram_loss
from longctx.train.kept_checkpoints import best_text, build_retention
from longctx.train.lr_schedule import lr_factor
from longctx.train.nonfinite import not_finite
from longctx.train.outcome import clear_outcome, mark_stopped
from longctx.train.process_group import collective_errors, device_type, process_group
from longctx.train.reporter import Reporter
from longctx.train.run_lock import locked
from longctx.train.run_record import describe_start
from longctx.train.start import find_start, nothing_text, start_messages, start_warnings
from longctx.train.stop_signal import listen

_DIVERGED = (
    "Training stopped without saving this step. Resume from an earlier checkpoint with a lower optimizer.lr, a longer "
    "schedule.warmup or a smaller train.clip"
)

_STOPPING = (signal.SIGTERM, signal.SIGINT)


def train(
    recipe: Recipe, *, out: Path, resume: str, command: Sequence[str] | None = None, only_stage: str | None = None
) -> int:
    """Train `recipe` into the directory `out`; return the exit status. Collective: every rank of a job calls it.

    The status is 0 after the last step; 128 + the number of the signal, SIGTERM or SIGINT, if that stopped the run
    earlier, after a save, on any rank. Each stage of a curriculum begins with the last checkpoint of the one before,
    read from disk, as after a resume. `only_stage`: the name of the stage to train; None: all that are left.
    `resume`: `auto` (from the latest checkpoint in `out`, if there is one), `never`, or a checkpoint directory.
    `command`: what the user has started, as arguments, for `run.json`; None: this process.
    Raises UserError, on every rank, for errors that the user can fix.
    """
    kind = device_type(recipe.train)
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Filling new memory costs time, and nothing here reads memory that it did not write.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set by property
    timeout = recipe.parallel.timeout
    if kind == "cuda":
        record_collectives(out / "logs")
    with process_group(kind, timeout), monitored(timeout, out / "logs") as monitor:
        check_agreement(recipe, out)
        check(recipe, dist.get_world_size())
        with locked(out, make_display().message) as check_lock:
            place = _Place(out, command or sys.orig_argv, kind, monitor, check_lock)
            outcome = _train_stage(recipe, resume, only_stage, place)
            while outcome.next_resume is not None:
                outcome = _train_stage(recipe, outcome.next_resume, only_stage, place, outcome.stopped_by)
            # All ranks destroy their groups together: one that exits earlier would look like a crashed rank.
            dist.barrier()
            return outcome.status


@dataclass(frozen=True)
class _Place:
    """What all stages of a run have in common."""

    out: Path
    command: Sequence[str]
    kind: str
    monitor: Monitor
    check_lock: Callable[[], None]


@dataclass(frozen=True)
class _Outcome:
    status: int
    next_resume: str | None
    """The checkpoint with which the next stage begins; None if the run ends here."""
    stopped_by: int = 0
    """A signal that came too late for this stage, as during its last save: it stops the next one; 0 if none did."""


def _train_stage(recipe: Recipe, resume: str, only_stage: str | None, place: _Place, stopped_by: int = 0) -> _Outcome:
    """Train the stage that comes next; its model and process groups are freed at the end.

    `stopped_by`: a signal that this rank got before, which stops the stage before its first step.
    """
    with ExitStack() as stack:
        for number in _STOPPING:
            # Last: the trainer's handler holds it, with the model and its process groups.
            stack.callback(signal.signal, number, signal.getsignal(number) or signal.SIG_DFL)
        trainer = _Trainer(recipe, resume, only_stage, place, stack)
        trainer.stopped_by = stopped_by
        trainer.run()
        stage = trainer.start.stage
        if not trainer.is_complete:
            return _Outcome(128 + trainer.stopped_by, None)
        if only_stage is not None or stage.number + 1 == stage.count:
            return _Outcome(0, None)
        return _Outcome(0, str(trainer.checkpoint), trainer.stopped_by)


class _Trainer:
    def __init__(self, whole: Recipe, resume: str, only_stage: str | None, place: _Place, stack: ExitStack) -> None:
        out, kind = place.out, place.kind
        self.monitor, self.out = place.monitor, out
        self.start = start = find_start(whole, out, resume, make_display().message, only_stage)
        self.recipe = recipe = start.stage.recipe
        self.only_stage = only_stage
        self.last_step = start.state.stage_start + recipe.train.steps
        """The step after which the stage is complete; steps are counted over all stages."""
        self.stream, self.heldout, state = start.data.stream, start.data.heldout, start.state
        self.engine = build_engine(recipe, kind, start.data.vocab_size)
        stack.callback(self.engine.close)
        self.mesh, self.device = self.engine.mesh, self.engine.device
        retention = build_retention(
            recipe.checkpoint, len(self.heldout) if self.heldout is not None else None, state.stages
        )
        self.checkpointer = Checkpointer(
            out / "checkpoints", retention, recipe.parallel.timeout, place.check_lock, start.copies
        )
        stack.callback(self._finish_saves)
        if start.optimizer is not None:
            self.engine.load(start.optimizer)
        elif start.weights is not None:
            self.engine.load_weights(start.weights)
        self.done, self.cursor, self.tokens = state.step, Cursor(state.sequences), state.tokens
        # A run that is not evaluated for a while keeps it.
        self.heldout_fingerprint = start.data.heldout_fingerprint or state.heldout
        self.speeds = None if state.speeds is None else Speeds(**state.speeds)
        self.spikes, self.measured = spikes.SpikeWatch(recipe.spikes, state.spikes, self.device), state.heldout_loss
        self.prefetcher = Prefetcher(self.stream, self._batch)
        stack.callback(self.prefetcher.close)
        entry = describe_start(whole, out, start, self.device, self._axes(), place.command)
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                with writing(out / "recipe.toml"):
                    out.mkdir(parents=True, exist_ok=True)
                    clear_outcome(out)
                    if kind == "cuda":
                        (out / "logs" / FOLDER).mkdir(parents=True, exist_ok=True)
                    (out / "recipe.toml").write_text(dump(whole), encoding="utf-8")
            self.reporter = Reporter(whole, out, start, entry, active=not self.is_complete)
        stack.enter_context(self.reporter)
        self.routing_fluctuation = RoutingFluctuation()
        self.stopped_by = 0
        """The signal that stops the run; 0 if there is none."""
        self.saved = self.done if start.source is not None else -1
        self.not_copied: str | None = None
        """What was said of the last checkpoint's copy; None if there was nothing to say."""
        if start.source is not None:
            self.checkpointer.copy_missing(start.source, state)

    def _save(self) -> None:
        if self.saved != self.done:
            speeds = None if self.speeds is None else asdict(self.speeds)
            state = TrainerState(
                step=self.done,
                sequences=self.cursor.sequences,
                tokens=self.tokens,
                data=self.stream.fingerprint,
                model=self.start.model,
                speeds=speeds,
                format=self.start.format,
                heldout=self.heldout_fingerprint,
                spikes=self.spikes.state,
                heldout_loss=self.measured,
                stages=self.start.state.stages,
            )
            self.engine.save(self.checkpointer, state)
            self.saved = self.done
            self._report_copies()

    def _report_copies(self) -> None:
        """Say why the last checkpoint was not copied, unless that was said before."""
        if self.checkpointer.not_copied not in (None, self.not_copied):
            self.reporter.message(f"WARNING: {self.checkpointer.not_copied}")
        self.not_copied = self.checkpointer.not_copied

    def _batch(self, sequence: Packed) -> Batch:
        parallel = self.recipe.parallel
        speeds = self.speeds or ASSUMED
        schedules = {"attention": parallel.attention, "states": parallel.states}
        return to_batch(sequence, self.mesh, parallel.layout, self.device, **schedules, speeds=speeds)

    def _numbers(self, cursor: Cursor) -> range:
        return cursor.step(self.recipe.train.sequences_per_step, self.mesh.dp.size, self.mesh.dp.rank)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = number
        if number == signal.SIGINT:
            # A second Ctrl-C does not wait for the save.
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _gather(self, *values: float) -> torch.Tensor:
        """All-gather numbers: `[ranks, n]` float64."""
        row = torch.tensor(values, dtype=torch.float64, device=self.device)
        return all_gather(row).wait().cpu()

    def _start(self) -> None:
        dtype = torch.bfloat16 if self.recipe.train.precision == "bf16" else torch.float32
        rate = system.matmul_rate(self.device, dtype)
        self.matmul_rate = float(self._gather(rate).sum())
        sequence = self.stream[self.cursor.sequences]
        sample = self._batch(sequence)
        # Virtual ranks select the same schedules anywhere, by the assumed speeds.
        group = None if self.mesh.virtual else self.mesh.cp.group
        schedules = self._schedules(sample, dtype)
        if self.speeds is None and group is not None and schedules:
            # Some layer selects its schedule by the cost model.
            measured = measure_speeds(group, self.device, rate)
            # Rank 0's on all ranks, as in the checkpoint.
            self.speeds = Speeds(*self._gather(*astuple(measured))[0].tolist())
            sample = self._batch(sequence)
            schedules = self._schedules(sample, dtype)
        flops = float(self._gather(self._training_flops([sample])).sum()) / (self.mesh.dp.size * sample.layout.length)
        unigram = None
        if self.heldout is not None and dist.get_rank() == 0:
            unigram = unigram_loss(self.stream, self.heldout, self.start.data.vocab_size)
        info = RunInfo(
            parameters=self.engine.parameters,
            ranks=dist.get_world_size(),
            mesh=self._axes(),
            device=system.device_name(self.device),
            precision=self.recipe.train.precision,
            flops_per_token=flops,
            matmul_rate=self.matmul_rate,
            versions={name: importlib.metadata.version(name) for name in ("torch", "numpy")},
            step=self.done,
            attention={layers: schedule.details for layers, schedule in schedules.items()},
            unigram_loss=unigram,
            native=library.loaded() if self.device.type == "cpu" else [],
            name=self.recipe.name,
            directory=str(self.out),
            sequence_length=self.recipe.data.sequence_length,
            stage=self.start.stage.name or "",
            stage_number=self.start.stage.number,
            stage_count=self.start.stage.count,
            tokens_per_step=self.recipe.tokens_per_step,
        )
        self.reporter.start(info)
        warnings = start_warnings(self.recipe, self.start.state.stage_start)
        repetitions = repetition_warnings(self.stream, self.recipe.train.sequences)
        for message in (*self.engine.startup_messages, *warnings, *repetitions):
            self.reporter.message(message)
        for layers, schedule in schedules.items():
            self.reporter.message(f"attention, {layers}: {schedule.brief}")
        for message in start_messages(self.start):
            self.reporter.message(message)

    def _axes(self) -> dict[str, int]:
        """Return the size of each mesh axis."""
        mesh, parallel = self.mesh, self.recipe.parallel
        axes = {"dp_replicate": mesh.dp_replicate, "dp_shard": mesh.dp_shard, "cp": mesh.cp.size, "ep": mesh.ep.size}
        return axes | {"tp": parallel.tp, "pp": parallel.pp}

    def _schedules(self, sample: Batch, dtype: torch.dtype) -> dict[str, ScheduleChoice]:
        """Describe the attention schedules selected for a batch, by layers that share one."""
        layers: dict[ScheduleChoice, list[str]] = {}
        for name, schedule in self.engine.attention_schedules(sample.layout, dtype).items():
            layers.setdefault(schedule, []).append(name)
        return {f"layer {', '.join(numbers)}": schedule for schedule, numbers in layers.items()}

    def _training_flops(self, batches: Sequence[Batch]) -> float:
        """Count this rank's training FLOPs: forward, and twice as many backward, without recomputation."""
        return 3.0 * sum(self.engine.flops(batch.layout) for batch in batches)

    def _finish_saves(self) -> None:
        """Wait for the saves in progress; one that fails because a rank is lost, in the run or in the save, says so."""
        with collective_errors("saves in progress"):
            self.checkpointer.close()

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of the last step so far."""
        return self.checkpointer.folder / name_of(self.done)

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to train, of the run or of the one stage that is to be trained."""
        return self.done >= self.last_step or self.only_stage not in (None, self.start.stage.name)

    def run(self) -> None:
        if self.is_complete:
            self.reporter.message(f"Nothing to do: {nothing_text(self.start, self.only_stage)}.")
            return
        for number in _STOPPING:
            self.stopped_by = listen(number, self._stop) or self.stopped_by
        with collective_errors("at the start"):
            self._start()
            stop = self._agree_to_stop(self._gather(float(self.stopped_by)))
        self.monitor.waited()  # what the start waited is no step's
        average: float | None = None
        while self.done < self.last_step and not stop:
            step = self.done + 1
            self.monitor.enter("step", f"step {step}")
            with collective_errors(f"step {step}"):
                metrics, spike, stop = self._step(step, average)
                average = metrics.seconds if average is None else 0.9 * average + 0.1 * metrics.seconds
                if step % self.recipe.logging.every == 0 or step == self.last_step or stop:
                    self.reporter.step(metrics)
                if spike is not None:
                    self._handle(spike)
                evaluation = self.recipe.evaluation
                if evaluation is not None and (step % evaluation.every == 0 or step == self.last_step):
                    self.monitor.enter("evaluation", f"evaluation after step {step}")
                    self._evaluate()
                if stop:
                    break
                if step % self.recipe.checkpoint.every == 0:
                    self.monitor.enter("save", f"save after step {step}")
                    self._save()
        self.monitor.enter("end", "at the end")
        with collective_errors("at the end"):
            if self.done:  # else a signal stopped it before its first step, and there is nothing to save
                self._save()
            self.checkpointer.wait()
            self._finish()

    def _step(self, step: int, average: float | None) -> tuple[StepMetrics, SpikeMetrics | None, bool]:
        """Take one optimizer step; return its metrics, those of a spike, and whether any rank got a stop signal."""
        began = time.perf_counter()
        recipe = self.recipe
        batches = self.prefetcher.take(self._numbers(self.cursor))
        next_cursor = self.cursor.after(recipe.train.sequences_per_step)
        if step < self.last_step:
            self.prefetcher.request(self._numbers(next_cursor))
        stage_step = step - self.start.state.stage_start
        lr = recipe.optimizer.lr * lr_factor(recipe.schedule, stage_step, recipe.train.steps)
        try:
            result = self.spikes.step(self.engine, batches, lr)
        except NonFiniteLogitsError as error:
            raise UserError(f"step {step}: {error}. {_DIVERGED}") from error
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            where = not_finite(self.engine, batches)
            said = f"step {step}: the loss is {result.loss} and the grad norm {result.grad_norm}."
            raise UserError(" ".join(filter(None, (said, where and f"{where}.", _DIVERGED))))
        tokens = recipe.tokens_per_step
        self.done, self.cursor, self.tokens = step, next_cursor, self.tokens + tokens
        self.measured = self.measured if result.skipped else None
        spike = self.spikes.observe(step, result)
        memory = system.peak_memory_bytes(self.device)
        waited = self.monitor.waited()
        rows = self._gather(self._training_flops(batches), memory, float(self.stopped_by), waited)
        seconds = time.perf_counter() - began
        metrics = StepMetrics(
            step=step,
            steps=self.last_step,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            tokens=self.tokens,
            tokens_per_second=tokens / seconds,
            utilisation=float(rows[:, 0].sum()) / seconds / self.matmul_rate,
            memory_bytes=int(rows[:, 1].max()),
            seconds=seconds,
            seconds_left=(self.last_step - step) * (average or seconds),
            routers={name: sums.metrics for name, sums in result.router_stats.layers.items()},
            waits=self._waits(rows[:, 3]),
        )
        return metrics, spike, self._agree_to_stop(rows[:, 2])

    def _agree_to_stop(self, signals: torch.Tensor) -> bool:
        """Return whether any rank had got a stop signal when `signals`, that of each rank, were gathered."""
        stop = int(signals.max())
        # One that has come since then counts at the end of the next step.
        self.stopped_by = stop or self.stopped_by
        return stop > 0

    def _handle(self, spike: SpikeMetrics) -> None:
        """Report a spike; raise UserError, with nothing saved, if the run is to stop at it."""
        self.reporter.spike(spike)
        if spike.action == "stopped":
            self.monitor.enter("end", f"stop at the spike of step {spike.step}")
            self.checkpointer.wait()
            raise UserError(spikes.stop_text(spike, list_checkpoints(self.checkpointer.folder)))

    def _waits(self, shares: torch.Tensor) -> WaitMetrics | None:
        if self.device.type != "cpu" or len(shares) == 1 or shares.isnan().any():
            return None
        return WaitMetrics(median=shares.median().item(), least=shares.min().item(), rank=int(shares.argmin()))

    def _evaluate(self) -> None:
        assert self.heldout is not None
        found = evaluate(self.engine, self.heldout, self._batch, self.done, self.routing_fluctuation)
        stage = self.start.stage.name
        self.measured = HeldOut(found.loss, len(self.heldout), stage) if math.isfinite(found.loss) else None
        self.reporter.evaluation(found)

    def _finish(self) -> None:
        checkpoint = self.checkpoint
        if self.done < self.last_step:
            when = f"after step {self.done}" if self.done else "before the first step"
            if dist.get_rank() == 0:
                mark_stopped(self.out, when)
            self._report_copies()
            saved = f"Checkpoint: {checkpoint}; rerun the command to resume" if self.done else "Rerun the command"
            self.reporter.end(f"Stopped by a signal {when}. {saved}.")
            return
        self.reporter.plot()
        stage = self.start.stage
        if stage.number + 1 < stage.count:
            self._report_copies()
            self.reporter.end(f"Done with {stage}, after step {self.done}. Checkpoint: {checkpoint}")
            return
        best = best_text(self.checkpointer.best()) if dist.get_rank() == 0 else ""
        self.reporter.end(
            f"Done. Checkpoint: {checkpoint}{best}\nMetrics: {self.out / FILE_NAME}\nPlots: {self.out / 'pictures'}"
        )
        if self.checkpointer.not_copied is not None:
            raise UserError(self.checkpointer.not_copied)
