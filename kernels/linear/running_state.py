"""Recurrent state over a loop of chunks, forward and backward, without an error that grows with their number.

A chunk multiplies the state by its decay and adds to it. In float32, thousands of such steps lose digits where decays
are near 1: the factor rounds to a multiple of 2^-24, and where the decay is constant every chunk repeats the same
rounding, so that the state decays at another rate. A state is therefore `kept * base + added`: `base` is the state some
chunks ago and `kept` its decay since, both in float64, and `added` what these chunks added. Float32 rounds the
additions of few chunks, and what is read, once.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longctx.kernels.linear.chunking import Chunk, ChunkLoop, HeadGroup
from longctx.kernels.linear.decay import Decay

CHUNKS_PER_BASE = 16
"""Chunks until the state becomes the new base, in float64 operators that cost about as much as a chunk."""


class RunningState:
    """State of a head group, `[G, K, V]` in the loop's dtype."""

    def __init__(self, loop: ChunkLoop, name: str, start: Tensor) -> None:
        """`start` `[G, K, V]` belongs to this object from here on. One object at a time may use a `name` of a loop."""
        self._wide = start.to(torch.float64, copy=True)
        self._base = start
        self._kept: Tensor | None = None
        self._chunks = 0
        self._added = loop.scratch(f"{name} added", *start.shape)
        self._value = loop.scratch(f"{name} value", *start.shape)
        self._current = True

    def value(self) -> Tensor:
        """Return the state, to be read until the next `decay`."""
        if self._kept is None:
            return self._base
        if not self._current:
            torch.addcmul(self._added, self._base, self._kept.to(self._base.dtype), out=self._value)
            self._current = True
        return self._value

    def decay(self, decay: Decay) -> Tensor:
        """Multiply the state by a chunk's `keeps`; return the tensor `[G, K, V]` to which the chunk's writes are added.

        A document start drops the state, whatever its value.
        """
        if decay.masks.starts:
            for x in (self._wide, self._base):
                x.zero_()
            self._kept, self._chunks = None, 0
        elif self._chunks == CHUNKS_PER_BASE:
            self._renew_base()
        if self._kept is None:
            self._added.zero_()
            self._kept = decay.keeps
        else:
            self._added.mul_(decay.keeps.to(self._added.dtype))
            self._kept = self._kept * decay.keeps
        self._chunks += 1
        self._current = False
        return self._added

    def _renew_base(self) -> None:
        assert self._kept is not None
        self._wide.mul_(self._kept).add_(self._added)
        self._base.copy_(self._wide)
        self._kept, self._chunks = None, 0


def running_state(loop: ChunkLoop, name: str, states: Tensor, group: HeadGroup) -> RunningState:
    """Return a group's running state, started from `[B, H, K, V]`."""
    return RunningState(loop, name, loop.load_state(states, group))


def backward_chunks(
    loop: ChunkLoop,
    chunks: Sequence[Sequence[Chunk]],
    states: Tensor,
    dends: Tensor,
    advance: Callable[[HeadGroup, Chunk, RunningState], None],
    chunk_grad: Callable[[HeadGroup, Chunk, Tensor, RunningState], None],
    chunks_per_checkpoint: int,
) -> Tensor:
    """Run the backward chunk loop over segments, from last chunk to first, and return the gradient of `states`.

    `chunks` are each segment's chunks; `states`, `dends` and the result are `[N, B, H, K, V]`. `advance(group, chunk,
    state)` updates the state from before a chunk to after it; `chunk_grad(group, chunk, state, dstate)` takes the state
    before a chunk, `[G, K, V]`, and updates the gradient of the state after it to that of the state before it.

    Checkpointing: a first forward loop keeps the state of every `chunks_per_checkpoint` chunks; those in between are
    recomputed checkpoint by checkpoint, so that few are in memory at a time.
    """
    dstates = torch.zeros_like(states, dtype=loop.dtype)
    for number, segment_chunks in enumerate(chunks):
        step = chunks_per_checkpoint
        blocks = [segment_chunks[i : i + step] for i in range(0, len(segment_chunks), step)]
        for group in loop.head_groups():
            state = running_state(loop, "state", states[number], group)
            dstate = running_state(loop, "dstate", dends[number], group)
            checkpoints = []
            for block in blocks:
                checkpoints.append(state.value().clone())
                for chunk in block if block is not blocks[-1] else ():
                    advance(group, chunk, state)
            for block, checkpoint in zip(reversed(blocks), reversed(checkpoints), strict=True):
                state = RunningState(loop, "state", checkpoint)
                before = []
                for index, chunk in enumerate(block):
                    before.append(loop.scratch(f"state{index}", *checkpoint.shape).copy_(state.value()))
                    if chunk is not block[-1]:
                        advance(group, chunk, state)
                for chunk, start in zip(reversed(block), reversed(before), strict=True):
                    chunk_grad(group, chunk, start, dstate)
            loop.store_state(dstates[number], group, dstate.value())
    return dstates
