"""The delta rule: what the state answers to a key is moved towards the value, and the rest decays.

    S_t = (I - b_t k_t k_t^T) D_t S_{t-1} + b_t k_t v_t^T        D_t = diag(exp(g_t))        o_t = S_t^T q_t

The gates are `(b,)` with b `[B, T, H]` (DeltaNet), or `(b, g)` with logarithms g at most 0, `[B, T, H]` (Gated
DeltaNet) or `[B, T, H, K]` (KDA). For the rule to be stable keys have length 1 and b lies in [0, 2]; nothing here
depends on it.

The functions of `longctx.kernels.linear.recurrence.LinearRecurrence` in torch operators, for any device, chunk by chunk
(Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule, section 3; the UT transform). Inside a chunk
each token writes `u_t`, what is left of its value after the answers to its key of the state and of the writes before
it; these are a unit lower triangular system. With the factors of `longctx.kernels.linear.decay`:

    (I + L) U = R        L = diag(b) pairs(K, K) below the diagonal        R = diag(b) (V - (reads K) S)
    O  = P U + (reads Q) S                                                 P = pairs(Q, K)
    S' = keeps S + (writes K)^T U

    dU = P^T dO + (writes K) dS'      dR = (I + L)^-T dU       dL = -dR U^T below the diagonal
    dV = diag(b) dR                   db = rowsum(dR * (V - (reads K) S)) + rowsum(dL * pairs(K, K))
    dS = keeps dS' + (reads Q)^T dO - (reads K)^T dV

The transition of a segment is a matrix over K x K. It is walked together with the state, as K more channels of value
that begin with the identity and are written nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.kernels.linear.chunking import Chunk, HeadGroup, Walk, chunks, walk_back
from longctx.kernels.linear.decay import Decay, Decays, GateSums
from longctx.kernels.linear.recurrence import Carry, Gates, Segment

CHUNK = 64
"""Tokens of a chunk: the triangular system costs with its square."""
TOGETHER = 8
"""(batch, head) pairs that are multiplied together."""
BLOCK = 32
"""Chunks whose states are held at once in the backward pass."""


class _Writes:
    """What the tokens of a chunk write, for the state that comes in."""

    def __init__(self, walk: "_Delta", keys: Tensor, share: Tensor, decay: Decay) -> None:
        size = keys.shape[1]
        self.keys, self.share, self.decay = keys, share, decay
        self.answers = decay.pairs(keys, keys, walk.scratch("answers", keys.shape[0], size, size))
        system = torch.mul(self.answers, share, out=walk.scratch("system", *self.answers.shape)).tril_(-1)
        system.diagonal(dim1=1, dim2=2).fill_(1)
        self.system = system
        """I + L, `[G, C, C]`."""
        self.asking = torch.mul(keys, decay.reads, out=walk.scratch("asking", *keys.shape))
        """reads K, `[G, C, K]`."""

    def left(self, values: Tensor, state: Tensor) -> Tensor:
        """V - (reads K) S: `[G, C, V]`."""
        return torch.baddbmm(values, self.asking, state, alpha=-1)

    def solve(self, left: Tensor) -> Tensor:
        """U."""
        return torch.linalg.solve_triangular(self.system, left * self.share, upper=False, unitriangular=True)

    def solve_back(self, du: Tensor) -> Tensor:
        """dR."""
        return torch.linalg.solve_triangular(self.system.transpose(1, 2), du, upper=True, unitriangular=True)


class _Delta(Walk):
    """One pass over the segments of a recurrence."""

    def __init__(self, k: Tensor, v: Tensor, gates: Gates) -> None:
        super().__init__(k, v, gates, TOGETHER)
        self.decays = Decays(gates[1] if len(gates) == 2 else None, self)
        self.beta = gates[0][..., None]

    def chunks(self, segment: Segment) -> list[Chunk]:
        return chunks(segment, CHUNK, halving=self.decays.vector)

    def writes(self, k: Tensor, heads: HeadGroup, chunk: Chunk) -> _Writes:
        keys, share = self.load("k", k, heads, chunk), self.load("beta", self.beta, heads, chunk)
        return _Writes(self, keys, share, self.decays.of(self, heads, chunk))

    def write(self, state: Tensor, writes: _Writes, u: Tensor) -> None:
        """S' from S, in place."""
        written = self.scaled("written", writes.keys, writes.decay.writes)
        state.mul_(writes.decay.keeps).baddbmm_(written.transpose(1, 2), u)

    def identity(self, states: Tensor) -> Tensor:
        """The states with K more channels that hold the identity: `[B, H, K, V + K]`."""
        eye = torch.eye(self.key_dim, dtype=self.dtype, device=states.device)
        return torch.cat([states, eye.expand(*states.shape[:2], -1, -1)], dim=-1)

    def carry(self, walked: Tensor, value_dim: int, segments: Sequence[Segment]) -> Carry:
        """The maps from what `identity` became: `[N, B, H, K, V + K]`."""
        state, transition = walked.split([value_dim, self.key_dim], dim=-1)
        ends = torch.tensor([bool(s.starts) for s in segments], device=walked.device).view(-1, 1, 1, 1, 1)
        return Carry(transition.masked_fill(ends, 0.0), state.contiguous())


