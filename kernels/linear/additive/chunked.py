"""The additive recurrence: linear attention without decay, with a scalar decay per head, or with one per channel of K.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

The gates are `()`, no decay (basic linear attention), or `(g,)`, logarithms at most 0: `[H]`, constant per head
(lightning attention, retention), `[B, T, H]` (simple GLA, Mamba-2) or `[B, T, H, K]` (GLA, HGRN-2).

The functions of `longctx.kernels.linear.recurrence.LinearRecurrence` in torch operators, for any device. A segment is
walked in chunks: inside a chunk the masked quadratic form, between chunks the state. With P the decayed scores of a
chunk and the factors of `longctx.kernels.linear.decay` (Qin et al. 2024, Lightning Attention-2, algorithms 1 and 2;
Yang et al. 2024, Gated Linear Attention, section 4):

    O  = P V + (reads Q) S            P  = pairs(Q, K)
    S' = keeps S + (writes K)^T V

    dV = P^T dO + (writes K) dS'      dP = dO V^T
    dQ = dpairs/dQ + reads (dO S^T)
    dK = dpairs/dK + writes (V dS'^T)
    dS = keeps dS' + (reads Q)^T dO

Everything is multiplied in the accumulation dtype (float32, or float64 for float64 input) and cast once. Backward, dq
is made on a way forward with the states, dk and dv on a way back with their gradients. The gradient of a decay needs
both at once: then the states between chunks are made again a few chunks at a time, so that only those at the starts of
such blocks are kept.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longctx.kernels.linear.chunking import Chunk, HeadGroup, Walk, chunks, walk_back
from longctx.kernels.linear.decay import Decay, Decays, GateSums
from longctx.kernels.linear.recurrence import Carry, Gates, Segment

CHUNK = 64
"""Tokens of a chunk. On an AVX-512 core at 8 heads of 128, 128 is a fifth slower."""
VECTOR_CHUNK = 64
"""Tokens of a chunk where the decay is a vector: its halving has a level more for each doubling."""
TOGETHER = 8
"""(batch, head) pairs that are multiplied together."""
BLOCK = 16
"""Chunks whose states are held at once in the backward pass."""


class _Additive(Walk):
    """One pass over the segments of a recurrence."""

    def __init__(self, k: Tensor, v: Tensor, gates: Gates) -> None:
        super().__init__(k, v, gates, TOGETHER)
        self.decays = Decays(gates[0] if gates else None, self)

    def chunks(self, segment: Segment) -> list[Chunk]:
        size = VECTOR_CHUNK if self.decays.vector else CHUNK
        return chunks(segment, size, halving=self.decays.vector)

    def transitions(self, segments: Sequence[Segment], gates: Gates) -> Tensor:
        """The logarithms of the segments' transitions, `[N, B, H]` or `[N, B, H, K]`."""
        gate = gates[0] if gates else torch.zeros(1, dtype=self.dtype, device=self.scratch.device)
        if gate.dim() == 1:
            totals = [gate.to(self.dtype).mul(s.size).expand(self.batch, -1) for s in segments]
        else:
            totals = [gate[:, s.at].sum(dim=1, dtype=torch.float64).to(self.dtype) for s in segments]
        totals = [total.repeat_interleave(self.heads // total.shape[1], dim=1) for total in totals]
        reset = zip(totals, segments, strict=True)
        return torch.stack([torch.full_like(t, float("-inf")) if s.starts else t for t, s in reset])

    def write(self, state: Tensor, keys: Tensor, values: Tensor, decay: Decay) -> None:
        """S' from S, in place."""
        written = self.scaled("written", keys, decay.writes)
        state.mul_(decay.keeps).baddbmm_(written.transpose(1, 2), values)

    def forward(
        self, k: Tensor, v: Tensor, segments: Sequence[Segment], states: Tensor, ends: Tensor | None
    ) -> Iterator[tuple[HeadGroup, Chunk, Tensor, Tensor, Tensor, Decay]]:
        """Each chunk in order, with the state before it, its keys, values and decays; what it writes follows behind it.

        The states after the segments go to `ends`.
        """
        for number, segment in enumerate(segments):
            parts = self.chunks(segment)
            for heads in self.groups():
                state = self.state(states[number], heads)
                for chunk in parts:
                    keys, values = self.load("k", k, heads, chunk), self.load("v", v, heads, chunk)
                    decay = self.decays.of(self, heads, chunk)
                    yield heads, chunk, state, keys, values, decay
                    self.write(state, keys, values, decay)
                if ends is not None:
                    self.put_state(ends[number], heads, state)


def segment_length(heads: int, length: int, device: torch.device) -> int:
    """One segment, as long as there are tokens: torch operators fill a CPU with a chunk of several heads."""
    del heads, device
    return max(length, 1)


def summarize(k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment]) -> Carry:
    """Pass 1. Shapes as in `LinearRecurrence`, the gates as in the module's docstring."""
    walk = _Additive(k, v, gates)
    states = walk.states(segments, walk.value_dim)
    for number, segment in enumerate(segments):
        # What precedes a segment's last document cannot leave it.
        begin = segment.begin + (segment.starts[-1] if segment.starts else 0)
        live = [chunk for chunk in walk.chunks(segment) if chunk.end > begin]
        for heads in walk.groups():
            state = walk.state(states[number], heads)
            for chunk in live:
                keys, values = walk.load("k", k, heads, chunk), walk.load("v", v, heads, chunk)
                walk.write(state, keys, values, walk.decays.of(walk, heads, chunk))
            walk.put_state(states[number], heads, state)
    return Carry(walk.transitions(segments, gates), states)


def apply(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], states: Tensor
) -> tuple[Tensor, Tensor]:
    """Pass 2."""
    walk = _Additive(k, v, gates)
    out = walk.outputs(q, v)
    ends = walk.states(segments, walk.value_dim)
    for heads, chunk, state, keys, values, decay in walk.forward(k, v, segments, states, ends):
        for nth in range(walk.repeats(q)):
            queries = walk.load("q", q, heads, chunk, nth)
            scores = decay.pairs(queries, keys, walk.scratch("scores", heads.count, chunk.size, chunk.size))
            result = walk.product("o", scores, values)
            walk.store(out, heads, chunk, result.baddbmm_(walk.scaled("read", queries, decay.reads), state), nth)
    return out, ends


