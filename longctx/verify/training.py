"""Verification of a short run: a corpus through the loader, two optimizer steps, a checkpoint between, other layouts.

In float64, against one rank that takes both steps without resuming. The corpus is random text that
`longctx.data.prepare` tokenises; `loader_faults` compares what the loader makes of it with the text itself.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from longctx.checkpoint.read import list_checkpoints, read_state
from longctx.checkpoint.retention import RetentionPolicy
from longctx.checkpoint.save import Checkpointer
from longctx.checkpoint.trainer_state import TrainerState
from longctx.checkpoint.weights import stored_config
from longctx.data.blend import BlendedStream, train_stream
from longctx.data.config import DataConfig
from longctx.data.loader import Sequence as Packed
from longctx.data.prepare import prepare
from longctx.data.tokenizer import ByteTokenizer
from longctx.engines.torch_engine import TorchEngine
from longctx.files import temporary_folder
from longctx.kernels.loss import IGNORE
from longctx.parallel.local_ranks import LocalRanks
from longctx.train.batches import Cursor
from longctx.verify.cases import SEQUENCES, Case, reference
from longctx.verify.measure import Subject, engine_of, is_first_of_replica, shard, take_step
from longctx.verify.run import BOUND_FP64, Row, differences, largest

EPOCH = 2.5
"""Sequences in an epoch of the corpus: the second step begins in one epoch and ends in the next."""
DOCUMENTS = 11
VOCABULARY = ByteTokenizer().vocab_size
"""The least vocabulary of a model that reads the corpus."""
TIMEOUT = 600.0
"""Seconds that a rank waits for the others to write a checkpoint."""

Step = dict[str, Tensor]
"""The loss, every parameter's gradient, and what the step leaves, by name; empty except on a replica's first rank."""


class Indexed(Protocol):
    """Packed sequences by number."""

    def __getitem__(self, number: int, /) -> Packed:
        """Return a sequence."""


@dataclass(frozen=True)
class Run:
    """The first step of a run in a layout, or with `before` the second, from a checkpoint of the first in that one."""

    case: Case
    before: Case | None = None

    def __str__(self) -> str:
        case, before = (str(each).removesuffix(", packed") for each in (self.case, self.before))
        return f"{case}, from a corpus" if self.before is None else f"{case}, resumed from {before}"


def runs(max_ranks: int, own: Sequence[Case]) -> list[Run]:
    """Return the runs on up to `max_ranks` ranks: in the recipe's own layout if it fits, else with cp 4 or 2."""
    widest = Case(4 if max_ranks >= 4 else 2, "zigzag", packed=True)
    chosen = next((case for case in own if case.packed and case.ranks <= max_ranks), widest)
    one, data_parallel = reference(packed=True), Case(1, "contiguous", packed=True, dp_shard=SEQUENCES)
    other = replace(data_parallel, cp=2) if max_ranks >= 4 else data_parallel
    resumed = [Run(case, chosen) for case in (other, one) if case != chosen]
    return [Run(chosen), *resumed, Run(chosen, one)]


def write_corpus(folder: Path, length: int, seed: int) -> list[bytes]:
    """Prepare a corpus for sequences of `length` tokens at `folder / "corpus"`; return its documents.

    They are random letters, of very different lengths, one of them a single letter.
    """
    generator = random.Random(seed)
    shares = [generator.random() ** 3 for _ in range(DOCUMENTS - 1)]
    tokens = EPOCH * length - DOCUMENTS
    texts = ["a", *("".join(generator.choices("bcdefgh \n", k=int(s / sum(shares) * tokens) + 1)) for s in shares)]
    sources = folder / "texts"
    sources.mkdir()
    for number, text in enumerate(texts):
        (sources / f"{number}.txt").write_text(text, encoding="utf-8")
    prepare([sources], folder / "corpus", heldout=0.0, progress=False)
    return [text.encode() for text in texts]


def open_stream(subject: Subject, folder: Path) -> BlendedStream:
    """Open the corpus of `write_corpus` as training does."""
    data = DataConfig(path=str(folder / "corpus"), sequence_length=subject.length)
    return train_stream(data, seed=subject.seed)


