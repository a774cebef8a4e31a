"""Training a recipe: what every rank runs.

Each step, every rank of a data-parallel group reads the same sequences, keeps its own slices of them, and the engine
makes one optimizer step of all ranks'. The cursor in the data is the number of sequences read, so that a run goes on
with the same tokens on any number of ranks.
"""

import importlib.metadata
import math
import os
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple, replace
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from longctx import system as machine
from longctx.checkpoint.save import (
    Checkpointer,
    TrainerState,
    check_format,
    check_same_model,
    list_checkpoints,
    read_state,
)
from longctx.checkpoint.weights import Weights, described, find_weights, with_defaults
from longctx.data.corpus import Corpus
from longctx.data.loader import Sequence as Packed
from longctx.data.loader import heldout_sequences, train_stream
from longctx.engines.base import Batch
from longctx.engines.metrics import FILE_NAME, EvaluationMetrics, MetricsWriter, RunInfo, StepMetrics
from longctx.engines.router_stats import Choices, NotFiniteError
from longctx.errors import UserError
from longctx.parallel.agreement import agreement
from longctx.parallel.collectives import all_gather
from longctx.parallel.link_speeds import ASSUMED, Speeds, measure_speeds
from longctx.recipe import Recipe, check, dump
from longctx.train.batches import Cursor, Prefetcher, to_batch
from longctx.train.build_engine import CHECKPOINT_FORMATS, build_engine
from longctx.train.display import Display, make_display
from longctx.train.evaluate import evaluate, unigram_loss
from longctx.train.lr_schedule import lr_factor
from longctx.train.process_group import device_type, peers_needed, process_group

_LOWER = (
    "Training stopped before it could be saved. Go on from an earlier checkpoint with a lower optimizer.lr, a longer "
    "schedule.warmup or a smaller train.clip"
)


def train(recipe: Recipe, *, out: Path, resume: str) -> None:
    """Train `recipe` into the directory `out`; every rank of a job calls it.

    `resume`: `auto` (from the newest checkpoint in `out`, if there is one), `never`, or a checkpoint's directory.
    Raises UserError, on every rank, for what the user can mend.
    """
    kind = device_type(recipe.train)
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Filling fresh memory costs time, and nothing here reads what it did not write.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set by property
    with process_group(kind, recipe.parallel.timeout):
        check(recipe, dist.get_world_size())
        with ExitStack() as stack:
            _Trainer(recipe, out, resume, kind, stack).run()
            stack.close()
            # The groups end on all ranks together: one that left earlier would look like a rank that died.
            dist.barrier()


class _Reporter:
    """Metrics and display on rank 0; nothing elsewhere."""

    def __init__(self, recipe: Recipe, out: Path, step: int) -> None:
        self._out = out
        self._writer: MetricsWriter | None = None
        self._display: Display | None = None
        if dist.get_rank() == 0:
            self._writer = MetricsWriter(out, recipe.logging.tensorboard, after_step=step)
            self._display = make_display()

    def start(self, info: RunInfo) -> None:
        if self._writer and self._display:
            self._writer.run(info)
            self._display.start(info)

    def step(self, metrics: StepMetrics) -> None:
        if self._writer and self._display:
            self._writer.step(metrics)
            self._display.step(metrics)

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        if self._writer and self._display:
            self._writer.evaluation(metrics)
            self._display.evaluation(metrics)

    def message(self, text: str) -> None:
        if self._display:
            self._display.message(text)

    def pictures(self) -> None:
        if self._writer:
            # matplotlib takes a second to import, which every rank would spend at the start.
            from longctx.train import plots

            plots.draw(self._out / FILE_NAME, self._out / "pictures")

    def close(self) -> None:
        if self._writer and self._display:
            self._display.close()
            self._writer.close()


