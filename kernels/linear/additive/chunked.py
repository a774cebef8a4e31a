"""Additive recurrence, chunkwise, in torch operators for any device.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

The gates are `()` without decay (basic linear attention), or `(g,)`, log-decays at most 0: `[H]`, constant per head
(lightning attention, retention), `[B, T, H]` (simple GLA, Mamba-2) or `[B, T, H, K]` (GLA, HGRN-2).

Implements the passes of `longctx.kernels.linear.recurrence.LinearRecurrence`. The chunkwise form: intra-chunk the
masked quadratic form, inter-chunk the recurrent state. With P the decayed scores of a chunk and the decay factors
reads, writes, keeps and pairs of `longctx.kernels.linear.decay` (Qin et al. 2024, Lightning Attention-2, algorithms 1
and 2; Yang et al. 2024, Gated Linear Attention, section 4):

    O  = P V + (reads Q) S            P  = pairs(Q, K)
    S' = keeps S + (writes K)^T V

    dV = P^T dO + (writes K) dS'      dP = dO V^T
    dQ = dpairs/dQ + reads (dO S^T)
    dK = dpairs/dK + writes (V dS'^T)
    dS = keeps dS' + (reads Q)^T dO

Products are in the accumulation dtype (float32, or float64 for float64 inputs), and results are cast once. Backward, a
forward loop over states computes dq, and a reverse loop over their gradients computes dk and dv. The gradient of a
decay needs both at once: states between chunks are then checkpointed and recomputed (`backward_chunks`).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.linear.chunking import Chunk, ChunkLoop, HeadGroup, split_chunks
from longctx.kernels.linear.decay import Decay, Decays, LogDecayGrad
from longctx.kernels.linear.recurrence import Carry, GateGrads, Inputs, Segment
from longctx.kernels.linear.running_state import RunningState, backward_chunks, running_state

CHUNK = 64
"""Tokens per chunk. On an AVX-512 core with 8 heads of dimension 128, chunks of 128 are a fifth slower."""
VECTOR_CHUNK = 64
"""Tokens per chunk for vector decays, whose recursive halving adds a level per doubling."""
GROUP_SIZE = 8
"""(batch, head) pairs per batched matrix product."""
CHUNKS_PER_CHECKPOINT = 16
"""Chunks between two checkpointed states in the backward pass; their states are in memory at the same time."""


class _AdditiveLoop(ChunkLoop):
    """Chunk loop of one pass over the segments."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs, GROUP_SIZE)
        self.inputs = inputs
        self.decays = Decays(inputs.gates[0] if inputs.gates else None, self)

    def chunks(self, segment: Segment) -> list[Chunk]:
        size = VECTOR_CHUNK if self.decays.vector else CHUNK
        return split_chunks(segment, size, pad_to_power_of_two=self.decays.vector)

    def write(self, state: RunningState, keys: Tensor, values: Tensor, decay: Decay) -> None:
        """Update the state from S to S'."""
        written = self.scaled("written", keys, decay.writes)
        state.decay(decay).baddbmm_(written.transpose(1, 2), values)

    def forward(
        self, segments: Sequence[Segment], states: Tensor, ends: Tensor | None
    ) -> Iterator[tuple[HeadGroup, Chunk, Tensor, Tensor, Tensor, Decay]]:
        """Yield each chunk in order: group, chunk, the state before it, its keys, values and decays.

        The state is updated after each yield, and the segments' end states are stored in `ends`.
        """
        k, v = self.inputs.k, self.inputs.v
        for number, segment in enumerate(segments):
            chunks = self.chunks(segment)
            for group in self.head_groups():
                state = running_state(self, "state", states[number], group)
                for chunk in chunks:
                    keys, values = self.load("k", k, group, chunk), self.load("v", v, group, chunk)
                    decay = self.decays.for_chunk(self, group, chunk)
                    yield group, chunk, state.value(), keys, values, decay
                    self.write(state, keys, values, decay)
                if ends is not None:
                    self.store_state(ends[number], group, state.value())


