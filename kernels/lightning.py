"""Linear attention with a constant decay per head (lightning attention, retention; no decay: basic linear attention).

    S_t = lambda_h S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        (Qin et al. 2024, Lightning Attention-2)

The four functions of `longctx.kernels.recurrence.LinearRecurrence`, for any torch device. A piece is walked in chunks
of `CHUNK` tokens, all heads at once, so that a chunk of q, k, v, its scores and the states stay in cache: inside a
chunk the masked quadratic form, between chunks the state. With C the chunk length, r = 0..C-1 a token's place in it,
M[r, s] = lambda^(r-s) for r >= s in one document and 0 elsewhere:

    O    = ((Q K^T) * M) V + diag(lambda^(r+1)) Q S
    S'   = lambda^C S + (diag(lambda^(C-1-r)) K)^T V
    dQ   = ((dO V^T) * M) K + diag(lambda^(r+1)) dO S^T
    dK   = ((dO V^T) * M)^T Q + diag(lambda^(C-1-r)) V dS'^T
    dV   = ((Q K^T) * M)^T dO + diag(lambda^(C-1-r)) K dS'
    dS   = lambda^C dS' + (diag(lambda^(r+1)) Q)^T dO

Where documents begin in a chunk, only its tokens before the first start read S, only those from the last start on
write S', and lambda^C becomes 0. Decays are kept as logarithms until they are used; everything is multiplied in the
accumulation dtype (float32, or float64 for float64 input) and cast once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.recurrence import Carry, Starts, accumulation_dtype, document_ids

CHUNK = 128
"""Tokens of a chunk. On an AVX-512 core at 8 heads of 128, 64 and 256 are within a tenth of it either way."""


@dataclass(frozen=True)
class _Factors:
    """How decays act in a chunk of C tokens."""

    mask: Tensor
    """M: `[H, C, C]`."""
    reads: Tensor
    """lambda^(r+1), 0 behind the first start: `[H, C, 1]`."""
    writes: Tensor
    """lambda^(C-1-r), 0 before the last start: `[H, C, 1]`."""
    keeps: Tensor
    """lambda^C, 0 where a document starts: `[H, 1, 1]`."""


@dataclass(frozen=True)
class _Chunk:
    """Tokens `begin` to `end` of the piece."""

    begin: int
    end: int
    factors: _Factors


def _factors(log_decay: Tensor, size: int, starts: Starts) -> _Factors:
    steps = torch.arange(size, dtype=log_decay.dtype, device=log_decay.device)
    distance = steps[:, None] - steps[None, :]
    powers = torch.exp(log_decay[:, None, None] * distance.clamp(min=0))
    mask = torch.where(distance >= 0, powers, torch.zeros_like(powers))
    reads = torch.exp(log_decay[:, None] * (steps + 1))[:, :, None]
    writes = torch.exp(log_decay[:, None] * (size - 1 - steps))[:, :, None]
    keeps = torch.exp(log_decay * size)[:, None, None]
    if starts:
        ids = document_ids(size, starts, mask.device)
        mask = mask * (ids[:, None] == ids[None, :])
        reads = reads * (ids == 0)[:, None]
        writes = writes * (ids == len(starts))[:, None]
        keeps = torch.zeros_like(keeps)
    return _Factors(mask, reads, writes, keeps)


def _chunks(log_decay: Tensor, starts: Starts, length: int, dtype: torch.dtype) -> list[_Chunk]:
    """The chunks of a piece in order; whole ones in which no document begins share their factors."""
    log_decay = log_decay.to(dtype)
    whole = _factors(log_decay, CHUNK, ()) if length >= CHUNK else None
    chunks = []
    following = 0
    for begin in range(0, length, CHUNK):
        end = min(begin + CHUNK, length)
        first = following
        while following < len(starts) and starts[following] < end:
            following += 1
        inside = tuple(start - begin for start in starts[first:following])
        plain = whole if whole is not None and not inside and end - begin == CHUNK else None
        chunks.append(_Chunk(begin, end, plain or _factors(log_decay, end - begin, inside)))
    return chunks


class _Pieces:
    """Views of `[B, T, H, ·]` tensors chunk by chunk, as `[B*H, C, ·]` in the accumulation dtype."""

    def __init__(self, like: Tensor) -> None:
        self.batch, self.length, self.heads, _ = like.shape
        self.dtype = accumulation_dtype(like.dtype)

    def load(self, x: Tensor, chunk: _Chunk) -> Tensor:
        piece = x[:, chunk.begin : chunk.end].transpose(1, 2).to(self.dtype)
        return piece.reshape(self.batch * self.heads, chunk.end - chunk.begin, x.shape[-1])

    def store(self, x: Tensor, chunk: _Chunk, value: Tensor) -> None:
        size = chunk.end - chunk.begin
        x[:, chunk.begin : chunk.end] = value.view(self.batch, self.heads, size, x.shape[-1]).transpose(1, 2)

    def scale(self, value: Tensor, factor: Tensor) -> Tensor:
        """`value [B*H, ...]` times a factor per head `[H, ...]`."""
        return value * (factor if self.batch == 1 else factor.repeat(self.batch, 1, 1))

    def scale_(self, value: Tensor, factor: Tensor) -> Tensor:
        """The same in place, for what the caller has just made."""
        return value.mul_(factor if self.batch == 1 else factor.repeat(self.batch, 1, 1))

    def states(self, state: Tensor) -> Tensor:
        """A copy of `[B, H, K, V]` to update in place, as `[B*H, K, V]`."""
        return state.to(self.dtype).reshape(-1, *state.shape[2:]).clone()

    def zeros(self, key_dim: int, value_dim: int, device: torch.device) -> Tensor:
        return torch.zeros(self.batch * self.heads, key_dim, value_dim, dtype=self.dtype, device=device)

    def unflatten(self, state: Tensor) -> Tensor:
        return state.view(self.batch, self.heads, *state.shape[1:])


def total_log_decay(log_decay: Tensor, starts: Starts, batch: int, length: int, dtype: torch.dtype) -> Tensor:
    """The logarithm of a piece's transition, `[B, H]`: -inf where a document begins in it."""
    total = torch.full_like(log_decay, float("-inf")) if starts else log_decay * length
    return total.to(dtype).expand(batch, -1)