def summarize_grad(q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], do: Tensor) -> Carry:
    """Pass 1 backward; of k and v only the shapes are used."""
    walk = _Additive(k, v, gates)
    dstates = walk.states(segments, walk.value_dim)
    for number, segment in enumerate(segments):
        # What follows a segment's first start never read the state that came in.
        end = segment.begin + segment.starts[0] if segment.starts else segment.end
        live = [chunk for chunk in walk.chunks(segment) if chunk.begin < end]
        for heads in walk.groups():
            dstate = walk.state(dstates[number], heads)
            for chunk in reversed(live):
                decay = walk.decays.of(walk, heads, chunk)
                dstate.mul_(decay.keeps)
                for nth in range(walk.repeats(q)):
                    queries, grads = walk.load("q", q, heads, chunk, nth), walk.load("do", do, heads, chunk, nth)
                    dstate.baddbmm_(walk.scaled("read", queries, decay.reads).transpose(1, 2), grads)
            walk.put_state(dstates[number], heads, dstate)
    return Carry(walk.transitions(segments, gates), dstates)


def query_grad(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], do: Tensor, states: Tensor
) -> Tensor:
    """The part of pass 2 backward that needs no gradient of a state: dq."""
    walk = _Additive(k, v, gates)
    dq = walk.gradient(q)
    for heads, chunk, state, keys, values, decay in walk.forward(k, v, segments, states, None):
        for nth in range(walk.repeats(q)):
            queries, grads = walk.load("q", q, heads, chunk, nth), walk.load("do", do, heads, chunk, nth)
            result = walk.product("dq", grads, state.transpose(1, 2)).mul_(decay.reads)
            dscores = walk.product("dscores", grads, values.transpose(1, 2))
            decay.pairs_grad(dscores, queries, keys, result, None)
            walk.store(dq, heads, chunk, result, nth)
    return dq.to(q.dtype)


