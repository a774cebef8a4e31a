"""Megatron batches as layouts: the tokens that each context-parallel rank holds.

Megatron cuts a sequence into 2 cp chunks and assigns chunks r and 2 cp - 1 - r to rank r (zigzag); of packed sequences
(`PackedSeqParams` with `qkv_format="thd"`) it cuts every document that way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from longctx.parallel.all_to_all_reorder import Reorder
from longctx.parallel.attention.api import SCHEDULES
from longctx.parallel.layout import Layout, Order
from longctx.parallel.mesh import Axis, Grid

MEGATRON_SCHEDULES = {"p2p": "ring", "all_gather": "all-gather", "a2a": "ulysses", "a2a+p2p": "ulysses-ring"}
"""Megatron's `cp_comm_type` to the names of `longctx.parallel.attention.SCHEDULES`."""


def attention_schedule(cp_comm_type: str | None) -> str:
    """Return the attention schedule for a `cp_comm_type`, Megatron's name or longctx's; None: `auto`, the cheapest.

    Raises ValueError for an unknown one.
    """
    name = MEGATRON_SCHEDULES.get(cp_comm_type or "auto", cp_comm_type or "auto")
    if name not in SCHEDULES:
        raise ValueError(
            f"cp_comm_type is {cp_comm_type!r}: expected one of {', '.join(SCHEDULES)}, or Megatron's "
            f"{', '.join(MEGATRON_SCHEDULES)}"
        )
    return name


@dataclass(frozen=True)
class Groups:
    """Megatron's tensor- and context-parallel groups of a layer, as axes."""

    tp: Axis
    cp: Axis
    grid: Grid | None
    """cp as ulysses x ring, if `hierarchical_context_parallel_sizes` has two levels."""

    @classmethod
    def from_collection(cls, config: TransformerConfig, collection: Any) -> "Groups":
        """Take the groups of a `ProcessGroupCollection`; None: Megatron's global `parallel_state` groups."""
        if collection is None:
            collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp", "hcp"])
        tp, cp = (Axis.from_group(getattr(collection, name, None)) for name in ("tp", "cp"))
        levels = config.hierarchical_context_parallel_sizes or []
        if cp.size == 1 or len(levels) != 2:
            return cls(tp, cp, None)
        inner, outer = map(Axis.from_group, collection.hcp)
        return cls(tp, cp, Grid(inner.size, inner.group, outer.group))


@dataclass(frozen=True)
class BatchLayout:
    """The layout in which longctx computes a batch, and the all-to-alls between Megatron's token order and it."""

    layout: Layout
    reorder: Reorder | None = None
    """From Megatron's rows to the layout's; None if they are the same."""
    restore: Reorder | None = None
    """The inverse."""

    def to_layout(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Reorder tensors `[b, s/cp, ...]` from Megatron's rows to the layout's."""
        reorder = self.reorder
        return tensors if reorder is None else tuple(reorder(x, 1) for x in tensors)

    def to_megatron(self, x: Tensor) -> Tensor:
        """Reorder a tensor from the layout's rows back to Megatron's."""
        return x if self.restore is None else self.restore(x, 1)


class LayoutPackedSeqParams(PackedSeqParams):  # type: ignore[misc]
    """`packed_seq_params` of a batch that is already sharded by a longctx layout."""

    def __init__(self, layout: Layout, auxiliary_loss_scale: float) -> None:
        """`auxiliary_loss_scale`: factor of the layers' auxiliary losses, before Megatron scales gradients."""
        super().__init__(qkv_format="thd")
        self.batch_layout, self.auxiliary_loss_scale = BatchLayout(layout), auxiliary_loss_scale


@lru_cache(maxsize=8)
def _cached_batch_layout(cu_seqlens: tuple[int, ...], packed: bool, groups: Groups, attention: str) -> BatchLayout:
    """Build the layout once for all layers, which cache their plans in it."""
    cp = groups.cp
    if cp.size == 1:
        return BatchLayout(Layout(cu_seqlens, attention=attention))
    order: Order = "balanced" if packed else "zigzag"
    layout = Layout(cu_seqlens, order, cp.size, cp.rank, cp.group, grid=groups.grid, attention=attention)
    if not packed:
        return BatchLayout(layout)
    have = [thd_partitioned_indices(cu_seqlens, cp.size, rank) for rank in range(cp.size)]
    want = [layout.for_rank(rank).tokens for rank in range(cp.size)]
    return BatchLayout(layout, Reorder.plan(have, want, cp), Reorder.plan(want, have, cp))


def batch_layout(rows: int, packed: PackedSeqParams | None, groups: Groups, attention: str) -> BatchLayout:
    """Return the layout of a batch of which this rank has `rows` tokens per sequence."""
    if isinstance(packed, LayoutPackedSeqParams):
        return packed.batch_layout
    length = rows * groups.cp.size
    cu_seqlens = (0, length) if packed is None else packed_cu_seqlens(packed, length)
    return _cached_batch_layout(cu_seqlens, packed is not None, groups, attention)


def thd_partitioned_indices(cu_seqlens: Sequence[int], size: int, rank: int) -> Tensor:
    """Return the tokens that Megatron assigns to a context-parallel rank of packed sequences (THD), `[T / size]` int64.

    These are the chunks `rank` and `2 size - 1 - rank` of 2 size, of every document. Raises ValueError if a document is
    not divisible.
    """
    parts = []
    for begin, end in pairwise(cu_seqlens):
        chunk, rest = divmod(end - begin, 2 * size)
        if rest:
            raise ValueError(
                f"packed sequences: a document of {end - begin} tokens is not divisible into {2 * size} chunks for "
                f"{size} context-parallel ranks; pad it (cu_seqlens_q_padded)"
            )
        first, second = (begin + number * chunk for number in (rank, 2 * size - 1 - rank))
        parts += [torch.arange(first, first + chunk), torch.arange(second, second + chunk)]
    return torch.cat(parts)


def packed_cu_seqlens(packed: PackedSeqParams, length: int) -> tuple[int, ...]:
    """Return the `cu_seqlens` of packed sequences of `length` tokens over all ranks, on the host; cached in `packed`.

    Empty documents are dropped; tokens after the last document are one more document. Padding at the end of a document
    counts as part of it: no earlier token attends to it. Raises ValueError for another format than THD, and for hybrid
    context parallelism (`local_cp_size`).
    """
    if packed.qkv_format != "thd":
        raise ValueError(f"packed sequences: qkv_format is {packed.qkv_format!r}: expected 'thd'")
    if packed.local_cp_size is not None:
        raise ValueError("packed sequences: hybrid context parallelism (local_cp_size) is not supported")
    cu_seqlens: tuple[int, ...] | None = getattr(packed, "_longctx_cu_seqlens", None)
    if cu_seqlens is None:
        padded = packed.cu_seqlens_q_padded
        values = (packed.cu_seqlens_q if padded is None else padded).tolist()
        cu_seqlens = tuple(dict.fromkeys([0, *values, length]))
        packed._longctx_cu_seqlens = cu_seqlens
    return cu_seqlens
