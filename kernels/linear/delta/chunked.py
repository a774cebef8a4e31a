"""Delta rule, chunkwise, in torch operators for any device.

    S_t = (I - b_t k_t k_t^T) D_t S_{t-1} + b_t k_t v_t^T        D_t = diag(exp(g_t))        o_t = S_t^T q_t

The gates are `(b,)` with beta b `[B, T, H]` (DeltaNet), or `(b, g)` with log-decays g at most 0, `[B, T, H]` (Gated
DeltaNet) or `[B, T, H, K]` (KDA). Stability needs keys of length 1 and b in [0, 2]; nothing here depends on it.

Implements the passes of `longctx.kernels.linear.recurrence.LinearRecurrence` with the UT transform / WY representation
(Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule, section 3). A token writes `u_t`, its value
minus what the state and the chunk's earlier writes return for its key, times b_t: U solves a unit lower triangular
system. With the decay factors reads, writes, keeps and pairs of `longctx.kernels.linear.decay`:

    (I + L) U = R        L = diag(b) pairs(K, K) below the diagonal        R = diag(b) (V - (reads K) S)
    O  = P U + (reads Q) S                                                 P = pairs(Q, K)
    S' = keeps S + (writes K)^T U

    dU = P^T dO + (writes K) dS'      dR = (I + L)^-T dU       dL = -dR U^T below the diagonal
    dV = diag(b) dR                   db = rowsum(dR * (V - (reads K) S)) + rowsum(dL * pairs(K, K))
    dS = keeps dS' + (reads Q)^T dO - (reads K)^T dV

The transition of a segment is a K x K matrix. It is computed with the state, as K more value channels that start from
the identity and whose values are zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.kernels.linear.chunking import Chunk, ChunkLoop, HeadGroup, split_chunks
from longctx.kernels.linear.decay import Decay, Decays, LogDecayGrad
from longctx.kernels.linear.recurrence import Carry, GateGrads, Inputs, Segment
from longctx.kernels.linear.running_state import RunningState, backward_chunks, running_state

CHUNK = 64
"""Tokens per chunk; the cost of the triangular system per chunk grows with their square."""
GROUP_SIZE = 8
"""(batch, head) pairs per batched matrix product."""
CHUNKS_PER_CHECKPOINT = 32
"""Chunks between two checkpointed states in the backward pass; their states are in memory at the same time."""


class _UTTransform:
    """UT transform of a chunk: the tokens' writes U as a function of the state before it."""

    def __init__(self, loop: "_DeltaLoop", keys: Tensor, beta: Tensor, decay: Decay) -> None:
        size = keys.shape[1]
        self.keys, self.beta, self.decay = keys, beta, decay
        self.kk = decay.pairs(keys, keys, loop.scratch("kk", keys.shape[0], size, size))
        system = torch.mul(self.kk, beta, out=loop.scratch("system", *self.kk.shape)).tril_(-1)
        system.diagonal(dim1=1, dim2=2).fill_(1)
        self.system = system
        """I + L, `[G, C, C]`."""
        self.decayed_k = torch.mul(keys, decay.reads, out=loop.scratch("decayed_k", *keys.shape))
        """reads K, `[G, C, K]`."""

    def residual(self, values: Tensor, state: Tensor) -> Tensor:
        """Compute V - (reads K) S, `[G, C, V]`."""
        return torch.baddbmm(values, self.decayed_k, state, alpha=-1)

    def solve(self, residual: Tensor) -> Tensor:
        """Solve for U, `[G, C, V]`, from the residual V - (reads K) S."""
        return torch.linalg.solve_triangular(self.system, residual * self.beta, upper=False, unitriangular=True)

    def solve_back(self, du: Tensor) -> Tensor:
        """Solve the transposed system for dR from dU."""
        return torch.linalg.solve_triangular(self.system.transpose(1, 2), du, upper=True, unitriangular=True)


class _DeltaLoop(ChunkLoop):
    """Chunk loop of one pass over the segments."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs, GROUP_SIZE)
        beta, *decay = inputs.gates
        self.decays = Decays(decay[0] if decay else None, self)
        self.beta = beta[..., None]

    def chunks(self, segment: Segment) -> list[Chunk]:
        return split_chunks(segment, CHUNK, pad_to_power_of_two=self.decays.vector)

    def ut_transform(self, k: Tensor, group: HeadGroup, chunk: Chunk) -> _UTTransform:
        keys, beta = self.load("k", k, group, chunk), self.load("beta", self.beta, group, chunk)
        return _UTTransform(self, keys, beta, self.decays.for_chunk(self, group, chunk))

    def write(self, state: RunningState, ut: _UTTransform, u: Tensor) -> None:
        """Update the state from S to S'."""
        written = self.scaled("written", ut.keys, ut.decay.writes)
        state.decay(ut.decay).baddbmm_(written.transpose(1, 2), u)

    def append_identity(self, states: Tensor) -> Tensor:
        """Append K value channels that hold the identity to states `[B, H, K, V]`: `[B, H, K, V + K]`."""
        eye = torch.eye(self.key_dim, dtype=self.dtype, device=states.device)
        return torch.cat([states, eye.expand(*states.shape[:2], -1, -1)], dim=-1)

    def carry(self, extended: Tensor, value_dim: int, segments: Sequence[Segment]) -> Carry:
        """Split extended end states `[N, B, H, K, V + K]` into the segments' carries; a document start zeroes A."""
        state, transition = extended.split([value_dim, self.key_dim], dim=-1)
        ends = torch.tensor([bool(s.starts) for s in segments], device=extended.device).view(-1, 1, 1, 1, 1)
        return Carry(transition.masked_fill(ends, 0.0), state.contiguous())