def transitions(inputs: Inputs, segments: Sequence[Segment]) -> Tensor:
    """Return the segments' transitions as cumulative log-decays, `[N, B, H]` or `[N, B, H, K]`."""
    batch, heads, *_ = inputs.state_shape
    dtype = accumulation_dtype(inputs.k.dtype)
    gate = inputs.gates[0] if inputs.gates else torch.zeros(1, dtype=dtype, device=inputs.k.device)
    if gate.dim() == 1:
        totals = [gate.to(dtype).mul(s.size).expand(batch, -1) for s in segments]
    else:
        totals = [gate[:, s.at].sum(dim=1, dtype=torch.float64).to(dtype) for s in segments]
    totals = [total.repeat_interleave(heads // total.shape[1], dim=1) for total in totals]
    reset = zip(totals, segments, strict=True)
    return torch.stack([torch.full_like(t, float("-inf")) if s.starts else t for t, s in reset])


def segment_length(heads: int, length: int, device: torch.device) -> int:
    """Return the whole length, one segment: a chunk of several heads is enough work for a CPU."""
    del heads, device
    return max(length, 1)


def summarize(inputs: Inputs, segments: Sequence[Segment]) -> Carry:
    """Pass 1: each segment's carry. Shapes as in `LinearRecurrence`, the gate as in the module docstring."""
    loop, k, v = _AdditiveLoop(inputs), inputs.k, inputs.v
    states = loop.zero_states(segments, loop.value_dim)
    for number, segment in enumerate(segments):
        # Tokens before a segment's last document do not reach its end state.
        begin = segment.begin + (segment.starts[-1] if segment.starts else 0)
        live = [chunk for chunk in loop.chunks(segment) if chunk.end > begin]
        for group in loop.head_groups():
            state = running_state(loop, "state", states[number], group)
            for chunk in live:
                keys, values = loop.load("k", k, group, chunk), loop.load("v", v, group, chunk)
                loop.write(state, keys, values, loop.decays.for_chunk(loop, group, chunk))
            loop.store_state(states[number], group, state.value())
    return Carry(transitions(inputs, segments), states)


def apply(inputs: Inputs, segments: Sequence[Segment], states: Tensor) -> tuple[Tensor, Tensor]:
    """Pass 2: outputs and end states."""
    loop, q = _AdditiveLoop(inputs), inputs.queries
    out = loop.empty_outputs(q, inputs.v)
    ends = loop.zero_states(segments, loop.value_dim)
    for group, chunk, state, keys, values, decay in loop.forward(segments, states, ends):
        for reader in range(loop.readers(q)):
            queries = loop.load("q", q, group, chunk, reader)
            scores = decay.pairs(queries, keys, loop.scratch("scores", group.size, chunk.size, chunk.size))
            result = loop.product("o", scores, values)
            loop.store(out, group, chunk, result.baddbmm_(loop.scaled("read", queries, decay.reads), state), reader)
    return out, ends


def summarize_grad(inputs: Inputs, segments: Sequence[Segment], do: Tensor) -> Carry:
    """Pass 1 backward: each segment's carry of gradients. Reads only the shapes of k and v."""
    loop, q = _AdditiveLoop(inputs), inputs.queries
    dstates = loop.zero_states(segments, loop.value_dim)
    for number, segment in enumerate(segments):
        # Tokens after a segment's first document start do not read its start state.
        end = segment.begin + segment.starts[0] if segment.starts else segment.end
        live = [chunk for chunk in loop.chunks(segment) if chunk.begin < end]
        for group in loop.head_groups():
            dstate = running_state(loop, "dstate", dstates[number], group)
            for chunk in reversed(live):
                decay = loop.decays.for_chunk(loop, group, chunk)
                added = dstate.decay(decay)
                for reader in range(loop.readers(q)):
                    queries, grads = loop.load("q", q, group, chunk, reader), loop.load("do", do, group, chunk, reader)
                    added.baddbmm_(loop.scaled("read", queries, decay.reads).transpose(1, 2), grads)
            loop.store_state(dstates[number], group, dstate.value())
    return Carry(transitions(inputs, segments), dstates)


def query_grad(inputs: Inputs, segments: Sequence[Segment], do: Tensor, states: Tensor) -> Tensor:
    """Only dq of pass 2 backward, which needs no gradient of a state."""
    loop, q = _AdditiveLoop(inputs), inputs.queries
    dq = loop.grad_buffer(q)
    for group, chunk, state, keys, values, decay in loop.forward(segments, states, None):
        for reader in range(loop.readers(q)):
            queries, grads = loop.load("q", q, group, chunk, reader), loop.load("do", do, group, chunk, reader)
            result = loop.product("dq", grads, state.transpose(1, 2)).mul_(decay.reads)
            dscores = loop.product("dscores", grads, values.transpose(1, 2))
            decay.pairs_grad(dscores, queries, keys, result, None)
            loop.store(dq, group, chunk, result, reader)
    return dq.to(q.dtype)


def key_value_grad(
    inputs: Inputs, segments: Sequence[Segment], do: Tensor, dends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The rest of pass 2 backward, where no gate needs a gradient: dk, dv and the gradient of the start states."""
    loop, q, k, v = _AdditiveLoop(inputs), inputs.queries, inputs.k, inputs.v
    gradients = loop.grad_buffer(k), loop.grad_buffer(v)
    dstates = loop.zero_states(segments, loop.value_dim)
    for number, segment in enumerate(segments):
        chunks = loop.chunks(segment)
        for group in loop.head_groups():
            dstate = running_state(loop, "dstate", dends[number], group)
            for chunk in reversed(chunks):
                decay = loop.decays.for_chunk(loop, group, chunk)
                keys, values = loop.load("k", k, group, chunk), loop.load("v", v, group, chunk)
                end = dstate.value()
                dk = loop.product("dk", values, end.transpose(1, 2)).mul_(decay.writes)
                dv = loop.product("dv", loop.scaled("written", keys, decay.writes), end)
                added = dstate.decay(decay)
                for reader in range(loop.readers(q)):
                    queries, grads = loop.load("q", q, group, chunk, reader), loop.load("do", do, group, chunk, reader)
                    scores = decay.pairs(queries, keys, loop.scratch("scores", group.size, chunk.size, chunk.size))
                    dv.baddbmm_(scores.transpose(1, 2), grads)
                    dscores = loop.product("dscores", grads, values.transpose(1, 2))
                    decay.pairs_grad(dscores, queries, keys, None, dk)
                    added.baddbmm_(loop.scaled("read", queries, decay.reads).transpose(1, 2), grads)
                for buffer, tile in zip(gradients, (dk, dv), strict=True):
                    loop.store(buffer, group, chunk, tile)
            loop.store_state(dstates[number], group, dstate.value())
    return gradients[0].to(k.dtype), gradients[1].to(v.dtype), dstates


class _Backward:
    """Pass 2 backward with the gradient of the decay, which needs states and their gradients at once.

    `backward_chunks` calls `advance` and `chunk_grad`, from the last chunk to the first.
    """

    def __init__(self, inputs: Inputs, do: Tensor) -> None:
        self.loop = loop = _AdditiveLoop(inputs)
        self.q, self.k, self.v, self.do = inputs.queries, inputs.k, inputs.v, do
        self.g = g = inputs.gates[0]
        self.dq, self.dk, self.dv = (loop.grad_buffer(x) for x in (self.q, self.k, self.v))
        self.constant = loop.decays.constant
        shape = (loop.heads,) if self.constant else g.shape if g.dim() == 4 else (*g.shape, 1)
        # Of a constant decay a sum over all chunks, tens of thousands of a long sequence.
        dtype = torch.float64 if self.constant else loop.dtype
        self.dg = torch.zeros(shape, dtype=dtype, device=g.device)

    def advance(self, group: HeadGroup, chunk: Chunk, state: RunningState) -> None:
        """Update the state from before a chunk to after it."""
        loop = self.loop
        keys, values = loop.load("k", self.k, group, chunk), loop.load("v", self.v, group, chunk)
        loop.write(state, keys, values, loop.decays.for_chunk(loop, group, chunk))

    def chunk_grad(self, group: HeadGroup, chunk: Chunk, state: Tensor, dstate: RunningState) -> None:
        """Compute a chunk's gradients, and update `dstate` to the gradient of the state before it."""
        loop, square = self.loop, (group.size, chunk.size, chunk.size)
        decay = loop.decays.for_chunk(loop, group, chunk)
        keys, values = loop.load("k", self.k, group, chunk), loop.load("v", self.v, group, chunk)
        end = dstate.value()
        dk = loop.product("dk", values, end.transpose(1, 2)).mul_(decay.writes)
        dv = loop.product("dv", loop.scaled("written", keys, decay.writes), end)
        dlog_decay = LogDecayGrad(loop, decay, keys, dk, state, end)
        added = dstate.decay(decay)
        for reader in range(loop.readers(self.q)):
            queries, grads = (
                loop.load("q", self.q, group, chunk, reader),
                loop.load("do", self.do, group, chunk, reader),
            )
            scores = decay.pairs(queries, keys, loop.scratch("scores", *square))
            dv.baddbmm_(scores.transpose(1, 2), grads)
            dq = loop.product("dq", grads, state.transpose(1, 2)).mul_(decay.reads)
            dlog_decay.reads.addcmul_(queries, dq)
            dscores = loop.product("dscores", grads, values.transpose(1, 2))
            decay.pairs_and_decay_grad(dscores, scores, queries, keys, dq, dk, dlog_decay.intra)
            added.baddbmm_(loop.scaled("read", queries, decay.reads).transpose(1, 2), grads)
            loop.store(self.dq, group, chunk, dq, reader)
        loop.store(self.dk, group, chunk, dk)
        loop.store(self.dv, group, chunk, dv)
        dg = dlog_decay.finish()
        if self.constant:
            self.dg[group.first_head : group.end_head] += (
                dg.sum(dim=(1, 2), dtype=torch.float64).view(-1, group.end_head - group.first_head).sum(dim=0)
            )
        else:
            loop.store(self.dg, group, chunk, dg)

    def log_decay_grad(self) -> Tensor:
        """Return the gradient of the log-decay, in its shape and dtype."""
        like = self.g
        dg = self.dg.view(like.shape[0], -1).sum(dim=1) if self.constant else self.dg.view(like.shape)
        return dg.to(like.dtype)


def apply_grad(
    inputs: Inputs,
    segments: Sequence[Segment],
    do: Tensor,
    states: Tensor,
    dends: Tensor,
    gate_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, GateGrads, Tensor]:
    """Pass 2 backward: dq, dk, dv, the gate's gradient and that of the start states."""
    if not (inputs.gates and gate_grads):
        dq = query_grad(inputs, segments, do, states)
        dk, dv, dstates = key_value_grad(inputs, segments, do, dends)
        return dq, dk, dv, (None,) * len(inputs.gates), dstates
    backward = _Backward(inputs, do)
    chunks = [backward.loop.chunks(segment) for segment in segments]
    dstates = backward_chunks(
        backward.loop, chunks, states, dends, backward.advance, backward.chunk_grad, CHUNKS_PER_CHECKPOINT
    )
    dq, dk, dv = (
        d.to(x.dtype)
        for d, x in zip((backward.dq, backward.dk, backward.dv), (backward.q, backward.k, backward.v), strict=True)
    )
    return dq, dk, dv, (backward.log_decay_grad(),), dstates
