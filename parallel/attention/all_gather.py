"""All-gather attention (Llama 3; LASP-2H): gather all keys and values, a slice of heads at a time.

While one slice of the key/value heads is computed with, the next one is gathered, so two slices of all keys are in
memory instead of all heads. The backward pass gathers again, which is cheaper than keeping them, and reduce-scatters
the gradients to the owners of the keys. With grouped-query attention the payload is small: `B * T_local * H_kv * (K+V)`
elements per rank.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longctx.kernels.attention import block as attention
from longctx.kernels.dtypes import accumulation_dtype
from longctx.parallel.attention.visibility import KVOwners, VisibleBlock
from longctx.parallel.collectives import Pending, all_gather, reduce_scatter

HEAD_SLICES = 4
"""The most slices in which key/value heads are gathered."""


class AllGatherSchedule:
    """All-gather among KV owners, for one of them."""

    def __init__(
        self,
        owners: KVOwners,
        group: ProcessGroup | None,
        block: VisibleBlock | None,
        routed: Mapping[int, VisibleBlock | None] | None = None,
    ) -> None:
        """`group` has the owners in order; None where there is only one. `block` is of this owner's queries and the
        keys of the whole sequence, and `routed` the same by the first key/value head of a slice, where each head has
        its own queries."""
        self.owners, self.group, self.block, self.routed_blocks = owners, group, block, routed or {}

    @classmethod
    def of(cls, owners: KVOwners, index: int, group: ProcessGroup | None, device: torch.device) -> "AllGatherSchedule":
        """Plan the schedule for owner `index`."""
        return cls(owners, group, owners.block(owners.tokens(index), torch.arange(owners.layout.length), device))

    def routed(self, places: Tensor) -> "AllGatherSchedule":
        """Return the schedule for each head's own queries, at places `[B, H, Tq]` of the sequence."""
        keys = torch.arange(self.owners.layout.length)
        # Made once for the forward and the backward pass.
        blocks = {heads.start: self.owners.routed(places[:, heads], keys) for heads in self._slices(places.shape[1])}
        return AllGatherSchedule(self.owners, self.group, self.block, blocks)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return out `[B, T_o, H, V]` in q's dtype and lse `[B, H, T_o]`, for tensors of this owner's T_o rows."""
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        lse_dtype = accumulation_dtype(q.dtype)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=lse_dtype, device=q.device)
        group = q.shape[2] // k.shape[2]
        slices = self._slices(k.shape[2])
        keys, values = self._in_sequence(self._gather(k, v, slices[0]).wait(), k.shape[3])
        for kv_heads, following in zip(slices, [*slices[1:], None], strict=True):
            incoming = None if following is None else self._gather(k, v, following)
            q_heads = slice(kv_heads.start * group, kv_heads.stop * group)
            block = self.routed_blocks.get(kv_heads.start, self.block)
            if block is not None:
                at = block.queries
                block_out, block_lse = attention.forward(q[:, at, q_heads], keys, values, block.mask, scale)
                out[:, at, q_heads], lse[:, q_heads, at] = block_out, block_lse
            if incoming is not None:
                keys, values = self._in_sequence(incoming.wait(), k.shape[3])
        return out, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv of this owner's rows."""
        dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
        group = q.shape[2] // k.shape[2]
        slices = self._slices(k.shape[2])
        keys, values = self._in_sequence(self._gather(k, v, slices[0]).wait(), k.shape[3])
        returning: Pending[Tensor] | None = None
        returning_heads = slice(0, 0)
        for kv_heads, following in zip(slices, [*slices[1:], None], strict=True):
            incoming = None if following is None else self._gather(k, v, following)
            dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
            q_heads = slice(kv_heads.start * group, kv_heads.stop * group)
            block = self.routed_blocks.get(kv_heads.start, self.block)
            if block is not None:
                at = block.queries
                dq[:, at, q_heads], dkeys, dvalues = attention.backward(
                    do[:, at, q_heads],
                    q[:, at, q_heads],
                    keys,
                    values,
                    out[:, at, q_heads],
                    lse[:, q_heads, at],
                    block.mask,
                    scale,
                )
            if returning is not None:  # gradients of the previous slice, which travelled during this computation
                _store(dk, dv, returning_heads, returning.wait())
            returning, returning_heads = self._reduce_scatter(dkeys, dvalues, accumulation_dtype(q.dtype)), kv_heads
            if incoming is not None:
                keys, values = self._in_sequence(incoming.wait(), k.shape[3])
        if returning is not None:
            _store(dk, dv, returning_heads, returning.wait())
        return dq, dk, dv

    def _slices(self, heads: int) -> list[slice]:
        """Divide the key/value heads into those that are gathered together: all of them, where nothing travels."""
        if self.group is None:
            return [slice(0, heads)]
        size = -(-heads // min(HEAD_SLICES, heads))
        return [slice(first, min(first + size, heads)) for first in range(0, heads, size)]

    def _gather(self, k: Tensor, v: Tensor, heads: slice) -> Pending[Tensor]:
        """Start to gather a slice of heads from all owners: `[owners, B, T_o, heads, K + V]`."""
        both = torch.cat([k[:, :, heads], v[:, :, heads]], dim=3)
        return _local(both[None]) if self.group is None else all_gather(both, self.group)

    def _reduce_scatter(self, dkeys: Tensor, dvalues: Tensor, dtype: torch.dtype) -> Pending[Tensor]:
        """Start to sum the gradients of a slice of heads at the owners of the keys: `[B, T_o, heads, K + V]`."""
        both = self._by_owner(torch.cat([dkeys, dvalues], dim=3).to(dtype))
        return _local(both[0]) if self.group is None else reduce_scatter(both, self.group)

    def _in_sequence(self, x: Tensor, key_dim: int) -> tuple[Tensor, Tensor]:
        """Put gathered rows `[owners, B, T_o, heads, K + V]` in sequence order, without padding: keys and values."""
        step = self.owners.layout.piece_length
        pieces = [x[owner, :, index * step : (index + 1) * step] for owner, index in self.owners.piece_locations]
        both = torch.cat(pieces, dim=1)[:, : self.owners.layout.length]
        return both[..., :key_dim], both[..., key_dim:]

    def _by_owner(self, x: Tensor) -> Tensor:
        """Cut a sequence `[B, T, ...]` into the rows of each owner, `[owners, B, T_o, ...]`, with zeros as padding."""
        layout, step = self.owners.layout, self.owners.layout.piece_length
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, layout.pieces * step - layout.length))
        by_owner = [
            torch.cat([x[:, n * step : (n + 1) * step] for n in numbers], dim=1) for numbers in self.owners.pieces
        ]
        return torch.stack(by_owner)


def _local(x: Tensor) -> Pending[Tensor]:
    """Wrap a result that needs no communication."""
    return Pending("local", [], x, None)


def _store(dk: Tensor, dv: Tensor, heads: slice, both: Tensor) -> None:
    """Store the gradients of a slice of heads."""
    dk[:, :, heads], dv[:, :, heads] = both.split([dk.shape[3], dv.shape[3]], dim=3)