def segment_length(heads: int, length: int, device: torch.device) -> int:
    """One segment, as long as there are tokens."""
    del heads, device
    return max(length, 1)


def summarize(k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment]) -> Carry:
    """Pass 1. Shapes as in `LinearRecurrence`, the gates as in the module's docstring."""
    walk = _Delta(k, v, gates)
    value_dim = walk.value_dim
    walked = walk.states(segments, value_dim + walk.key_dim)
    for number, segment in enumerate(segments):
        walked[number] = walk.identity(walk.states([segment], value_dim)[0])
        for heads in walk.groups():
            state = walk.state(walked[number], heads)
            for chunk in walk.chunks(segment):
                writes = walk.writes(k, heads, chunk)
                values = walk.load("v", v, heads, chunk)
                wide = walk.scratch("wide", *values.shape[:2], state.shape[2]).zero_()
                wide[:, :, :value_dim] = values
                walk.write(state, writes, writes.solve(writes.left(wide, state)))
            walk.put_state(walked[number], heads, state)
    return walk.carry(walked, value_dim, segments)


def apply(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], states: Tensor
) -> tuple[Tensor, Tensor]:
    """Pass 2."""
    walk = _Delta(k, v, gates)
    out = walk.outputs(q, v)
    ends = walk.states(segments, walk.value_dim)
    for number, segment in enumerate(segments):
        for heads in walk.groups():
            state = walk.state(states[number], heads)
            for chunk in walk.chunks(segment):
                writes = walk.writes(k, heads, chunk)
                u = writes.solve(writes.left(walk.load("v", v, heads, chunk), state))
                for nth in range(walk.repeats(q)):
                    queries = walk.load("q", q, heads, chunk, nth)
                    square = walk.scratch("scores", heads.count, chunk.size, chunk.size)
                    result = torch.bmm(writes.decay.pairs(queries, writes.keys, square), u)
                    result.baddbmm_(walk.scaled("read", queries, writes.decay.reads), state)
                    walk.store(out, heads, chunk, result, nth)
                walk.write(state, writes, u)
            walk.put_state(ends[number], heads, state)
    return out, ends


def summarize_grad(q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], do: Tensor) -> Carry:
    """Pass 1 backward; of v only the shape is used."""
    walk = _Delta(k, v, gates)
    value_dim = walk.value_dim
    walked = walk.states(segments, value_dim + walk.key_dim)
    for number, segment in enumerate(segments):
        walked[number] = walk.identity(walk.states([segment], value_dim)[0])
        for heads in walk.groups():
            dstate = walk.state(walked[number], heads)
            for chunk in reversed(walk.chunks(segment)):
                writes = walk.writes(k, heads, chunk)
                du = torch.bmm(walk.scaled("written", writes.keys, writes.decay.writes), dstate)
                dstate.mul_(writes.decay.keeps)
                for nth in range(walk.repeats(q)):
                    queries, grads = walk.load("q", q, heads, chunk, nth), walk.load("do", do, heads, chunk, nth)
                    square = walk.scratch("scores", heads.count, chunk.size, chunk.size)
                    scores = writes.decay.pairs(queries, writes.keys, square)
                    du[:, :, :value_dim].baddbmm_(scores.transpose(1, 2), grads)
                    read = walk.scaled("read", queries, writes.decay.reads)
                    dstate[:, :, :value_dim].baddbmm_(read.transpose(1, 2), grads)
                dleft = writes.solve_back(du).mul_(writes.share)
                dstate.baddbmm_(writes.asking.transpose(1, 2), dleft, alpha=-1)
            walk.put_state(walked[number], heads, dstate)
    return walk.carry(walked, value_dim, segments)


def _pairs_grad(
    decay: Decay, d: Tensor, pairs: Tensor, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor, dg: Tensor | None
) -> None:
    if dg is None:
        decay.pairs_grad(d, x, y, dx, dy)
    else:
        decay.pairs_and_decay_grad(d, pairs, x, y, dx, dy, dg)


