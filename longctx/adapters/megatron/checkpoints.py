"""Megatron's distributed checkpoints of a mixer: each parameter under one name, whatever the parallel sizes."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

from longctx.mixers.shares import Share
from longctx.parallel.mesh import Axis


def sharded(
    module: nn.Module,
    shares: Mapping[str, Share],
    prefix: str,
    offsets: tuple[Any, ...],
    metadata: dict[str, Any] | None,
    tp: Axis,
) -> dict[str, Any]:
    """The sharded state of a module whose parameters tensor-parallel ranks divide as `shares` say."""
    group = (metadata or {}).get("dp_cp_group")
    if group is None:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    replica = torch.distributed.get_rank(group)
    found: dict[str, Any] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        share = shares.get(name)
        if share is None:
            found[prefix + name] = ShardedTensor.from_rank_offsets(
                prefix + name, tensor, *offsets, replica_id=(0, tp.rank, replica), prepend_axis_num=len(offsets)
            )
        else:
            found[prefix + name] = _parts(prefix + name, tensor, share, offsets, (0, 0, replica), tp)
    return found


def _parts(
    key: str, tensor: Tensor, share: Share, offsets: tuple[Any, ...], replica_id: Any, tp: Axis
) -> ShardedTensorFactory:
    """One tensor for each projection that lies in the parameter, divided in order of heads."""
    lengths = [part // tp.size for part in share.parts]
    where = (*offsets, (share.dim + len(offsets), tp.rank, tp.size))

    def build(key: str, data: Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
        if flattened_range is not None:
            raise ValueError(
                f"checkpoint: {key} is of several projections, and an optimizer that flattens parameters "
                "cannot save it; take another --dist-ckpt-optim format (fully_reshardable)"
            )
        return [
            ShardedTensor.from_rank_offsets(
                _named(key, number, lengths), part, *where, replica_id=replica_id, prepend_axis_num=len(offsets)
            )
            for number, part in enumerate(data.split(lengths, share.dim))
        ]

    def merge(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=share.dim)

    return ShardedTensorFactory(key, tensor, build, merge, replica_id)


def _named(key: str, number: int, lengths: list[int]) -> str:
    return key if len(lengths) == 1 else f"{key}.{number}"
