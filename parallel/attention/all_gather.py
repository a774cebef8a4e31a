"""Softmax attention by gathering keys and values (Llama 3; LASP-2H), a slice of heads at a time.

While one slice of the key/value heads is computed with the next one is gathered, so that two slices of all keys are in
memory and not all heads. Backward gathers again, which is cheaper than keeping them, and scatters the gradients' sums
back to where the keys live. With grouped heads the payload is small: `B * T_local * H_kv * (K + V)` numbers a rank.
"""

from collections.abc import Iterator
from copy import copy

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longctx.kernels.attention import block as attention
from longctx.kernels.dtypes import accumulation_dtype
from longctx.parallel.attention.visibility import KVOwners, VisibleBlock
from longctx.parallel.collectives import Pending, all_gather, reduce_scatter

HEAD_SLICES = 4
"""The most slices that key/value heads are gathered in."""


class Gathered:
    """What a holder computes with the gathered keys of all of them."""

    def __init__(self, owners: KVOwners, index: int, group: ProcessGroup | None, device: torch.device) -> None:
        """`group` in the order of holders; None where there is one."""
        self.owners, self.group = owners, group
        self._block = owners.block(owners.tokens(index), torch.arange(owners.layout.length), device)
        self._routed: dict[int, VisibleBlock | None] = {}
        """The same where each head has queries of its own, by the first head of a slice."""
        # Where each piece of the sequence lies among the gathered rows.
        self._places = sorted(
            (number, owner, place)
            for owner, numbers in enumerate(owners.numbers)
            for place, number in enumerate(numbers)
        )

    def routed(self, places: Tensor) -> "Gathered":
        """The same for queries of each head of its own, at places `[B, H, Tq]` of the sequence."""
        keys, other = torch.arange(self.owners.layout.length), copy(self)
        slices = self._slices(places.shape[1])
        # Once for the forward and the backward pass.
        other._routed = {heads.start: self.owners.routed(places[:, heads], keys) for heads in slices}
        return other

    def _in_order(self, x: Tensor) -> Tensor:
        """The tokens `[B, T, ...]` of the sequence, from the holders' rows `[holders, B, T_h, ...]`."""
        step = self.owners.layout.piece_length
        pieces = [x[owner, :, place * step : (place + 1) * step] for _, owner, place in self._places]
        return torch.cat(pieces, dim=1)[:, : self.owners.layout.length]

    def _by_holder(self, x: Tensor) -> Tensor:
        """The inverse of `_in_order`, padding zero."""
        layout, step = self.owners.layout, self.owners.layout.piece_length
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, layout.pieces * step - layout.length))
        pieces = [torch.cat([x[:, n * step : (n + 1) * step] for n in each], dim=1) for each in self.owners.numbers]
        return torch.stack(pieces)

    def _slices(self, heads: int) -> list[slice]:
        """The key/value heads that are gathered together: all of them, where nothing travels."""
        if self.group is None:
            return [slice(0, heads)]
        size = -(-heads // min(HEAD_SLICES, heads))
        return [slice(at, min(at + size, heads)) for at in range(0, heads, size)]

    def _gather(self, k: Tensor, v: Tensor, heads: slice) -> Pending[Tensor] | Tensor:
        both = torch.cat([k[:, :, heads], v[:, :, heads]], dim=3)
        return both[None] if self.group is None else all_gather(both, self.group)

    def _gathered(self, k: Tensor, v: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Each slice of key/value heads, with the keys and values of all tokens."""
        slices = self._slices(k.shape[2])
        coming = [self._gather(k, v, slices[0])]
        for number, heads in enumerate(slices):
            arrived = coming.pop()
            if number + 1 < len(slices):
                coming.append(self._gather(k, v, slices[number + 1]))
            both = self._in_order(arrived.wait() if isinstance(arrived, Pending) else arrived)
            keys, values = both.split([k.shape[3], v.shape[3]], dim=3)
            yield heads, keys, values

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """out `[B, T_h, H, V]` in q's dtype and lse `[B, H, T_h]`, for tensors of this holder's rows."""
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        lse_dtype = accumulation_dtype(q.dtype)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=lse_dtype, device=q.device)
        share = q.shape[2] // k.shape[2]
        for heads, keys, values in self._gathered(k, v):
            readers = slice(heads.start * share, heads.stop * share)
            block = self._routed.get(heads.start, self._block)
            if block is None:
                continue
            at = block.queries
            part, part_lse = attention.forward(q[:, at, readers], keys, values, block.mask, scale)
            out[:, at, readers], lse[:, readers, at] = part, part_lse
        return out, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of this holder's rows."""
        dtype = accumulation_dtype(q.dtype)
        dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
        share = q.shape[2] // k.shape[2]
        returning: list[tuple[slice, Pending[Tensor] | Tensor]] = []
        for heads, keys, values in self._gathered(k, v):
            dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
            readers = slice(heads.start * share, heads.stop * share)
            block = self._routed.get(heads.start, self._block)
            if block is not None:
                at = block.queries
                dq[:, at, readers], dkeys, dvalues = attention.backward(
                    do[:, at, readers],
                    q[:, at, readers],
                    keys,
                    values,
                    out[:, at, readers],
                    lse[:, readers, at],
                    block.mask,
                    scale,
                )
            both = self._by_holder(torch.cat([dkeys, dvalues], dim=3).to(dtype))
            returning.append((heads, both[0] if self.group is None else reduce_scatter(both, self.group)))
            if len(returning) > 1:
                _take(dk, dv, *returning.pop(0))
        for each in returning:
            _take(dk, dv, *each)
        return dq, dk, dv


def _take(dk: Tensor, dv: Tensor, heads: slice, returned: Pending[Tensor] | Tensor) -> None:
    both = returned.wait() if isinstance(returned, Pending) else returned
    dk[:, :, heads], dv[:, :, heads] = both.split([dk.shape[3], dv.shape[3]], dim=3)
