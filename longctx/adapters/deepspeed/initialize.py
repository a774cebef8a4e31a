"""`deepspeed.initialize` over a mesh: ZeRO over data- and context-parallel ranks together."""

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from longctx.adapters.deepspeed.groups import Groups
from longctx.adapters.deepspeed.runtime import init_distributed, partition_parameters
from longctx.parallel.mesh import Mesh


def initialize(model: nn.Module, mesh: Mesh, *, config: dict[str, Any], **arguments: Any) -> Any:
    """Call `deepspeed.initialize(model=model, config=config, **arguments)` over the ranks of `mesh`.

    Gradients are reduced, and parameters partitioned, over data- and context-parallel ranks together. By itself
    DeepSpeed (0.19.8) partitions a ZeRO 3 model over only the data-parallel ranks, and context-parallel ranks then
    drift apart; here parameters are partitioned first. Raises ValueError if they are already partitioned over other
    ranks, and for an `mpu` argument.
    """
    if "mpu" in arguments:
        raise ValueError("initialize: mpu: the groups come from the mesh; leave mpu out")
    init_distributed(mesh.device_type)
    groups = Groups(mesh)
    if config.get("zero_optimization", {}).get("stage", 0) == 3:
        for name, parameter in model.named_parameters():
            group = getattr(parameter, "ds_process_group", None)
            if group is not None and dist.get_world_size(group) != dist.get_world_size():
                raise ValueError(
                    f"initialize: {name} is partitioned over {dist.get_world_size(group)} of {dist.get_world_size()} "
                    "ranks: build the model outside deepspeed.zero.Init, or with its default group"
                )
        partition_parameters(model, config, _parameter_dtype(config), groups)
    return deepspeed.initialize(model=model, config=config, mpu=groups, **arguments)


def _parameter_dtype(config: dict[str, Any]) -> torch.dtype:
    """Return the dtype of the parameters in the forward pass."""
    if config.get("bf16", config.get("bfloat16", {})).get("enabled", False):
        return torch.bfloat16
    return torch.float16 if config.get("fp16", {}).get("enabled", False) else torch.float32