class _Backward:
    """Pass 2 backward: the gradients, filled a block of chunks at a time, from the last to the first."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, do: Tensor, gate_grads: bool) -> None:
        self.walk = walk = _Delta(k, v, gates)
        self.q, self.k, self.v, self.do = q, k, v, do
        self.dq, self.dk, self.dv = (walk.gradient(x) for x in (q, k, v))
        self.dgates: list[Tensor] = []
        if gate_grads:
            shaped = [walk.beta] + [g if g.dim() == 4 else g[..., None] for g in gates[1:]]
            self.dgates = [torch.zeros(g.shape, dtype=walk.dtype, device=g.device) for g in shaped]

    def advance(self, heads: HeadGroup, chunk: Chunk, state: Tensor) -> None:
        """The state behind a chunk from that before it, in place."""
        writes = self.walk.writes(self.k, heads, chunk)
        values = self.walk.load("v", self.v, heads, chunk)
        self.walk.write(state, writes, writes.solve(writes.left(values, state)))

    def chunk(self, heads: HeadGroup, chunk: Chunk, state: Tensor, dstate: Tensor) -> None:
        """The gradients of a chunk; `dstate` becomes that of the state before it, in place."""
        walk, square = self.walk, (heads.count, chunk.size, chunk.size)
        writes = walk.writes(self.k, heads, chunk)
        keys, decay = writes.keys, writes.decay
        left = writes.left(walk.load("v", self.v, heads, chunk), state)
        u = writes.solve(left)

        dk = torch.bmm(u, dstate.transpose(1, 2)).mul_(decay.writes)
        sums = GateSums(walk, decay, keys, dk, state, dstate) if len(self.dgates) == 2 else None
        dg = None if sums is None else sums.dg
        du = torch.bmm(walk.scaled("written", keys, decay.writes), dstate)
        dstate.mul_(decay.keeps)
        for nth in range(walk.repeats(self.q)):
            queries, grads = walk.load("q", self.q, heads, chunk, nth), walk.load("do", self.do, heads, chunk, nth)
            scores = decay.pairs(queries, keys, walk.scratch("scores", *square))
            du.baddbmm_(scores.transpose(1, 2), grads)
            dq = torch.bmm(grads, state.transpose(1, 2)).mul_(decay.reads)
            if sums is not None:
                sums.read.addcmul_(queries, dq)
            dscores = torch.bmm(grads, u.transpose(1, 2), out=walk.scratch("dscores", *square))
            _pairs_grad(decay, dscores, scores, queries, keys, dq, dk, dg)
            dstate.baddbmm_(walk.scaled("read", queries, decay.reads).transpose(1, 2), grads)
            walk.store(self.dq, heads, chunk, dq, nth)

        dright = writes.solve_back(du)
        dsystem = torch.bmm(dright, u.transpose(1, 2), out=walk.scratch("dsystem", *square)).neg_().tril_(-1)
        dbeta = (dright * left).sum(dim=2, keepdim=True) + (dsystem * writes.answers).sum(dim=2, keepdim=True)
        dv = dright.mul_(writes.share)
        asked = torch.bmm(dv, state.transpose(1, 2)).neg_().mul_(decay.reads)
        if sums is not None:
            sums.read.addcmul_(keys, asked)
        dk += asked
        _pairs_grad(decay, dsystem.mul_(writes.share), writes.answers, keys, keys, dk, dk, dg)
        dstate.baddbmm_(writes.asking.transpose(1, 2), dv, alpha=-1)
        walk.store(self.dk, heads, chunk, dk)
        walk.store(self.dv, heads, chunk, dv)
        if self.dgates:
            walk.store(self.dgates[0], heads, chunk, dbeta)
        if sums is not None:
            walk.store(self.dgates[1], heads, chunk, sums.finish())


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
    backward = _Backward(q, k, v, gates, do, gate_grads)
    parts = [backward.walk.chunks(segment) for segment in segments]
    dstates = walk_back(backward.walk, parts, states, dends, backward.advance, backward.chunk, BLOCK)
    dq, dk, dv = (d.to(x.dtype) for d, x in zip((backward.dq, backward.dk, backward.dv), (q, k, v), strict=True))
    dgates = tuple(d.view(g.shape).to(g.dtype) for d, g in zip(backward.dgates, gates, strict=False))
    return dq, dk, dv, dgates or (None,) * len(gates), dstates
