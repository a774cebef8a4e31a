"""Gradient scale of DeepSpeed's ZeRO stages, measured: the factor between its gradients and their sum over ranks.

The stages average over different ranks (0.19.8: stages 0 to 2 divide by the data-parallel ranks, stage 3 by the
context-parallel ranks too), and other versions may differ. Before the first step, a probe parameter with one element
per micro-batch and rank shows what happens to each micro-batch's gradient.
"""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longctx.adapters.deepspeed.groups import Groups
from longctx.adapters.deepspeed.runtime import DeepSpeedModel, ZeroSettings, init_distributed, partition_parameters
from longctx.adapters.deepspeed.zero_state import full_gradient
from longctx.errors import UserError
from longctx.parallel.mesh import Mesh

TOLERANCE = 1e-4
"""Relative difference between micro-batches that counts as rounding."""


class _Probe(nn.Module):
    def __init__(self, elements: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(elements))

    def forward(self, element: int) -> Tensor:
        return self.weight[element]


def gradient_scale(zero: ZeroSettings, groups: Groups, batches: int, device: torch.device) -> float:
    """Measure the factor between DeepSpeed's gradient of a step with `batches` micro-batches and its sum over ranks.

    Uses a separate engine with the same settings and groups; every rank has to call it. Raises UserError if
    micro-batches or ranks have different factors, which the loss cannot correct.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    probe = _Probe(ranks * batches).to(device)
    optimizer = torch.optim.AdamW(list(probe.parameters()), fused=True)
    if zero.stage == 3:
        partition_parameters(probe, zero.config, zero.dtype, groups)
    wrapped = DeepSpeedModel(probe, optimizer, zero, groups)
    try:
        for number in range(batches):
            wrapped.begin_batch(last=number == batches - 1)
            wrapped.backward(wrapped.engine(rank * batches + number))
        scales = full_gradient(probe.weight).reshape(ranks, batches).double().cpu()
    finally:
        wrapped.engine.destroy()
    scale = scales.mean().item()
    if not (scales - scale).abs().max() <= TOLERANCE * abs(scale):
        raise UserError(
            f"DeepSpeed's ZeRO stage {zero.stage} multiplies the gradients of {batches} batches on each of {ranks} "
            f"ranks by {scales.tolist()}, one row per rank: the factors have to be equal. Use another zero_stage"
        )
    return scale


def gradients_of(stage: int, mesh: Mesh) -> Literal["mean", "sum"]:
    """Measure whether a ZeRO stage sums or averages the gradients of a mesh's context-parallel ranks.

    The result is the argument `gradients` of `longctx.adapters.huggingface.parallelize`. Gradients of data-parallel
    ranks are averaged in both cases. Every rank has to call it. Raises UserError if it is neither.
    """
    init_distributed(mesh.device_type)
    scale = gradient_scale(ZeroSettings(stage, bucket=1), Groups(mesh), 1, mesh.device) * mesh.dp.size
    expected: dict[Literal["mean", "sum"], float] = {"sum": 1.0, "mean": 1 / mesh.cp.size}
    for name, factor in expected.items():
        if abs(scale - factor) <= TOLERANCE * factor:
            return name
    raise UserError(
        f"DeepSpeed's ZeRO stage {stage} multiplies the sum of the gradients of {mesh.cp.size} context-parallel ranks "
        f"by {scale:.6g}, which is neither their sum nor their mean. Use another stage"
    )