def segment_length(heads: int, length: int, device: torch.device) -> int:
    """Return the whole length: one segment."""
    del heads, device
    return max(length, 1)


def summarize(inputs: Inputs, segments: Sequence[Segment]) -> Carry:
    """Pass 1: each segment's carry. Shapes as in `LinearRecurrence`, the gates as in the module docstring."""
    loop, k, v = _DeltaLoop(inputs), inputs.k, inputs.v
    value_dim = loop.value_dim
    extended = loop.zero_states(segments, value_dim + loop.key_dim)
    for number, segment in enumerate(segments):
        extended[number] = loop.append_identity(loop.zero_states([segment], value_dim)[0])
        for group in loop.head_groups():
            state = running_state(loop, "state", extended[number], group)
            for chunk in loop.chunks(segment):
                ut = loop.ut_transform(k, group, chunk)
                values = loop.load("v", v, group, chunk)
                extended_v = loop.scratch("wide", *values.shape[:2], value_dim + loop.key_dim).zero_()
                extended_v[:, :, :value_dim] = values
                loop.write(state, ut, ut.solve(ut.residual(extended_v, state.value())))
            loop.store_state(extended[number], group, state.value())
    return loop.carry(extended, value_dim, segments)


def apply(inputs: Inputs, segments: Sequence[Segment], states: Tensor) -> tuple[Tensor, Tensor]:
    """Pass 2: outputs and end states."""
    loop, q, k, v = _DeltaLoop(inputs), inputs.queries, inputs.k, inputs.v
    out = loop.empty_outputs(q, v)
    ends = loop.zero_states(segments, loop.value_dim)
    for number, segment in enumerate(segments):
        for group in loop.head_groups():
            running = running_state(loop, "state", states[number], group)
            for chunk in loop.chunks(segment):
                ut, state = loop.ut_transform(k, group, chunk), running.value()
                u = ut.solve(ut.residual(loop.load("v", v, group, chunk), state))
                for reader in range(loop.readers(q)):
                    queries = loop.load("q", q, group, chunk, reader)
                    square = loop.scratch("scores", group.size, chunk.size, chunk.size)
                    result = torch.bmm(ut.decay.pairs(queries, ut.keys, square), u)
                    result.baddbmm_(loop.scaled("read", queries, ut.decay.reads), state)
                    loop.store(out, group, chunk, result, reader)
                loop.write(running, ut, u)
            loop.store_state(ends[number], group, running.value())
    return out, ends


def summarize_grad(inputs: Inputs, segments: Sequence[Segment], do: Tensor) -> Carry:
    """Pass 1 backward: each segment's carry of gradients. Reads only the shape of v."""
    loop, q, k = _DeltaLoop(inputs), inputs.queries, inputs.k
    value_dim = loop.value_dim
    extended = loop.zero_states(segments, value_dim + loop.key_dim)
    for number, segment in enumerate(segments):
        extended[number] = loop.append_identity(loop.zero_states([segment], value_dim)[0])
        for group in loop.head_groups():
            dstate = running_state(loop, "dstate", extended[number], group)
            for chunk in reversed(loop.chunks(segment)):
                ut = loop.ut_transform(k, group, chunk)
                du = torch.bmm(loop.scaled("written", ut.keys, ut.decay.writes), dstate.value())
                added = dstate.decay(ut.decay)
                for reader in range(loop.readers(q)):
                    queries, grads = loop.load("q", q, group, chunk, reader), loop.load("do", do, group, chunk, reader)
                    square = loop.scratch("scores", group.size, chunk.size, chunk.size)
                    scores = ut.decay.pairs(queries, ut.keys, square)
                    du[:, :, :value_dim].baddbmm_(scores.transpose(1, 2), grads)
                    read = loop.scaled("read", queries, ut.decay.reads)
                    added[:, :, :value_dim].baddbmm_(read.transpose(1, 2), grads)
                dresidual = ut.solve_back(du).mul_(ut.beta)
                added.baddbmm_(ut.decayed_k.transpose(1, 2), dresidual, alpha=-1)
            loop.store_state(extended[number], group, dstate.value())
    return loop.carry(extended, value_dim, segments)


def _pairs_grad(
    decay: Decay, d: Tensor, pairs: Tensor, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor, dg: Tensor | None
) -> None:
    if dg is None:
        decay.pairs_grad(d, x, y, dx, dy)
    else:
        decay.pairs_and_decay_grad(d, pairs, x, y, dx, dy, dg)


