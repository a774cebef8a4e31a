"""Softmax attention by a ring of holders (Liu et al. 2023, Ring Attention; zigzag: Brandon et al. 2023, Striped).

In step s every holder sends its keys and values to the one that stands s places further on, and computes with those
that it gets from s places before while the next ones travel. They go straight to their reader and not from neighbour to
neighbour: the bytes are the same where all is needed, and where a window or a document ends, what nobody sees is not
sent, and nothing is computed of it. Backward the keys travel once more, and their gradients come back to where they
live, added there in the order of the steps.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longctx.kernels.attention import block as attention
from longctx.kernels.dtypes import accumulation_dtype
from longctx.parallel.attention.visibility import KVOwners, VisibleBlock, count, rows
from longctx.parallel.collectives import Pending, exchange

KEYS, GRADIENTS = 0, 1
"""Tags of what travels, since both may be under way between the same two holders."""


@dataclass(frozen=True)
class Step:
    """What a holder sends and gets in a step, and what it computes of it: own rows for `target`, others' of `source`.

    In the first step, of its own keys, holder, source and target are the same.
    """

    target: int
    source: int
    sent: tuple[slice, ...]
    received: tuple[slice, ...]
    keys: Tensor
    """Places in the sequence of the keys that come."""
    block: VisibleBlock | None


def plan(owners: KVOwners, index: int, device: torch.device) -> tuple[Step, ...]:
    """The steps of holder `index`, one for each holder: also where it neither sends nor gets anything.

    So all holders are at the same distance at the same time, and no two wait for each other in different ones.
    """
    size = len(owners.numbers)
    queries = owners.tokens(index)
    steps = []
    for distance in range(size):
        target, source = (index + distance) % size, (index - distance) % size
        sent, received = owners.needed(target, index), owners.needed(index, source)
        held = owners.tokens(source)
        keys = torch.cat([held[part] for part in received]) if received else held[:0]
        steps.append(Step(target, source, sent, received, keys, owners.block(queries, keys, device)))
    return tuple(steps)


class Ring:
    """The steps of a holder, with the group by which it reaches the others."""

    def __init__(self, owners: KVOwners, steps: Sequence[Step], index: int, group: ProcessGroup | None) -> None:
        """`group` in the order of holders; None where there is one."""
        self.owners, self.steps, self.index, self.group = owners, steps, index, group

    def routed(self, places: Tensor) -> "Ring":
        """The same for queries of each head of its own, at places `[B, H, Tq]` of the sequence."""
        steps = [replace(step, block=self.owners.routed(places, step.keys)) for step in self.steps]
        return Ring(self.owners, steps, self.index, self.group)

    def _travel(self, k: Tensor, v: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
        """Each step with the keys and values that it computes with; those of the next are on their way meanwhile."""
        following = [self._send(step, k, v) for step in self.steps[:1]]
        for number, step in enumerate(self.steps):
            arrive = following.pop()
            if number + 1 < len(self.steps):
                following.append(self._send(self.steps[number + 1], k, v))
            yield step, *arrive()

    def _send(self, step: Step, k: Tensor, v: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        if step.source == self.index:
            return lambda: (_own(k, step), _own(v, step))
        assert self.group is not None
        coming, flat = _buffers(k, v, count(step.received))
        pending = exchange(
            {step.target: _packed(k, v, step.sent)} if step.sent else {},
            {step.source: flat} if step.received else {},
            self.group,
            KEYS,
        )

        def arrive() -> tuple[Tensor, Tensor]:
            pending.wait()
            return _unpacked(flat, coming)

        return arrive

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """out `[B, T_h, H, V]` in q's dtype and lse `[B, H, T_h]`, for tensors of this holder's rows."""
        dtype = accumulation_dtype(q.dtype)
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=dtype, device=q.device)
        for step, keys, values in self._travel(k, v):
            if step.block is not None:
                at = step.block.queries
                part = attention.forward(q[:, at], keys, values, step.block.mask, scale)
                attention.merge_(out[:, at], lse[:, :, at], *part)
        return out.to(q.dtype), lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of this holder's rows."""
        dtype = accumulation_dtype(q.dtype)
        dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
        returning: list[_Return] = []
        for step, keys, values in self._travel(k, v):
            dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
            if step.block is not None:
                at = step.block.queries
                dq_part, dkeys, dvalues = attention.backward(
                    do[:, at], q[:, at], keys, values, out[:, at], lse[:, :, at], step.block.mask, scale
                )
                dq[:, at] += dq_part
            if step.source == self.index:
                _add(dk, dv, step.received, dkeys, dvalues)
                continue
            # The gradients of the step before have come while this one was computed.
            for each in returning:
                each.add(dk, dv)
            returning = [self._give_back(step, k, v, dkeys, dvalues)]
        for each in returning:
            each.add(dk, dv)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def _give_back(self, step: Step, k: Tensor, v: Tensor, dkeys: Tensor, dvalues: Tensor) -> "_Return":
        assert self.group is not None
        coming, flat = _buffers(k, v, count(step.sent))
        everything = (slice(None),)
        pending = exchange(
            {step.source: _packed(dkeys, dvalues, everything)} if step.received else {},
            {step.target: flat} if step.sent else {},
            self.group,
            GRADIENTS,
        )
        return _Return(step, pending, flat, coming)


@dataclass(frozen=True)
class _Return:
    """The gradients of the rows that a step sent, on their way back."""

    step: Step
    pending: Pending[None]
    flat: Tensor
    shapes: list[torch.Size]

    def add(self, dk: Tensor, dv: Tensor) -> None:
        self.pending.wait()
        if self.step.sent:
            _add(dk, dv, self.step.sent, *_unpacked(self.flat, self.shapes))


def _own(x: Tensor, step: Step) -> Tensor:
    return rows(x, step.received) if step.received else x[:, :0]


def _buffers(k: Tensor, v: Tensor, number: int) -> tuple[list[torch.Size], Tensor]:
    """The shapes of `number` rows of k and v, and a flat tensor for both."""
    shapes = [torch.Size((x.shape[0], number, *x.shape[2:])) for x in (k, v)]
    return shapes, k.new_empty(sum(shape.numel() for shape in shapes))


def _packed(k: Tensor, v: Tensor, parts: Sequence[slice]) -> Tensor:
    return torch.cat([rows(x, parts).reshape(-1) for x in (k, v)])


def _unpacked(flat: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, Tensor]:
    k, v = flat.split([shape.numel() for shape in shapes])
    return k.view(shapes[0]), v.view(shapes[1])


def _add(dk: Tensor, dv: Tensor, parts: Sequence[slice], dkeys: Tensor, dvalues: Tensor) -> None:
    """Add gradients of some rows to those of all, in place."""
    begin = 0
    for part in parts:
        end = begin + part.stop - part.start
        dk[:, part] += dkeys[:, begin:end]
        dv[:, part] += dvalues[:, begin:end]
        begin = end
