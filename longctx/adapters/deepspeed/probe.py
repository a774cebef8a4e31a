"""By what DeepSpeed multiplies gradients, measured.

Its ZeRO stages average over ranks in different ways (0.19.8: stages 0 to 2 divide by the data-parallel ranks, stage 3
by the context-parallel ones too), and another version may do it otherwise. A parameter of which every batch of every
rank reads one number of its own tells, before the first step, what becomes of each batch's gradient.
"""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longctx.adapters.deepspeed.groups import Groups
from longctx.adapters.deepspeed.partitions import gradient
from longctx.adapters.deepspeed.runtime import Wrapped, Zero, begin, partition
from longctx.errors import UserError
from longctx.parallel.mesh import Mesh

TOLERANCE = 1e-4
"""Relative, between batches."""


class _Probe(nn.Module):
    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(numbers))

    def forward(self, number: int) -> Tensor:
        return self.weight[number]


def gradient_scale(zero: Zero, groups: Groups, batches: int, device: torch.device) -> float:
    """By what the gradient is multiplied that ranks make of `batches` batches each in a step, next to their sum.

    In an engine of its own, with the same settings and groups; every rank calls it. Raises UserError where batches or
    ranks count differently, which no factor can correct.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    probe = _Probe(ranks * batches).to(device)
    optimizer = torch.optim.AdamW(list(probe.parameters()), fused=True)
    if zero.stage == 3:
        partition(probe, zero.settings, zero.dtype, groups)
    wrapped = Wrapped(probe, optimizer, zero, groups)
    try:
        for number in range(batches):
            wrapped.begin_batch(last=number == batches - 1)
            wrapped.backward(wrapped.engine(rank * batches + number))
        scales = gradient(probe.weight).reshape(ranks, batches).double().cpu()
    finally:
        wrapped.engine.destroy()
    scale = scales.mean().item()
    if not (scales - scale).abs().max() <= TOLERANCE * abs(scale):
        raise UserError(
            f"DeepSpeed's ZeRO stage {zero.stage} multiplies the gradients of {batches} batches on each of {ranks} "
            f"ranks by {scales.tolist()}, a row for each rank: they have to count equally. Take another zero_stage"
        )
    return scale


def gradients_of(stage: int, mesh: Mesh) -> Literal["mean", "sum"]:
    """What ZeRO makes of the gradients of a mesh's context-parallel ranks, measured: for `gradients` of
    `longctx.adapters.huggingface.parallelize`. Those of data-parallel ranks are averaged in both cases.

    Every rank calls it. Raises UserError where it is neither.
    """
    begin(mesh.device_type)
    scale = gradient_scale(Zero(stage, bucket=1), Groups(mesh), 1, mesh.device) * mesh.dp.size
    made: dict[Literal["mean", "sum"], float] = {"sum": 1.0, "mean": 1 / mesh.cp.size}
    for name, wanted in made.items():
        if abs(scale - wanted) <= TOLERANCE * wanted:
            return name
    raise UserError(
        f"DeepSpeed's ZeRO stage {stage} makes {scale:.6g} times the sum of the gradients of {mesh.cp.size} "
        f"context-parallel ranks, which is neither their sum nor their mean. Take another stage"
    )
