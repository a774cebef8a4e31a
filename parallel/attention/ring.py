"""Ring attention (Liu et al. 2023): compute with one owner's keys and values while the next owner's travel.

In step s an owner sends its keys and values to the owner s places further on, and receives those of the owner s places
before. They go straight to their reader, not from neighbour to neighbour: the bytes are the same where every key is
needed, and where a window or a document ends, keys that no query of the reader sees are neither sent nor computed with.
In the backward pass keys and values travel once more, and their gradients return to their owner, which adds them in the
order of the steps.

Causal work per owner is balanced by the layout, not here: zigzag order is the load-balanced context parallelism of
Llama 3 and Megatron-Core. (Striped Attention, Brandon et al. 2023, is another layout: tokens in round-robin stripes.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longctx.kernels.attention import block as attention
from longctx.kernels.dtypes import accumulation_dtype
from longctx.parallel.attention.kv_transfer import KVTransfer, add_rows_, start_transfer, take_rows
from longctx.parallel.attention.visibility import KVOwners, VisibleBlock, row_count

KEYS_VALUES, GRADIENTS = 0, 1
"""Tags of messages, since both kinds may be under way between the same two owners."""


@dataclass(frozen=True)
class RingStep:
    """One step of an owner: what it sends and receives, and the block that it computes with the received keys.

    In the first step, with its own keys, the owner, target and source are the same.
    """

    target: int
    source: int
    sent: tuple[slice, ...]
    """Own rows that the target needs."""
    received: tuple[slice, ...]
    """The source's rows that are needed here."""
    keys: Tensor
    """Places of these in the sequence."""
    block: VisibleBlock | None


def plan_steps(owners: KVOwners, index: int, device: torch.device) -> tuple[RingStep, ...]:
    """Plan the steps of owner `index`: one per owner, even where it neither sends nor receives anything.

    So all owners exchange at the same distance at the same time, and no two wait for each other at different ones.
    """
    size = len(owners.pieces)
    queries = owners.tokens(index)
    steps = []
    for distance in range(size):
        target, source = (index + distance) % size, (index - distance) % size
        sent, received = owners.needed(target, index), owners.needed(index, source)
        tokens = owners.tokens(source)
        keys = torch.cat([tokens[part] for part in received]) if received else tokens[:0]
        steps.append(RingStep(target, source, sent, received, keys, owners.block(queries, keys, device)))
    return tuple(steps)


class RingSchedule:
    """The ring among KV owners, for one of them."""

    def __init__(self, owners: KVOwners, steps: Sequence[RingStep], group: ProcessGroup | None) -> None:
        """`group` has the owners in order; None where there is only one."""
        self.owners, self.steps, self.group = owners, steps, group

    @classmethod
    def of(cls, owners: KVOwners, index: int, group: ProcessGroup | None, device: torch.device) -> "RingSchedule":
        """Plan the ring for owner `index`."""
        return cls(owners, plan_steps(owners, index, device), group)

    def routed(self, places: Tensor) -> "RingSchedule":
        """Return the schedule for each head's own queries, at places `[B, H, Tq]` of the sequence."""
        steps = [replace(step, block=self.owners.routed(places, step.keys)) for step in self.steps]
        return RingSchedule(self.owners, steps, self.group)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return out `[B, T_o, H, V]` in q's dtype and lse `[B, H, T_o]`, for tensors of this owner's T_o rows."""
        dtype = accumulation_dtype(q.dtype)
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=dtype, device=q.device)
        keys, values = take_rows((k, v), self.steps[0].received)
        for step, following in zip(self.steps, [*self.steps[1:], None], strict=True):
            incoming = None if following is None else self._send_recv_kv(following, k, v)
            if step.block is not None:
                at = step.block.queries
                block_out, block_lse = attention.forward(q[:, at], keys, values, step.block.mask, scale)
                attention.merge_(out[:, at], lse[:, :, at], block_out, block_lse)
            if incoming is not None:
                keys, values = incoming.wait()
        return out.to(q.dtype), lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv of this owner's rows."""
        dtype = accumulation_dtype(q.dtype)
        dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
        own = self.steps[0]
        keys, values = take_rows((k, v), own.received)
        returning: KVTransfer | None = None
        returning_rows: tuple[slice, ...] = ()
        for step, following in zip(self.steps, [*self.steps[1:], None], strict=True):
            incoming = None if following is None else self._send_recv_kv(following, k, v)
            dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
            if step.block is not None:
                at = step.block.queries
                block_dq, dkeys, dvalues = attention.backward(
                    do[:, at], q[:, at], keys, values, out[:, at], lse[:, :, at], step.block.mask, scale
                )
                dq[:, at] += block_dq
            if returning is not None:  # gradients of the previous step, which travelled during this computation
                add_rows_((dk, dv), returning_rows, returning.wait())
            if step is own:
                add_rows_((dk, dv), own.sent, (dkeys, dvalues))
            else:
                returning, returning_rows = self._send_recv_gradients(step, dkeys, dvalues), step.sent
            if incoming is not None:
                keys, values = incoming.wait()
        if returning is not None:
            add_rows_((dk, dv), returning_rows, returning.wait())
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def _send_recv_kv(self, step: RingStep, k: Tensor, v: Tensor) -> KVTransfer:
        """Start a step's exchange: send own keys and values to its target, receive those of its source."""
        assert self.group is not None
        return start_transfer(
            (k, v),
            target=step.target,
            sent=step.sent,
            source=step.source,
            received=row_count(step.received),
            group=self.group,
            tag=KEYS_VALUES,
        )

    def _send_recv_gradients(self, step: RingStep, dkeys: Tensor, dvalues: Tensor) -> KVTransfer:
        """Start a step's exchange backward: return gradients to its source, receive own rows' from its target."""
        assert self.group is not None
        return start_transfer(
            (dkeys, dvalues),
            target=step.source,
            sent=(slice(None),) if step.received else (),
            source=step.target,
            received=row_count(step.sent),
            group=self.group,
            tag=GRADIENTS,
        )
