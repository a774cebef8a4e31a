"""One step of a model on the ranks of a process group: its loss, its logits, every parameter's gradient."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from longctx.engines.base import Batch
from longctx.engines.torch_engine import TorchEngine
from longctx.kernels.loss import IGNORE
from longctx.model.config import ModelConfig
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh
from longctx.recipe.tables import OptimizerConfig, TrainConfig
from longctx.verify.cases import SEQUENCES, Case, documents

Precision = Literal["fp64", "fp32", "bf16"]


@dataclass(frozen=True)
class Subject:
    """What is verified: a model and how it is trained."""

    model: ModelConfig
    train: TrainConfig
    vocab_size: int
    length: int
    seed: int


@dataclass(frozen=True)
class Measured:
    """One rank's share: the loss (the same on all), its slices' logits by sequence, and rank 0's whole gradients."""

    loss: float
    logits: dict[int, Tensor]
    """Of each sequence that this rank reads: `[T_local, N]` float64."""
    cp_rank: int
    gradients: dict[str, Tensor]


def sequence(subject: Subject, number: int, packed: bool) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Tokens and labels `[1, T]` of a sequence of chance, and its documents.

    Every sequence has another number of labels: a mean over ranks in place of one over labels would show.
    """
    generator = torch.Generator().manual_seed(subject.seed + number)
    tokens = torch.randint(0, subject.vocab_size, (1, subject.length), generator=generator)
    bounds = documents(subject.length, packed, subject.seed + number)
    labels = torch.roll(tokens, -1, dims=1)
    labels[:, [end - 1 for end in bounds[1:]]] = IGNORE
    labels[:, : number * subject.length // 3] = IGNORE
    return tokens, labels, bounds


def measure(subject: Subject, case: Case, precision: Precision) -> Measured:
    """The step of `case`, on every rank of a process group of `case.ranks` on the CPU."""
    axes = {name: getattr(case, name) for name in ("dp_replicate", "dp_shard", "cp", "ulysses", "ep")}
    mesh = Mesh.build("cpu", **axes)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    train = subject.train.model_copy(update={"precision": "bf16" if precision == "bf16" else "fp32"})
    engine = TorchEngine(
        subject.model, train, OptimizerConfig(), mesh, vocab_size=subject.vocab_size, seed=subject.seed, dtype=dtype
    )
    batches = {}
    for number in range(mesh.dp.rank, SEQUENCES, mesh.dp.size):
        tokens, labels, bounds = sequence(subject, number, case.packed)
        layout = Layout.on(mesh, bounds, case.order, attention=case.attention, states=case.states, sequence=number)
        batches[number] = Batch(layout.shard(tokens), layout.shard(labels, fill=IGNORE), layout)
    with torch.no_grad():
        logits = {n: engine.model(b.tokens, b.layout)[0].double() for n, b in batches.items()}
    loss, _ = engine.gradients(list(batches.values()))
    gradients = {name: gradient.double() for name, gradient in engine.named_gradients()}
    first = mesh.dp.rank == 0 and mesh.cp.rank == 0
    return Measured(loss, logits, mesh.cp.rank, gradients if first else {})


def whole_logits(parts: list[Measured], subject: Subject, case: Case) -> Tensor:
    """The logits of all sequences in sequence order, `[SEQUENCES, T, N]`, from every rank's share."""
    sequences = []
    for number in range(SEQUENCES):
        # Balanced, the documents decide who holds what.
        layout = Layout(sequence(subject, number, case.packed)[2], case.order, case.cp)
        holders = sorted((p for p in parts if number in p.logits), key=lambda p: p.cp_rank)
        sequences.append(layout.unshard([p.logits[number] for p in holders[: case.cp]], dim=0))
    return torch.stack(sequences)
