"""Gradient accumulation and the loss of one step, exactly as one rank would have it; shared by the engines.

A step's loss is the summed negative log likelihood of all its tokens on all ranks, divided by the number of labels
among them, and each router's losses, divided by the number of sequences. Each rank divides its own sum by that global
number, and gradients are *summed* over ranks, so that the result does not depend on how tokens lie over ranks.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from longctx.engines.base import Batch
from longctx.engines.router_stats import Routing
from longctx.kernels.loss import IGNORE
from longctx.model.decoder import Block, Decoder, Losses
from longctx.model.moe import MixtureOfExperts
from longctx.parallel.collectives import all_reduce
from longctx.parallel.mesh import Mesh
from longctx.recipe.tables import TrainConfig


def save_memory(decoder: Decoder, train: TrainConfig) -> None:
    """Set which activations are kept, and how many exist at one time."""
    for block in decoder.blocks:
        assert isinstance(block, Block)
        block.recompute = train.activation_checkpointing == "block"
        if block.ffn is not None:
            block.ffn.tile = None if train.ffn_tile == "none" else train.ffn_tile


def decayed(decoder: nn.Module) -> set[str]:
    """The names of the parameters that weight decay acts on: matrices, which no bias is."""
    exempt = {id(m.bias) for m in decoder.modules() if isinstance(getattr(m, "bias", None), nn.Parameter)}
    return {name for name, p in decoder.named_parameters() if p.ndim >= 2 and id(p) not in exempt}


def accumulate(
    batches: Sequence[Batch],
    mesh: Mesh,
    device: torch.device,
    forward: Callable[[Batch, float], Losses],
    backward: Callable[[Tensor], object],
) -> tuple[float, Routing]:
    """Accumulate the gradients of a step's loss; the mean loss over all labels in all ranks' `batches`, in nats, and
    what the routers say, both over all ranks.

    The step's loss is that mean, plus the routers' losses, each the mean over all sequences. `forward` gives a batch's
    losses, scaled; `backward` is given this rank's share of the step's loss, batch by batch, and the gradient is the
    sum over batches and ranks. Every rank has to give equally many batches.
    """
    labels = torch.tensor(float(sum(int((b.labels != IGNORE).sum()) for b in batches)), dtype=torch.float64)
    # A number: a tensor among a model's inputs would be rounded to the precision of the model.
    share = 1 / max(all_reduce(labels.to(device)).item(), 1.0)
    sequences = mesh.dp.size * sum(len(batch.tokens) for batch in batches)
    summed = torch.zeros((), dtype=torch.float64, device=device)
    routing = Routing()
    for batch in batches:
        said = forward(batch, share)
        whole = said.total
        for report in said.reports.values():
            # A router sums over the batch's rows as over one sequence.
            whole = whole + report.loss * (len(batch.tokens) / sequences)
        backward(whole)
        summed += said.total.detach()
        routing.add(said.reports)
    routing.sum_over_ranks(device)
    return all_reduce(summed).item(), routing


def balance(decoder: nn.Module, routing: Routing) -> None:
    """After a step: move what keeps the experts' load even without a loss."""
    for name, routed in routing.layers.items():
        layer = decoder.get_submodule(name)
        if isinstance(layer, MixtureOfExperts):
            layer.after_step(routed.counts)
