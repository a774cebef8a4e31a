"""`deepspeed.initialize` over a mesh."""

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from longctx.adapters.deepspeed.groups import Groups
from longctx.adapters.deepspeed.runtime import begin, partition
from longctx.parallel.mesh import Mesh


def initialize(model: nn.Module, mesh: Mesh, *, config: dict[str, Any], **arguments: Any) -> Any:
    """What `deepspeed.initialize(model=model, config=config, **arguments)` gives, over the ranks of `mesh`: gradients
    are reduced, and parameters divided, over data- and context-parallel ranks together.

    DeepSpeed (0.19.8) by itself divides the parameters of a model over the data-parallel ranks alone in ZeRO 3, and
    context-parallel ranks then drift apart; here they are divided first. Raises ValueError where they have been
    divided over other ranks, and for an `mpu` besides.
    """
    if "mpu" in arguments:
        raise ValueError("initialize: mpu: its groups are made of the mesh")
    begin(mesh.device_type)
    groups = Groups(mesh)
    if config.get("zero_optimization", {}).get("stage", 0) == 3:
        for name, parameter in model.named_parameters():
            group = getattr(parameter, "ds_process_group", None)
            if group is not None and dist.get_world_size(group) != dist.get_world_size():
                raise ValueError(
                    f"initialize: {name} is divided over {dist.get_world_size(group)} of {dist.get_world_size()} "
                    "ranks: make the model outside of deepspeed.zero.Init, or with its default group"
                )
        partition(model, config, _dtype(config), groups)
    return deepspeed.initialize(model=model, config=config, mpu=groups, **arguments)


def _dtype(config: dict[str, Any]) -> torch.dtype:
    """Of the parameters that are computed with."""
    if config.get("bf16", config.get("bfloat16", {})).get("enabled", False):
        return torch.bfloat16
    return torch.float16 if config.get("fp16", {}).get("enabled", False) else torch.float32
