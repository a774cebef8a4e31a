"""Reproducible engine: the same bits on any number of processes, by virtual ranks (`parallel.reproducible = P`).

Forward and backward passes are those of P context-parallel ranks (`longctx.parallel.virtual_ranks`), each on its own
copy of the modules with shared weights. Gradients, losses and router statistics of the (sequence, rank) pairs of a step
are summed in a binary tree over sequences and ranks, whichever processes hold them: a process has aligned subtrees.
Every process holds the whole model and steps it, with one thread per operator.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longctx.engines.base import Batch
from longctx.engines.router_stats import RouterStats
from longctx.engines.step import configure_activations, loss_scale, loss_share
from longctx.engines.torch_engine import TorchEngine
from longctx.errors import UserError
from longctx.model.config import ModelConfig
from longctx.model.decoder import Decoder, Losses
from longctx.parallel.collectives import exchange
from longctx.parallel.mesh import Axis, Mesh
from longctx.parallel.virtual_ranks import VirtualRanks
from longctx.recipe.tables import OptimizerConfig, TrainConfig


class ReproducibleEngine(TorchEngine):
    """The whole model on every process, computed by virtual ranks; gradients are summed in one order."""

    def __init__(
        self,
        model: ModelConfig,
        train: TrainConfig,
        optimizer: OptimizerConfig,
        mesh: Mesh,
        *,
        ranks: int,
        vocab_size: int,
        seed: int,
    ) -> None:
        """Build and initialise the model for `ranks` virtual ranks over the mesh's cp axis.

        Raises UserError on a GPU: which kernel multiplies, and so the order of its sums, is up to cuBLAS there.
        """
        if mesh.device_type != "cpu":
            raise UserError(f"parallel.reproducible: it is for CPUs, and this run is on {mesh.device_type}")
        # The number of threads changes the order of some sums.
        torch.set_num_threads(1)
        self._ranks = VirtualRanks(ranks, mesh.cp)
        virtual = tuple(
            replace(mesh, cp=Axis(ranks, rank.number, rank), ring=Axis(ranks, rank.number, rank))
            for rank in self._ranks.ranks
        )
        super().__init__(model, train, optimizer, replace(mesh, virtual=virtual), vocab_size=vocab_size, seed=seed)
        self._half = self._half_parameters() if train.precision == "bf16" else {}
        self._replicas = [self._replica(model, vocab_size) for _ in virtual]

    def _shard(self, decoder: Decoder) -> None:
        """Shard nothing."""

    def _half_parameters(self) -> dict[str, Tensor]:
        """Return bf16 copies of the parameters that are computed with in bf16: as under FSDP's mixed precision."""
        full = [name for name, m in self.model.named_modules() if getattr(m, "full_precision", False)]
        return {
            name: parameter.detach().to(torch.bfloat16)
            for name, parameter in self.model.named_parameters()
            if not any(name.startswith(f"{prefix}.") for prefix in full)
        }

    @torch.no_grad()
    def _round_parameters(self) -> None:
        """Copy the parameters to their bf16 copies."""
        for name, half in self._half.items():
            half.copy_(self.model.get_parameter(name))

    def _replica(self, model: ModelConfig, vocab_size: int) -> Decoder:
        """Return modules of their own, with parameters that share the weights and have gradients of their own."""
        with torch.device("meta"):
            replica = Decoder(model, vocab_size)
        configure_activations(replica, self.config)
        parameters: dict[int, nn.Parameter] = {}
        names = {id(p): name for name, p in self.model.named_parameters()}
        for name, master in self.model.named_parameters(remove_duplicate=False):
            if id(master) not in parameters:
                parameters[id(master)] = nn.Parameter(self._half.get(names[id(master)], master.detach()))
            module, _, attribute = name.rpartition(".")
            replica.get_submodule(module).register_parameter(attribute, parameters[id(master)])
        for name, buffer in self.model.named_buffers():
            module, _, attribute = name.rpartition(".")
            replica.get_submodule(module)._buffers[attribute] = buffer
        return replica

    def gradients(self, batches: Sequence[Batch]) -> tuple[float, RouterStats]:
        """As in `TorchEngine`, summed over virtual ranks and sequences in one order."""
        self._round_parameters()
        scale = loss_scale(batches, self.device)
        sequences = self.mesh.dp.size * sum(len(batch.tokens) for batch in batches)
        tree = _TreeSum()
        stats = RouterStats()
        for batch in batches:
            tasks = [
                _Task(replica, part, scale, sequences, self.config.loss_tile)
                for replica, part in zip(self._replicas, batch.virtual, strict=True)
            ]
            *_, (_, stats) = computed = self._ranks.run(_compute, tasks)
            tree.add(_over_processes(_pairwise([leaf for leaf, _ in computed])))
        total = tree.total()
        self._store(total)
        stats.sums = total.sums[1:]
        return float(total.sums[0]), stats

    def _store(self, total: "_Leaf") -> None:
        """Set the parameters' gradients, None for those that no rank has."""
        parameters = list(self.model.parameters())
        parts = total.gradients.split([p.numel() for p in parameters])
        for parameter, part, count in zip(parameters, parts, total.counts.tolist(), strict=True):
            parameter.grad = part.view_as(parameter) if count else None

    def _norm(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Compute the global gradient norm, float64, of whole gradients."""
        norms = torch._foreach_norm([g for g in gradients if g is not None])
        return torch.stack([norm.double() for norm in norms]).square().sum().sqrt()

    @torch.no_grad()
    def losses(self, batch: Batch) -> Losses:
        """As in `Engine`: by this process's own rank of the mesh, not by virtual ones."""
        model = self._replicas[0]
        model.eval()
        self._round_parameters()
        losses: Losses = model(batch.tokens, batch.layout, batch.labels, loss_tile=self.config.loss_tile)
        model.train()
        return losses

    def close(self) -> None:
        """Stop the virtual ranks' threads."""
        self._ranks.close()


@dataclass(frozen=True)
class _Task:
    """One virtual rank's part of a sequence."""

    model: Decoder
    batch: Batch
    scale: float
    sequences: int
    loss_tile: int


@dataclass(frozen=True)
class _Leaf:
    """What a virtual rank adds to a step's sums, or several of them."""

    gradients: Tensor
    """Of all parameters in their order, flat, float32."""
    counts: Tensor
    """`[parameters]` int64: how many ranks have a gradient."""
    sums: Tensor
    """The loss, then the router statistics, float64."""

    def __add__(self, other: "_Leaf") -> "_Leaf":
        pairs = zip(self.tensors, other.tensors, strict=True)
        return _Leaf(*(x + y for x, y in pairs))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All of it."""
        return self.gradients, self.counts, self.sums


def _compute(task: _Task) -> tuple[_Leaf, RouterStats]:
    """Run a virtual rank's forward and backward pass."""
    batch, model = task.batch, task.model
    losses: Losses = model(batch.tokens, batch.layout, batch.labels, loss_tile=task.loss_tile, scale=task.scale)
    loss_share(losses, batch, task.sequences).backward()
    stats = RouterStats()
    stats.add(losses.reports)
    flat, counts = [], []
    for parameter in model.parameters():
        counts.append(parameter.grad is not None)
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        flat.append(grad.float().flatten())
        parameter.grad = None
    sums = torch.cat([losses.total.detach().double().view(1), stats.sums])
    return _Leaf(torch.cat(flat), torch.tensor(counts, dtype=torch.int64), sums), stats


def _pairwise(leaves: Sequence[_Leaf]) -> _Leaf:
    """Sum neighbours, then neighbouring sums, and so on; the number of leaves is a power of two."""
    while len(leaves) > 1:
        leaves = [left + right for left, right in zip(leaves[::2], leaves[1::2], strict=True)]
    return leaves[0]


def _over_processes(leaf: _Leaf) -> _Leaf:
    """Sum over all processes, a power of two, as `_pairwise` does: in each round with the partner of the other half.

    The two halves of a sum are added in either order, to the same bits.
    """
    world = dist.group.WORLD
    assert world is not None
    size, rank, distance = dist.get_world_size(), dist.get_rank(), 1
    while distance < size:
        received = _Leaf(*(torch.empty_like(x) for x in leaf.tensors))
        for x, buffer in zip(leaf.tensors, received.tensors, strict=True):
            exchange({rank ^ distance: x}, {rank ^ distance: buffer}, world).wait()
        leaf, distance = leaf + received, 2 * distance
    return leaf


class _TreeSum:
    """Sum of leaves that come one by one, in a binary tree over their numbers: a binary counter of partial sums."""

    def __init__(self) -> None:
        self._partial: list[tuple[int, _Leaf]] = []

    def add(self, leaf: _Leaf) -> None:
        """Add the next leaf."""
        level = 0
        while self._partial and self._partial[-1][0] == level:
            leaf, level = self._partial.pop()[1] + leaf, level + 1
        self._partial.append((level, leaf))

    def total(self) -> _Leaf:
        """Return the sum of all leaves; those that are left over by halving are added from the last one on."""
        _, leaf = self._partial.pop()
        while self._partial:
            leaf = self._partial.pop()[1] + leaf
        return leaf
