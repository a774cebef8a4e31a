"""Megatron's batches as layouts: which tokens of which sequence a context-parallel rank has been given.

Megatron cuts a sequence into 2 cp chunks and gives rank r the chunks r and 2 cp - 1 - r; of a packed batch
(`PackedSeqParams` with `qkv_format="thd"`) it cuts every document so.
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
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Axis, Grid

MEGATRONS = {"p2p": "ring", "all_gather": "all-gather", "a2a": "ulysses", "a2a+p2p": "ulysses-ring"}
"""What Megatron calls the schedules in `cp_comm_type`."""


def attention_schedule(cp_comm_type: str | None) -> str:
    """The schedule of softmax layers that Megatron's `cp_comm_type` names, by its name or by ours.

    `auto`, the cheapest, where it says nothing. Raises ValueError for one that there is not.
    """
    name = MEGATRONS.get(cp_comm_type or "auto", cp_comm_type or "auto")
    if name not in SCHEDULES:
        raise ValueError(
            f"cp_comm_type: there is no schedule {cp_comm_type!r}; there are {', '.join(SCHEDULES)}, and Megatron's "
            f"names {', '.join(MEGATRONS)}"
        )
    return name


@dataclass(frozen=True)
class Groups:
    """The groups of a layer: Megatron's, as axes."""

    tp: Axis
    cp: Axis
    grid: Grid | None
    """cp as ulysses x ring, where `hierarchical_context_parallel_sizes` divides it in two."""

    @classmethod
    def of(cls, config: TransformerConfig, collection: Any) -> "Groups":
        """Of a `ProcessGroupCollection`, or Megatron's global groups where there is none."""
        if collection is None:
            collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp", "hcp"])
        tp, cp = (Axis.of(getattr(collection, name, None)) for name in ("tp", "cp"))
        levels = config.hierarchical_context_parallel_sizes or []
        if cp.size == 1 or len(levels) != 2:
            return cls(tp, cp, None)
        inner, outer = map(Axis.of, collection.hcp)
        return cls(tp, cp, Grid(inner.size, inner.group, outer.group))


@dataclass(frozen=True)
class Placement:
    """Megatron's rows of a batch, and the layout in which a layer of ours takes them."""

    layout: Layout
    take: Reorder | None = None
    """From Megatron's rows to the layout's; None where they are the same."""
    give: Reorder | None = None
    """And back."""

    def taken(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Megatron's rows `[b, s/cp, ...]` in the layout's order."""
        take = self.take
        return given if take is None else tuple(take(x, 1) for x in given)

    def given(self, x: Tensor) -> Tensor:
        """And back."""
        return x if self.give is None else self.give(x, 1)


class LayoutBatch(PackedSeqParams):  # type: ignore[misc]
    """A batch that lies over ranks as a layout of ours says, in the place of what Megatron says of documents."""

    def __init__(self, layout: Layout, weight: float) -> None:
        """`weight`: what layers' own losses of the batch are multiplied with, before Megatron divides gradients."""
        super().__init__(qkv_format="thd")
        self.placement, self.weight = Placement(layout), weight


@lru_cache(maxsize=8)
def placement(bounds: tuple[int, ...], packed: bool, groups: Groups, attention: str) -> Placement:
    """Of one sequence with these `cu_seqlens`: made once for all layers, which keep their plans with the layout."""
    cp = groups.cp
    if cp.size == 1:
        return Placement(Layout(bounds, attention=attention))
    if not packed:
        return Placement(Layout(bounds, "zigzag", cp.size, cp.rank, cp.group, grid=groups.grid, attention=attention))
    layout = Layout(bounds, "balanced", cp.size, cp.rank, cp.group, grid=groups.grid, attention=attention)
    have = [by_documents(bounds, cp.size, rank) for rank in range(cp.size)]
    want = [layout.seen_by(rank).tokens for rank in range(cp.size)]
    return Placement(layout, Reorder.of(have, want, cp), Reorder.of(want, have, cp))


def placed(rows: int, packed: PackedSeqParams | None, groups: Groups, attention: str) -> Placement:
    """Of a batch of which this rank has `rows` tokens."""
    if isinstance(packed, LayoutBatch):
        return packed.placement
    length = rows * groups.cp.size
    bounds = (0, length) if packed is None else packed_bounds(packed, length)
    return placement(bounds, packed is not None, groups, attention)


def by_documents(bounds: Sequence[int], size: int, rank: int) -> Tensor:
    """The tokens that Megatron gives a context-parallel rank of a packed batch, `[T / size]` int64: of every document
    the chunks `rank` and `2 size - 1 - rank` of 2 size.

    Raises ValueError where a document does not divide.
    """
    parts = []
    for begin, end in pairwise(bounds):
        chunk, rest = divmod(end - begin, 2 * size)
        if rest:
            raise ValueError(
                f"packed batch: a document of {end - begin} tokens does not divide into {2 * size} chunks for "
                f"{size} context-parallel ranks; pad it (cu_seqlens_q_padded)"
            )
        first, second = (begin + number * chunk for number in (rank, 2 * size - 1 - rank))
        parts += [torch.arange(first, first + chunk), torch.arange(second, second + chunk)]
    return torch.cat(parts)


def packed_bounds(packed: PackedSeqParams, length: int) -> tuple[int, ...]:
    """The `cu_seqlens` of a packed batch of `length` tokens over all ranks, on the host, without empty documents; read
    from the device once a batch. What lies behind the last document is one more.

    Padding at a document's end belongs to it: nothing before it sees it. Raises ValueError for another format, and for
    groups that change from batch to batch (`local_cp_size`).
    """
    if packed.qkv_format != "thd":
        raise ValueError(f"packed batch: qkv_format is {packed.qkv_format!r}; only 'thd' says where documents begin")
    if packed.local_cp_size is not None:
        raise ValueError("packed batch: hybrid context parallelism (local_cp_size) changes groups from batch to batch")
    held: tuple[int, ...] | None = getattr(packed, "_longctx_bounds", None)
    if held is None:
        padded = packed.cu_seqlens_q_padded
        given = (packed.cu_seqlens_q if padded is None else padded).tolist()
        held = tuple(dict.fromkeys([0, *given, length]))
        packed._longctx_bounds = held
    return held