class _Backward:
    """Pass 2 backward: `backward_chunks` calls `advance` and `chunk_grad`, from the last chunk to the first."""

    def __init__(self, inputs: Inputs, do: Tensor, gate_grads: bool) -> None:
        self.loop = loop = _DeltaLoop(inputs)
        self.q, self.k, self.v, self.do = inputs.queries, inputs.k, inputs.v, do
        self.dq, self.dk, self.dv = (loop.grad_buffer(x) for x in (self.q, self.k, self.v))
        self.dgates: list[Tensor] = []
        if gate_grads:
            shaped = [loop.beta] + [g if g.dim() == 4 else g[..., None] for g in inputs.gates[1:]]
            self.dgates = [torch.zeros(g.shape, dtype=loop.dtype, device=g.device) for g in shaped]

    def advance(self, group: HeadGroup, chunk: Chunk, state: RunningState) -> None:
        """Update the state from before a chunk to after it."""
        ut = self.loop.ut_transform(self.k, group, chunk)
        values = self.loop.load("v", self.v, group, chunk)
        self.loop.write(state, ut, ut.solve(ut.residual(values, state.value())))

    def chunk_grad(self, group: HeadGroup, chunk: Chunk, state: Tensor, dstate: RunningState) -> None:
        """Compute a chunk's gradients, and update `dstate` to the gradient of the state before it."""
        loop, square = self.loop, (group.size, chunk.size, chunk.size)
        ut = loop.ut_transform(self.k, group, chunk)
        keys, decay = ut.keys, ut.decay
        residual = ut.residual(loop.load("v", self.v, group, chunk), state)
        u = ut.solve(residual)

        end = dstate.value()
        dk = torch.bmm(u, end.transpose(1, 2)).mul_(decay.writes)
        dlog_decay = LogDecayGrad(loop, decay, keys, dk, state, end) if len(self.dgates) == 2 else None
        intra = None if dlog_decay is None else dlog_decay.intra
        du = torch.bmm(loop.scaled("written", keys, decay.writes), end)
        added = dstate.decay(decay)
        for reader in range(loop.readers(self.q)):
            queries, grads = (
                loop.load("q", self.q, group, chunk, reader),
                loop.load("do", self.do, group, chunk, reader),
            )
            scores = decay.pairs(queries, keys, loop.scratch("scores", *square))
            du.baddbmm_(scores.transpose(1, 2), grads)
            dq = torch.bmm(grads, state.transpose(1, 2)).mul_(decay.reads)
            if dlog_decay is not None:
                dlog_decay.reads.addcmul_(queries, dq)
            dscores = torch.bmm(grads, u.transpose(1, 2), out=loop.scratch("dscores", *square))
            _pairs_grad(decay, dscores, scores, queries, keys, dq, dk, intra)
            added.baddbmm_(loop.scaled("read", queries, decay.reads).transpose(1, 2), grads)
            loop.store(self.dq, group, chunk, dq, reader)

        drhs = ut.solve_back(du)
        dsystem = torch.bmm(drhs, u.transpose(1, 2), out=loop.scratch("dsystem", *square)).neg_().tril_(-1)
        dbeta = (drhs * residual).sum(dim=2, keepdim=True) + (dsystem * ut.kk).sum(dim=2, keepdim=True)
        dv = drhs.mul_(ut.beta)
        dk_read = torch.bmm(dv, state.transpose(1, 2)).neg_().mul_(decay.reads)
        if dlog_decay is not None:
            dlog_decay.reads.addcmul_(keys, dk_read)
        dk += dk_read
        _pairs_grad(decay, dsystem.mul_(ut.beta), ut.kk, keys, keys, dk, dk, intra)
        added.baddbmm_(ut.decayed_k.transpose(1, 2), dv, alpha=-1)
        loop.store(self.dk, group, chunk, dk)
        loop.store(self.dv, group, chunk, dv)
        if self.dgates:
            loop.store(self.dgates[0], group, chunk, dbeta)
        if dlog_decay is not None:
            loop.store(self.dgates[1], group, chunk, dlog_decay.finish())


def apply_grad(
    inputs: Inputs,
    segments: Sequence[Segment],
    do: Tensor,
    states: Tensor,
    dends: Tensor,
    gate_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, GateGrads, Tensor]:
    """Pass 2 backward: dq, dk, dv, the gates' gradients and that of the start states."""
    backward = _Backward(inputs, do, gate_grads)
    chunks = [backward.loop.chunks(segment) for segment in segments]
    dstates = backward_chunks(
        backward.loop, chunks, states, dends, backward.advance, backward.chunk_grad, CHUNKS_PER_CHECKPOINT
    )
    dq, dk, dv = (
        d.to(x.dtype)
        for d, x in zip((backward.dq, backward.dk, backward.dv), (backward.q, backward.k, backward.v), strict=True)
    )
    dgates = tuple(d.view(g.shape).to(g.dtype) for d, g in zip(backward.dgates, inputs.gates, strict=False))
    return dq, dk, dv, dgates or (None,) * len(inputs.gates), dstates
