"""Gradient accumulation and the exact global loss of a step; shared by the torch and DeepSpeed engines.

A step's loss is the negative log likelihood summed over all tokens on all ranks, divided by the global number of
labels, plus each router's auxiliary losses, divided by the global number of sequences. Each rank divides its own sum by
these global counts, and gradients are *summed* over ranks, so the result does not depend on how tokens are sharded.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from longctx.engines.base import Batch
from longctx.engines.router_stats import RouterStats
from longctx.kernels.loss import IGNORE
from longctx.model.decoder import Block, Decoder, Losses
from longctx.model.moe import MixtureOfExperts
from longctx.parallel.collectives import all_reduce
from longctx.parallel.mesh import Mesh
from longctx.recipe.tables import TrainConfig


def configure_activations(decoder: Decoder, train: TrainConfig) -> None:
    """Apply activation checkpointing and feed-forward tiling to every block."""
    for block in decoder.blocks:
        assert isinstance(block, Block)
        block.recompute = train.activation_checkpointing == "block"
        if block.ffn is not None:
            block.ffn.tile = None if train.ffn_tile == "none" else train.ffn_tile


def weight_decay_names(decoder: nn.Module) -> set[str]:
    """Return the names of the parameters with weight decay: all with two or more dimensions, except biases."""
    exempt = {id(m.bias) for m in decoder.modules() if isinstance(getattr(m, "bias", None), nn.Parameter)}
    return {name for name, p in decoder.named_parameters() if p.ndim >= 2 and id(p) not in exempt}


def accumulate_gradients(
    batches: Sequence[Batch],
    mesh: Mesh,
    device: torch.device,
    forward: Callable[[Batch, float], Losses],
    backward: Callable[[Tensor], object],
) -> tuple[float, RouterStats]:
    """Accumulate a step's gradients over `batches`; return the mean loss over all labels (nats) and the router
    statistics, both over all ranks.

    The step's loss is that mean plus the routers' auxiliary losses, each averaged over all sequences. `forward(batch,
    scale)` returns a batch's scaled losses; `backward` receives this rank's share of the step's loss, batch by batch,
    and the gradient is the sum over batches and ranks. Every rank must pass the same number of batches.
    """
    scale = loss_scale(batches, device)
    sequences = mesh.dp.size * sum(len(batch.tokens) for batch in batches)
    summed = torch.zeros((), dtype=torch.float64, device=device)
    router_stats = RouterStats()
    for batch in batches:
        losses = forward(batch, scale)
        backward(loss_share(losses, batch, sequences))
        summed += losses.total.detach()
        router_stats.add(losses.reports)
    router_stats.sum_over_ranks(device)
    return all_reduce(summed).item(), router_stats


def loss_scale(batches: Sequence[Batch], device: torch.device) -> float:
    """Return 1 / the number of labels of a step over all ranks; 1 without labels. Collective."""
    # Summed on the device: the host waits once, for the number of all ranks.
    counts = [(batch.labels != IGNORE).sum() for batch in batches]
    labels = torch.stack(counts).sum().to(device, torch.float64) if counts else torch.zeros((), device=device)
    # A Python float: FSDP would cast a tensor input to the model's precision.
    return 1 / max(all_reduce(labels).item(), 1.0)


def loss_share(losses: Losses, batch: Batch, sequences: int) -> Tensor:
    """Return a batch's share of the loss of a step of so many sequences: that of its labels and of its routers."""
    loss = losses.total
    for report in losses.reports.values():
        # A router sums over the batch's rows as over one sequence.
        loss = loss + report.loss * (len(batch.tokens) / sequences)
    return loss


def update_router_biases(decoder: nn.Module, router_stats: RouterStats) -> None:
    """Update the routing biases of auxiliary-loss-free load balancing, after an optimizer step."""
    for name, sums in router_stats.layers.items():
        layer = decoder.get_submodule(name)
        if isinstance(layer, MixtureOfExperts):
            layer.after_step(sums.counts)