def key_value_grad(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], do: Tensor, dends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The rest of pass 2 backward where no gate has a gradient: dk, dv and that of the states that came in."""
    walk = _Additive(k, v, gates)
    gradients = walk.gradient(k), walk.gradient(v)
    dstates = walk.states(segments, walk.value_dim)
    for number, segment in enumerate(segments):
        parts = walk.chunks(segment)
        for heads in walk.groups():
            dstate = walk.state(dends[number], heads)
            for chunk in reversed(parts):
                decay = walk.decays.of(walk, heads, chunk)
                keys, values = walk.load("k", k, heads, chunk), walk.load("v", v, heads, chunk)
                dk = walk.product("dk", values, dstate.transpose(1, 2)).mul_(decay.writes)
                dv = walk.product("dv", walk.scaled("written", keys, decay.writes), dstate)
                dstate.mul_(decay.keeps)
                for nth in range(walk.repeats(q)):
                    queries, grads = walk.load("q", q, heads, chunk, nth), walk.load("do", do, heads, chunk, nth)
                    scores = decay.pairs(queries, keys, walk.scratch("scores", heads.count, chunk.size, chunk.size))
                    dv.baddbmm_(scores.transpose(1, 2), grads)
                    dscores = walk.product("dscores", grads, values.transpose(1, 2))
                    decay.pairs_grad(dscores, queries, keys, None, dk)
                    dstate.baddbmm_(walk.scaled("read", queries, decay.reads).transpose(1, 2), grads)
                for into, value in zip(gradients, (dk, dv), strict=True):
                    walk.store(into, heads, chunk, value)
            walk.put_state(dstates[number], heads, dstate)
    return gradients[0].to(k.dtype), gradients[1].to(v.dtype), dstates


class _Backward:
    """Pass 2 backward with the gradient of the decay, which needs states and their gradients together: filled a block
    of chunks at a time, from the last to the first.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, do: Tensor) -> None:
        self.walk = walk = _Additive(k, v, (g,))
        self.q, self.k, self.v, self.g, self.do = q, k, v, g, do
        self.dq, self.dk, self.dv = (walk.gradient(x) for x in (q, k, v))
        self.constant = walk.decays.constant
        shape = (walk.heads,) if self.constant else g.shape if g.dim() == 4 else (*g.shape, 1)
        self.dg = torch.zeros(shape, dtype=walk.dtype, device=g.device)

    def advance(self, heads: HeadGroup, chunk: Chunk, state: Tensor) -> None:
        """The state behind a chunk from that before it, in place."""
        walk = self.walk
        keys, values = walk.load("k", self.k, heads, chunk), walk.load("v", self.v, heads, chunk)
        walk.write(state, keys, values, walk.decays.of(walk, heads, chunk))

    def chunk(self, heads: HeadGroup, chunk: Chunk, state: Tensor, dstate: Tensor) -> None:
        """The gradients of a chunk; `dstate` becomes that of the state before it, in place."""
        walk, square = self.walk, (heads.count, chunk.size, chunk.size)
        decay = walk.decays.of(walk, heads, chunk)
        keys, values = walk.load("k", self.k, heads, chunk), walk.load("v", self.v, heads, chunk)
        dk = walk.product("dk", values, dstate.transpose(1, 2)).mul_(decay.writes)
        dv = walk.product("dv", walk.scaled("written", keys, decay.writes), dstate)
        sums = GateSums(walk, decay, keys, dk, state, dstate)
        dstate.mul_(decay.keeps)
        for nth in range(walk.repeats(self.q)):
            queries, grads = walk.load("q", self.q, heads, chunk, nth), walk.load("do", self.do, heads, chunk, nth)
            scores = decay.pairs(queries, keys, walk.scratch("scores", *square))
            dv.baddbmm_(scores.transpose(1, 2), grads)
            dq = walk.product("dq", grads, state.transpose(1, 2)).mul_(decay.reads)
            sums.read.addcmul_(queries, dq)
            dscores = walk.product("dscores", grads, values.transpose(1, 2))
            decay.pairs_and_decay_grad(dscores, scores, queries, keys, dq, dk, sums.dg)
            dstate.baddbmm_(walk.scaled("read", queries, decay.reads).transpose(1, 2), grads)
            walk.store(self.dq, heads, chunk, dq, nth)
        walk.store(self.dk, heads, chunk, dk)
        walk.store(self.dv, heads, chunk, dv)
        dg = sums.finish()
        if self.constant:
            self.dg[heads.first : heads.last] += dg.sum(dim=(1, 2)).view(-1, heads.last - heads.first).sum(dim=0)
        else:
            walk.store(self.dg, heads, chunk, dg)

    def decay(self) -> Tensor:
        """The gradient of the decay, in its shape and dtype."""
        like = self.g
        dg = self.dg.view(like.shape[0], -1).sum(dim=1) if self.constant else self.dg.view(like.shape)
        return dg.to(like.dtype)


def apply_grad(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    segments: Sequence[Segment],
    do: Tensor,
    states: Tensor,
    dends: Tensor,
    gate_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...], Tensor]:
    """Pass 2 backward."""
    if not (gates and gate_grads):
        dq = query_grad(q, k, v, gates, segments, do, states)
        dk, dv, dstates = key_value_grad(q, k, v, gates, segments, do, dends)
        return dq, dk, dv, (None,) * len(gates), dstates
    backward = _Backward(q, k, v, gates[0], do)
    parts = [backward.walk.chunks(segment) for segment in segments]
    dstates = walk_back(backward.walk, parts, states, dends, backward.advance, backward.chunk, BLOCK)
    dq, dk, dv = (d.to(x.dtype) for d, x in zip((backward.dq, backward.dk, backward.dv), (q, k, v), strict=True))
    return dq, dk, dv, (backward.decay(),), dstates
