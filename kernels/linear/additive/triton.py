"""The additive linear recurrence on CUDA, in Triton: constant, scalar and vector decays.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

Linear attention, lightning attention and retention (constant g), simple GLA and Mamba-2 (a number per token), GLA (a
number per token and channel). The functions of `longctx.kernels.linear.recurrence.LinearRecurrence`, for float32, bf16
and fp16 on a device; gates are `()` or `(log_decay,)`, log_decay `[H]`, `[B, T, H]` or `[B, T, H, K]`, at most 0.

Each function launches one program per sequence, head and segment (and block of K or V where the state does not fit), so
that a single sequence with few heads fills the device. Nothing is kept per chunk: backward computes the states again.
Bytes that a token and head move to and from memory, with e the bytes of an element and D = K = V, the states' own
traffic (4 D^2 a segment and pass) and what blocks of one state read again, side by side, from the cache aside:

                        constant    scalar        vector, in float32
    summarize           2De         2De + 4       2De + 4D
    apply               4De         4De + 4       4De + 4D
    summarize_grad      2De         2De + 4       2De + 4D
    apply_grad          10De        10De + 8      10De + 8D, 12De + 12D where dk and dv take a sweep each
    dgates              De + 28     De + 28       De + 12D, 2De + 12D then
    KiB at D = 128 in bf16: forward 1.5, 1.5, 2.5; backward 3.0, 3.0, 5.5; with dgates 3.3, 3.3, 7.5

dk and dv take a sweep each above a head dim of 128, above 64 where the decay is a vector, or as tuning finds.

In float32 the products are exact (IEEE) unless `torch.backends.cuda.matmul.allow_tf32` asks for tf32; in bf16 the
factors are rounded to bf16 and the sums are float32; in fp16 they are multiplied as tf32, which has fp16's precision
and does not overflow. States, decays and the gradients of gates are float32.

Heads of k, v and gates that several states share are read in place; their gradients are written per state in float32
and summed. Query heads that share a state are taken one after the other by the state's program.

Gradients of decays add up within a segment, and in bf16 the rounding errors of their terms too, hence short segments.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longctx.kernels.linear import tuning
from longctx.kernels.linear.additive.triton_backward import dk_dv_kernel, dq_kernel
from longctx.kernels.linear.additive.triton_forward import apply_kernel, summary_kernel
from longctx.kernels.linear.recurrence import Carry, Gates, Segment
from longctx.kernels.linear.triton_launch import (
    LaunchShape,
    after_last_start,
    before_first_start,
    bounds_on,
    cut_off,
    documents,
    maybe_with_strides,
    per_head,
    pose,
    segment_length,
    to_shared,
    with_strides,
)

__all__ = ["apply", "apply_grad", "key_value_grad", "query_grad", "segment_length", "summarize", "summarize_grad"]


def _pose(
    k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], query_heads: int | None = None
) -> LaunchShape:
    return pose("additive", k, v, gates, gates[0] if gates else None, segments, query_heads)


def _launch(problem: LaunchShape, kernel: Any, blocks: tuning.Blocks, *arguments: Any, **constants: Any) -> None:
    """Run a program for each segment, sequence, head and tile of the state."""
    programs = problem.tiles(blocks) * len(problem.segments) * problem.batch * problem.heads
    problem.launch(kernel, blocks, programs, *arguments, **constants)


def _summary(problem: LaunchShape, x: Tensor, y: Tensor, bounds: tuple[tuple[int, int], ...], reverse: bool) -> Carry:
    shape = problem.state_shape
    state = torch.empty(shape, dtype=torch.float32, device=problem.device)
    total = torch.empty(
        shape[:4] if problem.decay_kind == "vector" else shape[:3], dtype=torch.float32, device=problem.device
    )
    blocks = problem.blocks("summary")
    readers = problem.readers if reverse else 1
    _launch(
        problem,
        summary_kernel,
        blocks,
        *with_strides(x),
        *with_strides(y),
        *problem.gate,
        bounds_on(bounds, problem.device),
        state,
        total,
        X_SHARE=problem.heads * readers // x.shape[2],
        Y_SHARE=problem.heads * readers // y.shape[2],
        GATE_SHARE=problem.gate_share,
        READERS=readers,
        REVERSE=reverse,
    )
    cut = cut_off(problem.segments, problem.device)
    if cut is not None:
        total.masked_fill_(cut.view(-1, *[1] * (total.dim() - 1)), float("-inf"))
    return Carry(total, state)


def summarize(k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment]) -> Carry:
    """Pass 1: the map of each segment; transition `[N, B, H]` or `[N, B, H, K]`, state `[N, B, H, K, V]`, float32.

    Of a segment in which documents begin only the last one is read. Errors, here and below: ValueError for dtypes and
    head dims that the kernels do not take.
    """
    problem = _pose(k, v, gates, segments)
    return _summary(problem, k, v, after_last_start(segments), reverse=False)


def summarize_grad(q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], do: Tensor) -> Carry:
    """Pass 1 backward: shapes as `summarize`. Of k and v only the shapes are used.

    Of a segment in which documents begin only the tokens before the first start are read.
    """
    problem = _pose(k, v, gates, segments, q.shape[2])
    return _summary(problem, q, do, before_first_start(segments), reverse=True)


def apply(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], states: Tensor
) -> tuple[Tensor, Tensor]:
    """Pass 2: o `[B, T, Ho, V]` in v's dtype, and the states after the segments `[N, B, H, K, V]`, float32."""
    problem = _pose(k, v, gates, segments, q.shape[2])
    out = torch.empty(*q.shape[:2], problem.heads * problem.readers, v.shape[3], dtype=v.dtype, device=v.device)
    ends = torch.empty(problem.state_shape, dtype=torch.float32, device=v.device)
    blocks = problem.blocks("apply")
    _launch(
        problem,
        apply_kernel,
        blocks,
        *with_strides(q),
        *with_strides(k),
        *with_strides(v),
        *problem.gate,
        documents(problem.segments, problem.device),
        bounds_on(problem.whole, problem.device),
        states.contiguous(),
        *with_strides(out),
        ends,
        **problem.shares(q, k, v),
    )
    return out, ends


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
    """Pass 2 backward: dq, dk, dv and dgates in the dtypes of q, k, v and gates, and the gradient of `states`, float32.

    A launch for dq and one for dk and dv, two where a program cannot hold all of K and V.
    """
    backward = _Backward(q, k, v, gates, segments, do)
    problem = backward.problem
    terms, edges = _decay_grads(problem, problem.blocks("dq")) if gates and gate_grads else (None, None)
    dq = backward.dq(states, dends, terms, edges)
    dk, dv, dgate, dstates = backward.dk_dv(dends, terms, edges)
    dgates = (None,) * len(gates) if dgate is None else (_gate_grad(problem, dgate),)
    return dq, dk, dv, dgates, dstates


