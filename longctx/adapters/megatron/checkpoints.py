"""`sharded_state_dict` of a mixer for Megatron's distributed checkpoints: names independent of the parallel sizes."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

from longctx.mixers.shares import Share
from longctx.parallel.mesh import Axis


def mixer_sharded_state_dict(
    module: nn.Module,
    shares: Mapping[str, Share],
    prefix: str,
    offsets: tuple[Any, ...],
    metadata: dict[str, Any] | None,
    tp: Axis,
) -> dict[str, Any]:
    """Return the sharded state dict of a module whose parameters are sharded over tensor-parallel ranks by `shares`."""
    group = (metadata or {}).get("dp_cp_group")
    if group is None:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    replica = torch.distributed.get_rank(group)
    state_dict: dict[str, Any] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        share = shares.get(name)
        if share is None:
            state_dict[prefix + name] = ShardedTensor.from_rank_offsets(
                prefix + name, tensor, *offsets, replica_id=(0, tp.rank, replica), prepend_axis_num=len(offsets)
            )
        else:
            state_dict[prefix + name] = _by_projection(prefix + name, tensor, share, offsets, (0, 0, replica), tp)
    return state_dict


def _by_projection(
    key: str, tensor: Tensor, share: Share, offsets: tuple[Any, ...], replica_id: Any, tp: Axis
) -> ShardedTensorFactory:
    """Save each projection of a fused parameter as its own tensor, sharded by heads."""
    lengths = [part // tp.size for part in share.parts]
    rank_offsets = (*offsets, (share.dim + len(offsets), tp.rank, tp.size))

    def build(key: str, data: Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
        if flattened_range is not None:
            raise ValueError(
                f"checkpoint: {key} has several fused projections, which an optimizer format with flattened parameters "
                "cannot save; use another --dist-ckpt-optim format (fully_reshardable)"
            )
        return [
            ShardedTensor.from_rank_offsets(
                _projection_key(key, number, lengths),
                part,
                *rank_offsets,
                replica_id=replica_id,
                prepend_axis_num=len(offsets),
            )
            for number, part in enumerate(data.split(lengths, share.dim))
        ]

    def merge(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=share.dim)

    return ShardedTensorFactory(key, tensor, build, merge, replica_id)


def _projection_key(key: str, number: int, lengths: list[int]) -> str:
    return key if len(lengths) == 1 else f"{key}.{number}"
