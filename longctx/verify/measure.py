"""Verification step: loss, logits, gradients and an optimizer step of a model on the ranks of a process group."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from longctx.data.loader import Sequence
from longctx.engines.base import Batch
from longctx.engines.torch_engine import TorchEngine
from longctx.kernels.loss import IGNORE
from longctx.model.config import ModelConfig
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh
from longctx.recipe.tables import OptimizerConfig, TrainConfig
from longctx.train.batches import to_batch
from longctx.verify.cases import SEQUENCES, Case, documents

Precision = Literal["fp64", "fp32", "bf16"]


@dataclass(frozen=True)
class Subject:
    """The model to verify, with its training options and inputs."""

    model: ModelConfig
    train: TrainConfig
    vocab_size: int
    length: int
    seed: int
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    own: tuple[Case, ...] = ()
    """The recipe's own layout, in both packings."""


@dataclass(frozen=True)
class RankResult:
    """One rank's result: the loss (the same on all ranks), the logits of its slices, and on the first rank of each
    replica all gradients and what a step with them leaves."""

    loss: float
    logits: dict[int, Tensor]
    """By sequence that this rank reads: `[T_local, N]` float64."""
    cp_rank: int
    gradients: dict[str, Tensor]
    step: dict[str, Tensor] = field(default_factory=dict)
    """`grad norm`, before clipping, and every parameter and its first moment after the step."""


def sequence(subject: Subject, number: int, packed: bool) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Generate random tokens and labels `[1, T]` of a sequence, and its document boundaries.

    Sequences differ in their number of labels, so that a mean over ranks instead of over labels is detected.
    """
    generator = torch.Generator().manual_seed(subject.seed + number)
    tokens = torch.randint(0, subject.vocab_size, (1, subject.length), generator=generator)
    bounds = documents(subject.length, packed, subject.seed + number)
    labels = torch.roll(tokens, -1, dims=1)
    labels[:, [end - 1 for end in bounds[1:]]] = IGNORE
    labels[:, : number * subject.length // 3] = IGNORE
    return tokens, labels, bounds


def measure(subject: Subject, case: Case, precision: Precision) -> RankResult:
    """Run the step of `case` on this rank of a CPU process group of `case.ranks`. Collective."""
    engine = engine_of(subject, case, precision)
    mesh = engine.mesh
    batches = {n: batch_of(subject, case, n, mesh) for n in range(mesh.dp.rank, SEQUENCES, mesh.dp.size)}
    with torch.no_grad():
        logits = {n: engine.model(b.tokens, b.layout)[0].double() for n, b in batches.items()}
    loss, *tensors = take_step(engine, list(batches.values()), subject.optimizer.lr)
    first = is_first_of_replica(case, mesh)
    gradients, step = ({name: x.double() for name, x in named.items()} if first else {} for named in tensors)
    return RankResult(loss, logits, mesh.cp.rank, gradients, step)


def engine_of(subject: Subject, case: Case, precision: Precision) -> TorchEngine:
    """Build the model in the layout of `case`, on a CPU process group of `case.ranks`. Collective."""
    axes = {name: getattr(case, name) for name in ("dp_replicate", "dp_shard", "cp", "ulysses", "ep")}
    mesh = Mesh.build("cpu", **axes)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    train = subject.train.model_copy(update={"precision": "bf16" if precision == "bf16" else "fp32"})
    return TorchEngine(
        subject.model, train, subject.optimizer, mesh, vocab_size=subject.vocab_size, seed=subject.seed, dtype=dtype
    )


def is_first_of_replica(case: Case, mesh: Mesh) -> bool:
    """Whether this rank returns the tensors of its replica, which all ranks of it gather."""
    return mesh.cp.rank == 0 and mesh.dp.rank % case.dp_shard == 0


def take_step(
    engine: TorchEngine, batches: list[Batch], lr: float
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Take an optimizer step: return the loss, the gradients, and the `grad norm`, parameters and moments after it."""
    loss, router_stats = engine.gradients(batches)
    gradients = {name: x.clone() for name, x in engine.named_gradients()}  # clipped in place by `update`
    norm = engine.grad_norm()
    engine.update(lr, router_stats, norm)
    return loss, gradients, {"grad norm": norm.double().cpu()} | {name: x.clone() for name, x in engine.named_updates()}


def batch_of(subject: Subject, case: Case, number: int, mesh: Mesh) -> Batch:
    """Shard a sequence to this rank of a mesh, as in training."""
    tokens, labels, bounds = sequence(subject, number, case.packed)
    return shard(Sequence(tokens[0], labels[0], torch.tensor(bounds), number), case, mesh)


def shard(drawn: Sequence, case: Case, mesh: Mesh) -> Batch:
    """Shard a sequence to this rank of a mesh in the layout of `case`, as in training."""
    return to_batch(drawn, mesh, case.order, mesh.device, attention=case.attention, states=case.states)


def gather_logits(results: list[RankResult], subject: Subject, case: Case) -> Tensor:
    """Assemble the logits of all sequences in sequence order, `[SEQUENCES, T, N]`, from the results of all ranks."""
    sequences = []
    for number in range(SEQUENCES):
        # In the balanced order, the shards depend on the documents.
        layout = Layout(sequence(subject, number, case.packed)[2], case.order, case.cp)
        shards = sorted((r for r in results if number in r.logits), key=lambda r: r.cp_rank)
        sequences.append(layout.unshard([r.logits[number] for r in shards[: case.cp]], dim=0))
    return torch.stack(sequences)