def loader_faults(stream: Indexed, texts: Sequence[bytes]) -> float:
    """Return the fraction of an epoch's tokens that are wrong.

    Right is: every document once, from its first token to its end token, cut only where a sequence ends; bounds in
    `cu_seqlens` where documents and sequences begin; the label of a token is the next one of its document, at an end
    token none.
    """
    end = ByteTokenizer.eos_id
    missing = [[*text, end] for text in texts]
    tokens = sum(map(len, missing))
    faults, document, expected = 0, list[int](), IGNORE
    for number in range(-(-tokens // len(stream[0].tokens))):
        sequence = stream[number]
        bounds = set(sequence.cu_seqlens.tolist())
        pairs = zip(sequence.tokens.tolist(), sequence.labels.tolist(), strict=True)
        for at, (token, label) in enumerate(pairs):
            if not missing:
                break
            faults += (at in bounds) != (at == 0 or not document)
            faults += expected not in (token, IGNORE)
            faults += (label == IGNORE) != (token == end)
            expected = label
            document.append(token)
            if token == end:
                if document in missing:
                    missing.remove(document)
                document = []
    return (faults + sum(map(len, missing))) / tokens


def run_steps(
    subject: Subject, case: Case, folder: Path, steps: range, *, resume: Path | None = None, save: Path | None = None
) -> list[Step]:
    """Take steps of a run on this rank of a CPU process group, as training does, in float64. Collective.

    Resumes from the checkpoint in `resume`, and saves one to `save` after the first step.
    """
    engine = engine_of(subject, case, "fp64")
    stream, cursor, mesh = open_stream(subject, folder), Cursor(0), engine.mesh
    if resume is not None:
        (path,) = list_checkpoints(resume)
        state = read_state(path)
        if (state.step, state.data) != (steps[0] - 1, stream.fingerprint):
            raise RuntimeError(f"{path} is of step {state.step} on the stream {state.data}: expected {steps[0] - 1}")
        engine.load(path)
        cursor = Cursor(state.sequences)
    found = []
    for step in steps:
        numbers = cursor.step(SEQUENCES, mesh.dp.size, mesh.dp.rank)
        batches = [shard(stream[n], case, mesh) for n in numbers]
        loss, gradients, after = take_step(engine, batches, subject.optimizer.lr)
        cursor = cursor.after(SEQUENCES)
        values = {"loss": torch.tensor(loss, dtype=torch.float64)} | gradients | after
        found.append(values if is_first_of_replica(case, mesh) else {})
        if save is not None and step == steps[0]:
            _save(engine, save, subject, TrainerState(step, cursor.sequences, 0, stream.fingerprint, {}))
    return found


def _save(engine: TorchEngine, folder: Path, subject: Subject, state: TrainerState) -> None:
    state = replace(state, model=stored_config(subject.model, subject.vocab_size))
    checkpointer = Checkpointer(folder, RetentionPolicy(keep=1), timeout=TIMEOUT)
    engine.save(checkpointer, state)
    checkpointer.close()


def verify_training(
    subject: Subject, ranks: LocalRanks, *, run_steps: Callable[..., list[Step]] = run_steps
) -> Iterator[Row]:
    """Compare the loader with its corpus, then two steps over several ranks, resumed and not, with those of one rank.

    `run_steps` runs on each rank.
    """
    subject = replace(subject, vocab_size=max(subject.vocab_size, VOCABULARY))
    with temporary_folder("verify") as folder:
        texts = write_corpus(folder, subject.length, subject.seed)
        faults = {"tokens": loader_faults(open_stream(subject, folder), texts)}
        yield Row("the loader: tokens, labels, documents", "int64", faults, {"tokens": 0.0})
        one, chosen = reference(packed=True), runs(ranks.size, subject.own)
        saved = {case: folder / f"checkpoints-{n}" for n, case in enumerate({one, *(run.case for run in chosen)})}

        def steps(case: Case, steps: range, **checkpoints: Path | None) -> list[list[Step]]:
            found = ranks.run(partial(run_steps, **checkpoints), subject, case, folder, steps, size=case.ranks)
            return [each for each in found if each[0]]

        ((first, second),) = steps(one, range(1, 3), save=saved[one])
        for run in chosen:
            if run.before is None:
                want, replicas = first, steps(run.case, range(1, 2), save=saved[run.case])
            else:
                want, replicas = second, steps(run.case, range(2, 3), resume=saved[run.before])
            off = largest([differences(replica[0], want) for replica in replicas])
            yield Row(run, "fp64", off, dict.fromkeys(off, BOUND_FP64))