def query_grad(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], do: Tensor, states: Tensor
) -> Tensor:
    """The part of pass 2 backward that needs no gradient of a state: dq."""
    return _Backward(q, k, v, gates, segments, do).dq(states, None, None, None)


def key_value_grad(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], do: Tensor, dends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The rest of pass 2 backward where no gate has a gradient: dk, dv and that of the states that came in."""
    dk, dv, _, dstates = _Backward(q, k, v, gates, segments, do).dk_dv(dends, None, None)
    return dk, dv, dstates


class _Backward:
    """The launches of pass 2 backward."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], do: Tensor) -> None:
        self.problem = problem = _pose(k, v, gates, segments, q.shape[2])
        self.q, self.k, self.v = q, k, v
        self.inputs: list[Any] = [part for x in (q, k, v, do) for part in with_strides(x)]
        self.inputs += [
            *problem.gate,
            documents(problem.segments, problem.device),
            bounds_on(problem.whole, problem.device),
        ]
        self.shares = problem.shares(q, k, v)

    def dq(self, states: Tensor, dends: Tensor | None, terms: Tensor | None, edges: Tensor | None) -> Tensor:
        """Also fills `terms` and `edges`, where the gradient of a decay is wanted: only then are dends read."""
        problem = self.problem
        dq = per_head(self.q, problem.heads * problem.readers)
        _launch(
            problem,
            dq_kernel,
            problem.blocks("dq"),
            *self.inputs,
            states.contiguous(),
            None if dends is None else dends.contiguous(),
            *with_strides(dq),
            *maybe_with_strides(terms),
            edges,
            **self.shares,
        )
        return to_shared(dq, self.q)

    def dk_dv(
        self, dends: Tensor, terms: Tensor | None, edges: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """dk, dv, the gradient of the decay from what `dq` filled, and that of the states that came in."""
        problem = self.problem
        dends = dends.contiguous()
        dstates = torch.empty_like(dends)
        dk, dv = (per_head(x, problem.heads) for x in (self.k, self.v))
        blocks = problem.blocks("dk_dv")
        fused = problem.tiles(blocks) == 1
        if not fused:
            blocks = problem.blocks("dk")
        dgate = None
        if terms is not None and edges is not None:
            dgate = terms
            if problem.decay_kind != "vector":
                terms, edges = terms.unflatten(0, (-1, problem.batch)).sum(dim=0), edges.sum(dim=-1)
                dgate, _ = _decay_grads(problem, blocks)

        def sweep(blocks: tuning.Blocks, *written: Any) -> None:
            _launch(problem, dk_dv_kernel, blocks, *self.inputs, dends, *written, **self.shares)

        nothing = maybe_with_strides(None)
        of_decay = (*maybe_with_strides(terms), *maybe_with_strides(dgate), edges)
        sweep(blocks, *with_strides(dk), *(with_strides(dv) if fused else nothing), *of_decay, dstates)
        if not fused:
            sweep(problem.blocks("dv"), *nothing, *with_strides(dv), *nothing, *nothing, None, None)
        return to_shared(dk, self.k), to_shared(dv, self.v), dgate, dstates


def _decay_grads(problem: LaunchShape, blocks: tuning.Blocks) -> tuple[Tensor, Tensor]:
    """Memory for dg and for what a segment's end adds to it, float32: `[B, T, H, K]` and `[N, B, H, K]` for vectors,
    else `[parts x B, T, H]` and `[N, B, H, parts]`, a part for each block of K."""
    batch, length, heads, count = problem.batch, problem.length, problem.heads, len(problem.segments)
    if problem.decay_kind == "vector":
        shapes: tuple[tuple[int, ...], ...] = (batch, length, heads, problem.key_dim), problem.state_shape[:4]
    else:
        parts = problem.tiles(blocks)
        shapes = (parts * batch, length, heads), (count, batch, heads, parts)
    terms, edges = (torch.empty(shape, dtype=torch.float32, device=problem.device) for shape in shapes)
    return terms, edges


def _gate_grad(problem: LaunchShape, dgate: Tensor) -> Tensor:
    """The gradient of the decay, in its shape and dtype."""
    gate = problem.log_decay
    assert gate is not None
    if problem.decay_kind != "vector":
        dgate = dgate.unflatten(0, (-1, problem.batch)).sum(dim=0)
    if gate.dim() == 1:
        return dgate.sum(dim=(0, 1)).view(gate.shape[0], -1).sum(dim=1).to(gate.dtype)
    return to_shared(dgate, gate)