class _Trainer:
    def __init__(self, recipe: Recipe, out: Path, resume: str, kind: str, stack: ExitStack) -> None:
        self.recipe, self.out, self.format = recipe, out, CHECKPOINT_FORMATS[recipe.engine]
        with agreement():
            self.stream = train_stream(recipe.data, seed=recipe.seed)
            self.heldout = self._open_heldout()
            self.vocab_size = self._vocabulary()
            self.model = described(recipe.model, self.vocab_size)
            source, state = self._find_checkpoint(resume)
            weights = self._find_weights() if source is None else None
        self._check_same_start(state, weights)
        self.engine = build_engine(recipe, kind, self.vocab_size)
        stack.callback(self.engine.close)
        self.mesh, self.device = self.engine.mesh, self.engine.device
        self.checkpointer = Checkpointer(out / "checkpoints", recipe.checkpoint.keep, recipe.parallel.timeout)
        stack.callback(self.checkpointer.close)
        if source is not None:
            self.engine.load(source)
        elif weights is not None:
            self.engine.load_weights(weights)
        self.done, self.cursor, self.tokens = state.step, Cursor(state.sequences), state.tokens
        self.speeds = None if state.speeds is None else Speeds(**state.speeds)
        self.prefetcher = Prefetcher(self.stream, self._batch)
        stack.callback(self.prefetcher.close)
        with agreement():
            if dist.get_rank() == 0:
                out.mkdir(parents=True, exist_ok=True)
                (out / "recipe.toml").write_text(dump(recipe), encoding="utf-8")
            self.reporter = _Reporter(recipe, out, self.done)
        stack.callback(self.reporter.close)
        self.choices = Choices()
        self.resumed_from, self.begun_with = source, weights
        self.stopped_by: int | None = None
        self.saved = self.done if source is not None else -1

    def _open_heldout(self) -> Sequence[Packed] | None:
        if self.recipe.evaluation is None:
            return None
        corpus = Corpus(self.recipe.data.path, "heldout")
        return heldout_sequences(corpus, self.recipe.data.sequence_length, self.recipe.evaluation.sequences)

    def _vocabulary(self) -> int:
        tokens = self.stream.corpus.manifest.tokenizer.vocab_size
        rows = self.recipe.model.vocabulary_rows(tokens)
        if rows < tokens:
            raise UserError(f"model.vocab_size: {rows} rows, but the corpus's tokenizer has {tokens} tokens")
        return rows

    def _find_checkpoint(self, resume: str) -> tuple[Path | None, TrainerState]:
        """Where to go on from, checked against this run, and the state there."""
        fresh = TrainerState(0, 0, 0, self.stream.fingerprint, self.model, None, self.format)
        there = list_checkpoints(self.out / "checkpoints")
        if resume == "never":
            if there:
                raise UserError(
                    f"{self.out} holds checkpoints of an earlier run, the newest {there[-1]}: go on from it with "
                    "--resume auto, or give another directory with --out"
                )
            return None, fresh
        path = Path(resume) if resume != "auto" else (there[-1] if there else None)
        if path is None:
            return None, fresh
        if there and path.resolve().parent != there[-1].resolve().parent:
            raise UserError(
                f"{self.out} holds checkpoints of its own, the newest {there[-1]}: go on from it with --resume auto, "
                f"or give another directory with --out to begin from {path}"
            )
        state = read_state(path)
        check_format(path, state, self.format, "Go on with that engine, or begin another run with its weights")
        check_same_model(path, replace(state, model=with_defaults(state.model)), self.model)
        if state.data != self.stream.fingerprint:
            raise UserError(
                f"checkpoint {path} was trained on other data, another seed, shuffle_window or sequence_length: step "
                f"{state.step} of it says nothing about where to go on in {self.recipe.data.path}. Restore these, or "
                "begin a run of its own (--out)"
            )
        return path, state

    def _find_weights(self) -> Weights | None:
        """What a fresh run begins with, checked against its model; None where that is drawn."""
        if self.recipe.train.init is None:
            return None
        weights = find_weights(Path(self.recipe.train.init), "with train.init=DIR")
        weights.check(self.recipe.model, self.vocab_size)
        return weights

    def _check_same_start(self, state: TrainerState, weights: Weights | None) -> None:
        """Raise UserError on every rank where ranks read different data, or begin with different steps or weights."""
        starts: list[tuple[str, int, str]] = [("", 0, "")] * dist.get_world_size()
        dist.all_gather_object(starts, (self.stream.fingerprint, state.step, weights.digest if weights else ""))
        for rank, (data, step, digest) in enumerate(starts):
            if data != starts[0][0]:
                raise UserError(
                    f"data.path: rank {rank} reads another corpus there than rank 0; copy the same one to every machine"
                )
            if step != starts[0][1]:
                raise UserError(
                    f"rank 0 begins after step {starts[0][1]} and rank {rank} after step {step}, by the checkpoints "
                    f"that each sees: {self.out} has to be on a file system that all machines share"
                )
            if digest != starts[0][2]:
                raise UserError(
                    f"train.init: rank {rank} sees other weights there than rank 0; copy the same ones to every machine"
                )

    def _save(self) -> None:
        if self.saved != self.done:
            speeds = None if self.speeds is None else asdict(self.speeds)
            at = self.done, self.cursor.sequences, self.tokens
            state = TrainerState(*at, self.stream.fingerprint, self.model, speeds, self.format)
            self.engine.save(self.checkpointer, state)
            self.saved = self.done

    def _batch(self, sequence: Packed) -> Batch:
        parallel = self.recipe.parallel
        speeds = self.speeds or ASSUMED
        schedules = {"attention": parallel.attention, "states": parallel.states}
        return to_batch(sequence, self.mesh, parallel.layout, self.device, **schedules, speeds=speeds)

    def _numbers(self, cursor: Cursor) -> range:
        return cursor.step(self.recipe.train.sequences_per_step, self.mesh.dp.size, self.mesh.dp.rank)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = number

    def _gather(self, *values: float) -> torch.Tensor:
        """Every rank's values: `[ranks, n]` float64."""
        row = torch.tensor(values, dtype=torch.float64, device=self.device)
        return all_gather(row).wait().cpu()

    def _start(self) -> None:
        dtype = torch.bfloat16 if self.recipe.train.precision == "bf16" else torch.float32
        rate = machine.matmul_rate(self.device, dtype)
        self.matmul_rate = float(self._gather(rate).sum())
        sequence = self.stream[self.cursor.sequences]
        sample = self._batch(sequence)
        if self.speeds is None and self.mesh.cp.group is not None and self._schedules(sample, dtype):
            # A layer has a schedule to choose.
            measured = measure_speeds(self.mesh.cp.group, self.device, rate)
            # The first rank's on all, as a checkpoint has them.
            self.speeds = Speeds(*self._gather(*astuple(measured))[0].tolist())
            sample = self._batch(sequence)
        flops = float(self._gather(self._training_flops([sample])).sum()) / (self.mesh.dp.size * sample.layout.length)
        unigram = None
        if self.heldout is not None and dist.get_rank() == 0:
            unigram = unigram_loss(self.stream, self.heldout, self.vocab_size)
        mesh, parallel = self.mesh, self.recipe.parallel
        axes = {"dp_replicate": mesh.dp_replicate, "dp_shard": mesh.dp_shard, "cp": mesh.cp.size, "ep": mesh.ep.size}
        axes |= {"tp": parallel.tp, "pp": parallel.pp}
        info = RunInfo(
            parameters=self.engine.parameters,
            ranks=dist.get_world_size(),
            mesh=axes,
            device=machine.device_name(self.device),
            precision=self.recipe.train.precision,
            flops_per_token=flops,
            matmul_rate=self.matmul_rate,
            versions={name: importlib.metadata.version(name) for name in ("torch", "numpy")},
            step=self.done,
            attention=self._schedules(sample, dtype),
            unigram_loss=unigram,
        )
        self.reporter.start(info)
        for note in self.engine.notes:
            self.reporter.message(note)
        for layers, schedule in info.attention.items():
            self.reporter.message(f"attention, {layers}: {schedule}")
        if self.resumed_from is not None:
            self.reporter.message(f"Resumed from {self.resumed_from} after step {self.done}.")
        if self.begun_with is not None:
            self.reporter.message(f"Begins with the weights in {self.begun_with.path}.")

    def _schedules(self, sample: Batch, dtype: torch.dtype) -> dict[str, str]:
        """The schedules of attention that were chosen for a batch, by layers."""
        chosen: dict[str, list[str]] = {}
        for name, schedule in self.engine.attention_schedules(sample.layout, dtype).items():
            chosen.setdefault(schedule, []).append(name)
        return {f"layer {', '.join(numbers)}": schedule for schedule, numbers in chosen.items()}

    def _training_flops(self, batches: Sequence[Batch]) -> float:
        """What training on these needs on this rank: forward, and twice as much backward, recomputation not counted."""
        return 3.0 * sum(self.engine.flops(batch.layout) for batch in batches)

    def run(self) -> None:
        steps = self.recipe.train.steps
        if self.done >= steps:
            self.reporter.message(f"{self.resumed_from} is of step {self.done}; train.steps is {steps}: nothing to do.")
            return
        signal.signal(signal.SIGTERM, self._stop)
        with peers_needed("at the start"):
            self._start()
        average: float | None = None
        while self.done < steps:
            step = self.done + 1
            with peers_needed(f"step {step}"):
                metrics, stop = self._step(step, average)
                average = metrics.seconds if average is None else 0.9 * average + 0.1 * metrics.seconds
                if step % self.recipe.logging.every == 0 or step == steps:
                    self.reporter.step(metrics)
                evaluation = self.recipe.evaluation
                if evaluation is not None and (step % evaluation.every == 0 or step == steps):
                    self._evaluate()
                if stop:
                    break
                if step % self.recipe.checkpoint.every == 0:
                    self._save()
        with peers_needed("at the end"):
            self._save()
            self.checkpointer.wait()
            self._finish()

    def _step(self, step: int, average: float | None) -> tuple[StepMetrics, bool]:
        """One optimizer step: its metrics, and whether some rank was asked to stop."""
        began = time.perf_counter()
        recipe = self.recipe
        batches = self.prefetcher.take(self._numbers(self.cursor))
        following = self.cursor.after(recipe.train.sequences_per_step)
        if step < recipe.train.steps:
            self.prefetcher.request(self._numbers(following))
        lr = recipe.optimizer.lr * lr_factor(recipe.schedule, step, recipe.train.steps)
        try:
            result = self.engine.step(batches, lr)
        except NotFiniteError as error:
            raise UserError(f"step {step}: {error}. {_LOWER}") from error
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise UserError(
                f"step {step}: the loss is {result.loss} and the gradient's norm {result.grad_norm}. {_LOWER}"
            )
        tokens = recipe.train.sequences_per_step * recipe.data.sequence_length
        self.done, self.cursor, self.tokens = step, following, self.tokens + tokens
        memory = machine.peak_memory_bytes(self.device)
        rows = self._gather(self._training_flops(batches), memory, float(self.stopped_by is not None))
        seconds = time.perf_counter() - began
        metrics = StepMetrics(
            step=step,
            steps=recipe.train.steps,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            tokens=self.tokens,
            tokens_per_second=tokens / seconds,
            utilisation=float(rows[:, 0].sum()) / seconds / self.matmul_rate,
            memory_bytes=int(rows[:, 1].max()),
            seconds=seconds,
            seconds_left=(recipe.train.steps - step) * (average or seconds),
            routers={name: routed.metrics for name, routed in result.routing.layers.items()},
        )
        return metrics, bool(rows[:, 2].any())

    def _evaluate(self) -> None:
        assert self.heldout is not None
        self.reporter.evaluation(evaluate(self.engine, self.heldout, self._batch, self.done, self.choices))

    def _finish(self) -> None:
        where = self.checkpointer.folder / f"step-{self.done:08d}"
        if self.done < self.recipe.train.steps:
            self.reporter.message(
                f"Stopped by a signal after step {self.done}; {where} is complete, and the same command goes on."
            )
            return
        self.reporter.pictures()
        self.reporter.message(
            f"Done. Checkpoint: {where}\nMetrics: {self.out / FILE_NAME}\nPictures: {self.out / 'pictures'}"
        )