def summarize(k: Tensor, v: Tensor, gates: Tensor, starts: Starts) -> Carry:
    """Pass 1 forward: the map of the piece. Shapes as in `LinearRecurrence`, gates `[H]` logarithms, at most 0."""
    pieces = _Pieces(k)
    state = pieces.zeros(k.shape[-1], v.shape[-1], k.device)
    # What precedes the piece's last document cannot leave it.
    begin = starts[-1] // CHUNK * CHUNK if starts else 0
    for chunk in _chunks(gates, starts, pieces.length, pieces.dtype):
        if chunk.begin >= begin:
            keys = pieces.scale(pieces.load(k, chunk), chunk.factors.writes)
            state = pieces.scale_(state, chunk.factors.keeps).baddbmm_(keys.transpose(1, 2), pieces.load(v, chunk))
    total = total_log_decay(gates, starts, pieces.batch, pieces.length, pieces.dtype)
    return Carry(total, pieces.unflatten(state))


def apply(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, starts: Starts, state: Tensor) -> Tensor:
    """Pass 2 forward: o `[B, T, H, V]` in v's dtype, for the piece that receives `state`."""
    pieces = _Pieces(q)
    carried = pieces.states(state)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    for chunk in _chunks(gates, starts, pieces.length, pieces.dtype):
        queries, keys, values = (pieces.load(x, chunk) for x in (q, k, v))
        scores = pieces.scale_(torch.bmm(queries, keys.transpose(1, 2)), chunk.factors.mask)
        result = torch.bmm(scores, values).baddbmm_(pieces.scale(queries, chunk.factors.reads), carried)
        pieces.store(out, chunk, result)
        written = pieces.scale(keys, chunk.factors.writes)
        carried = pieces.scale_(carried, chunk.factors.keeps).baddbmm_(written.transpose(1, 2), values)
    return out


def summarize_grad(q: Tensor, do: Tensor, gates: Tensor, starts: Starts) -> Carry:
    """Pass 1 backward: the map from the gradient of the end state to the gradient of the start state."""
    pieces = _Pieces(q)
    dstate = pieces.zeros(q.shape[-1], do.shape[-1], q.device)
    # What follows the piece's first start never read the state that came in.
    end = starts[0] if starts else pieces.length
    for chunk in reversed(_chunks(gates, starts, pieces.length, pieces.dtype)):
        if chunk.begin < end:
            queries = pieces.scale(pieces.load(q, chunk), chunk.factors.reads)
            dstate = pieces.scale_(dstate, chunk.factors.keeps).baddbmm_(
                queries.transpose(1, 2), pieces.load(do, chunk)
            )
    total = total_log_decay(gates, starts, pieces.batch, pieces.length, pieces.dtype)
    return Carry(total, pieces.unflatten(dstate))


def apply_grad(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, starts: Starts, do: Tensor, state: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pass 2 backward: dq, dk, dv in the dtypes of q, k, v.

    The states between chunks are computed again on the way forward (for dq), the gradients of the states on the way
    back (for dk and dv), so that neither is kept per chunk.
    """
    pieces = _Pieces(q)
    chunks = _chunks(gates, starts, pieces.length, pieces.dtype)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    carried = pieces.states(state)
    for chunk in chunks:
        keys, values, grads = (pieces.load(x, chunk) for x in (k, v, do))
        dscores = pieces.scale_(torch.bmm(grads, values.transpose(1, 2)), chunk.factors.mask)
        inter = torch.bmm(grads, carried.transpose(1, 2))
        pieces.store(dq, chunk, pieces.scale_(inter, chunk.factors.reads).baddbmm_(dscores, keys))
        written = pieces.scale(keys, chunk.factors.writes)
        carried = pieces.scale_(carried, chunk.factors.keeps).baddbmm_(written.transpose(1, 2), values)
    flowing = pieces.states(dstate)
    for chunk in reversed(chunks):
        queries, keys, values, grads = (pieces.load(x, chunk) for x in (q, k, v, do))
        dscores = pieces.scale_(torch.bmm(grads, values.transpose(1, 2)), chunk.factors.mask)
        inter = pieces.scale_(torch.bmm(values, flowing.transpose(1, 2)), chunk.factors.writes)
        pieces.store(dk, chunk, inter.baddbmm_(dscores.transpose(1, 2), queries))
        scores = pieces.scale_(torch.bmm(queries, keys.transpose(1, 2)), chunk.factors.mask)
        inter = torch.bmm(pieces.scale(keys, chunk.factors.writes), flowing)
        pieces.store(dv, chunk, inter.baddbmm_(scores.transpose(1, 2), grads))
        read = pieces.scale(queries, chunk.factors.reads)
        flowing = pieces.scale_(flowing, chunk.factors.keeps).baddbmm_(read.transpose(1, 2), grads)
    return dq, dk, dv
