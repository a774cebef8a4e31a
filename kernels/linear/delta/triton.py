"""The delta rule on CUDA, in Triton: DeltaNet, Gated DeltaNet and KDA. `longctx.kernels.linear.delta.chunked` has the
equations.

The functions of `longctx.kernels.linear.recurrence.LinearRecurrence`, for float32, bf16 and fp16 on a device. The gates
are `(beta,)` or `(beta, log_decay)`, beta `[B, T, H]`, log_decay `[B, T, H]` or `[B, T, H, K]`, at most 0.

Each function first prepares all chunks of C tokens side by side (`triton_delta_prepare`: the inverse of a chunk's
triangular system and its scores), then walks the segments, a program for each sequence, head, segment and block of V
(`triton_delta_walks`). Backward walks twice, forward for the states before the chunks and back for the gradients of
those behind them, and ends with a kernel in which all chunks are independent again (`triton_delta_grads`).

Bytes that a token and head move to and from memory, with e the bytes of an element, p of a factor (2 in bf16, else
4), D = K = V, one query head a state, all of V in one block, and without the states between segments (4 D^2 to 16 D^2 a
segment and pass) and the numbers of gates (4 for each that a kernel reads or writes):

                      no decay, scalar                     vector, in float32
    summarize         3De + 2Cp                            2De + 2Cp + 4Dp + 4D
    apply             6De + 4Cp                            4De + 4Cp + 6Dp + 4D
    summarize_grad    5De + 4Cp                            3De + 4Cp + 6Dp + 4D
    apply_grad        14De + 5Cp + 4Dp + 4 D^2 p / C       11De + 5Cp + 12Dp + 4 D^2 p / C + 8D, dgates 4D more
    KiB at D = 128 in bf16, C = 64 and 32: forward 3.0, 5.4; backward 8.9, 14.6 with dgates

The walks of a vector decay load keys and queries that are decayed already, so that no exponential is in their way.

What one kernel makes for the next is held for as many segments at a time as fit into SCRATCH bytes, at least one, and
freed when the function returns: Cp (1 + readers) a token and head, with vectors Dp (2 + readers) more, in apply_grad
2Dp + 2 D^2 p / C more, which at D = 128 in bf16 is 1.75 KiB of a scalar decay and 3.4 KiB of a vector.

In float32 the products are exact (IEEE) unless `torch.backends.cuda.matmul.allow_tf32` asks for tf32; in bf16 the
factors, and with them the inverses, scores and the states that the backward pass keeps, are rounded to bf16 and the
sums are float32; in fp16 they are float32 and multiplied as tf32. The states that are carried and the gradients of
gates are float32. Heads group as in `longctx.kernels.linear.additive.triton`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from longctx.kernels.linear import tuning
from longctx.kernels.linear.delta.triton_chunk_scan import backward_kernel, forward_kernel
from longctx.kernels.linear.delta.triton_grads import grads_kernel
from longctx.kernels.linear.delta.triton_prepare import prepare_kernel
from longctx.kernels.linear.recurrence import Carry, Gates, Segment
from longctx.kernels.linear.triton_launch import (
    LaunchShape,
    Strides,
    after_last_start,
    before_first_start,
    bounds_on,
    cut_off,
    documents,
    maybe_with_strides,
    number_strides,
    per_head,
    pose,
    segment_length,
    to_shared,
    with_strides,
)

__all__ = ["apply", "apply_grad", "segment_length", "summarize", "summarize_grad"]

SCRATCH = 2**30
"""Bytes that one kernel leaves for the next."""
Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Part:
    """Some neighbouring segments, whose chunks are held at once: `at` among all segments."""

    problem: LaunchShape
    at: slice
    bounds: Bounds
    chunk: int

    @cached_property
    def chunks(self) -> int:
        """Chunks for which each segment has room."""
        return max(-(-(end - begin) // self.chunk) for begin, end in self.bounds)

    @property
    def places(self) -> int:
        """Chunks of all segments, sequences and heads."""
        return len(self.bounds) * self.chunks * self.problem.batch * self.problem.heads

    @property
    def on_device(self) -> Tensor:
        """Where the segments begin and end."""
        return bounds_on(self.bounds, self.problem.device)

    def scratch(self, *shape: int) -> Tensor:
        """Memory in the dtype of products."""
        return torch.empty(self.places, *shape, dtype=self.problem.dot_dtype, device=self.problem.device)

    def blocks(self, name: str) -> tuning.Blocks:
        """Tile sizes of a kernel, whose chunks are those of the kernel that prepares them."""
        return {**self.problem.blocks(name), "chunk": self.chunk}

    def over_chunks(self, kernel: Any, name: str, blocks: int, *arguments: Any, **constants: Any) -> None:
        """Run so many programs for each chunk."""
        self.problem.launch(kernel, self.blocks(name), blocks * self.places, *arguments, self.chunks, **constants)

    def over_segments(self, kernel: Any, name: str, channels: Sequence[int], *arguments: Any, **constants: Any) -> None:
        """Run a program for each segment and block of so many channels of value."""
        blocks = self.blocks(name)
        programs = sum(-(-count // blocks["block_v"]) for count in channels)
        programs *= len(self.bounds) * self.problem.batch * self.problem.heads
        self.problem.launch(kernel, blocks, programs, *arguments, self.chunks, **constants)


class _Call:
    """The tensors of one call as the kernels take them."""

    def __init__(
        self, q: Tensor | None, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], ids: bool
    ) -> None:
        log_decay = gates[1] if len(gates) == 2 else None
        self.problem = problem = pose("delta", k, v, gates, log_decay, segments, None if q is None else q.shape[2])
        self.chunk = problem.blocks("prepare")["chunk"]
        self.beta = gates[0]
        self.q, self.k, self.v = maybe_with_strides(q), with_strides(k), with_strides(v)
        self.gates: tuple[Tensor, Strides, Tensor, Strides] = (*number_strides(gates[0]), *problem.gate)
        self.ids = documents(problem.segments, problem.device) if ids else None
        self.shares = {
            **problem.shares(k if q is None else q, k, v),
            "BETA_SHARE": problem.heads // gates[0].shape[2],
        }

    def shares_of(self, *names: str) -> dict[str, int]:
        """How many states share a head, of what a kernel reads."""
        return {f"{name}_SHARE": self.shares[f"{name}_SHARE"] for name in (*names, "BETA", "GATE")} | {
            "READERS": self.shares["READERS"]
        }

    def state(self, *shape: int) -> Tensor:
        """Memory for a state of each segment, `[N, B, H, *shape]`, float32."""
        return torch.empty(*self.problem.state_shape[:3], *shape, dtype=torch.float32, device=self.problem.device)

    def parts(self, bounds: Bounds, bytes_per_chunk: int) -> Iterator[_Part]:
        """The segments, as many at a time as SCRATCH holds."""
        problem = self.problem
        longest = max((end - begin for begin, end in bounds), default=0)
        one = -(-longest // self.chunk) * problem.batch * problem.heads * bytes_per_chunk
        count = max(1, SCRATCH // max(one, 1))
        for first in range(0, len(bounds), count):
            at = slice(first, min(first + count, len(bounds)))
            yield _Part(problem, at, bounds[at], self.chunk)

    def chunk_bytes(self, *, scores: bool, states: bool = False) -> int:
        """What is held for a chunk and head."""
        problem = self.problem
        numbers = self.chunk**2 * (1 + problem.readers * scores)
        if problem.decay_kind == "vector":
            numbers += self.chunk * problem.key_dim * (2 + problem.readers * scores)
        if states:
            numbers += 2 * problem.value_dim * (problem.key_dim + self.chunk)
        return numbers * problem.dot_dtype.itemsize

    def prepare(self, part: _Part, *, scores: bool) -> tuple[Tensor | None, ...]:
        """What `prepare_kernel` writes: inverse, scores, asking, writing, reading, keeps; None where not needed."""
        problem, chunk = self.problem, self.chunk
        inverse = part.scratch(chunk, chunk)
        made = part.scratch(problem.readers, chunk, chunk) if scores else None
        asking = writing = reading = keeps = None
        if problem.decay_kind == "vector":
            asking, writing = (part.scratch(chunk, problem.key_dim) for _ in range(2))
            reading = part.scratch(problem.readers, chunk, problem.key_dim) if scores else None
            keeps = torch.empty(part.places, problem.key_dim, dtype=torch.float32, device=problem.device)
        prepared = inverse, made, asking, writing, reading, keeps
        part.over_chunks(
            prepare_kernel,
            "prepare",
            1,
            *self.q,
            *self.k,
            *self.gates,
            self.ids,
            part.on_device,
            *prepared,
            **self.shares_of("Q", "K"),
        )
        return prepared

    def carry(self, transition: Tensor, state: Tensor) -> Carry:
        """The maps of the segments, of which those in which documents begin let nothing through."""
        cut = cut_off(self.problem.segments, self.problem.device)
        if cut is not None:
            transition.masked_fill_(cut.view(-1, 1, 1, 1, 1), 0.0)
        return Carry(transition, state)


def summarize(k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment]) -> Carry:
    """Pass 1: the map of each segment; transition `[N, B, H, K, K]`, state `[N, B, H, K, V]`, float32.

    Of a segment in which documents begin only the last one is read. Errors, here and below: ValueError for dtypes and
    head dims that the kernels do not take.
    """
    call = _Call(None, k, v, gates, segments, ids=False)
    key_dim, value_dim = call.problem.key_dim, call.problem.value_dim
    transition, state = call.state(key_dim, key_dim), call.state(key_dim, value_dim)
    for part in call.parts(after_last_start(segments), call.chunk_bytes(scores=False)):
        prepared = call.prepare(part, scores=False)
        part.over_segments(
            forward_kernel,
            "forward",
            (value_dim, key_dim),
            *maybe_with_strides(None),
            *call.k,
            *call.v,
            *call.gates,
            None,
            part.on_device,
            *prepared,
            None,
            *maybe_with_strides(None),
            state[part.at],
            transition[part.at],
            None,
            None,
            **call.shares_of("Q", "K", "V"),
        )
    return call.carry(transition, state)


def apply(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], states: Tensor
) -> tuple[Tensor, Tensor]:
    """Pass 2: o `[B, T, Ho, V]` in v's dtype, and the states after the segments `[N, B, H, K, V]`, float32."""
    call = _Call(q, k, v, gates, segments, ids=True)
    problem = call.problem
    out = torch.empty(*q.shape[:2], problem.heads * problem.readers, v.shape[3], dtype=v.dtype, device=v.device)
    ends, states = call.state(problem.key_dim, problem.value_dim), states.contiguous()
    for part in call.parts(problem.whole, call.chunk_bytes(scores=True)):
        prepared = call.prepare(part, scores=True)
        part.over_segments(
            forward_kernel,
            "forward",
            (problem.value_dim,),
            *call.q,
            *call.k,
            *call.v,
            *call.gates,
            call.ids,
            part.on_device,
            *prepared,
            states[part.at],
            *with_strides(out),
            ends[part.at],
            None,
            None,
            None,
            **call.shares_of("Q", "K", "V"),
        )
    return out, ends


def summarize_grad(q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], do: Tensor) -> Carry:
    """Pass 1 backward: shapes as `summarize`. Of v only the shape is used.

    Of a segment in which documents begin only the tokens before the first start are read.
    """
    call = _Call(q, k, v, gates, segments, ids=False)
    key_dim, value_dim = call.problem.key_dim, call.problem.value_dim
    transition, state = call.state(key_dim, key_dim), call.state(key_dim, value_dim)
    for part in call.parts(before_first_start(segments), call.chunk_bytes(scores=True)):
        prepared = call.prepare(part, scores=True)
        part.over_segments(
            backward_kernel,
            "backward",
            (value_dim, key_dim),
            *call.q,
            *call.k,
            *with_strides(do),
            *call.gates,
            None,
            part.on_device,
            *prepared,
            None,
            state[part.at],
            transition[part.at],
            None,
            None,
            *maybe_with_strides(None),
            **call.shares_of("Q", "K"),
        )
    return call.carry(transition, state)


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

    Four launches for as many segments as SCRATCH holds: prepare, the walks forward and back, and the gradients.
    """
    call = _Call(q, k, v, gates, segments, ids=True)
    problem = call.problem
    key_dim, value_dim, heads = problem.key_dim, problem.value_dim, problem.heads
    states, dends = states.contiguous(), dends.contiguous()
    dstates = torch.empty_like(dends)
    dq, dk, dv = per_head(q, heads * problem.readers), per_head(k, heads), per_head(v, heads)
    grads_out = with_strides(do)
    k_blocks = -(-key_dim // problem.blocks("grads")["block_k"])
    numbers = (k_blocks * problem.batch, problem.length, heads)
    dbeta = torch.empty(numbers, dtype=torch.float32, device=q.device) if gate_grads else None
    dgate = None
    if gate_grads and problem.log_decay is not None:
        vector = problem.decay_kind == "vector"
        shape = (problem.batch, problem.length, heads, key_dim) if vector else numbers
        dgate = torch.empty(shape, dtype=torch.float32, device=q.device)
    for part in call.parts(problem.whole, call.chunk_bytes(scores=True, states=True)):
        prepared = call.prepare(part, scores=True)
        chunk_states, chunk_dstates = (part.scratch(key_dim, value_dim) for _ in range(2))
        u, dright = (part.scratch(call.chunk, value_dim) for _ in range(2))
        part.over_segments(
            forward_kernel,
            "forward",
            (value_dim,),
            *maybe_with_strides(None),
            *call.k,
            *call.v,
            *call.gates,
            call.ids,
            part.on_device,
            *prepared,
            states[part.at],
            *maybe_with_strides(None),
            None,
            None,
            chunk_states,
            u,
            **call.shares_of("Q", "K", "V"),
        )
        part.over_segments(
            backward_kernel,
            "backward",
            (value_dim,),
            *call.q,
            *call.k,
            *grads_out,
            *call.gates,
            call.ids,
            part.on_device,
            *prepared,
            dends[part.at],
            dstates[part.at],
            None,
            chunk_dstates,
            dright,
            *with_strides(dv),
            **call.shares_of("Q", "K"),
        )
        part.over_chunks(
            grads_kernel,
            "grads",
            k_blocks,
            *call.q,
            *call.k,
            *call.v,
            *grads_out,
            *call.gates,
            call.ids,
            part.on_device,
            chunk_states,
            chunk_dstates,
            u,
            dright,
            *with_strides(dq),
            *with_strides(dk),
            *_maybe_number_strides(dbeta),
            *_maybe_number_strides(dgate),
            **call.shares_of("Q", "K", "V"),
        )
    dgates = tuple(
        None if grad is None else _gate_grad(grad, gate, problem.batch)
        for grad, gate in zip((dbeta, dgate), gates, strict=False)
    )
    return to_shared(dq, q), to_shared(dk, k), to_shared(dv, v), dgates, dstates


def _maybe_number_strides(x: Tensor | None) -> tuple[Tensor | None, Strides]:
    return (None, (0, 0, 0)) if x is None else (x, (x.stride(0), x.stride(1), x.stride(2)))


def _gate_grad(grad: Tensor, gate: Tensor, batch: int) -> Tensor:
    """The gradient of a gate, in its shape and dtype, from that of each state, for numbers of each block of K too."""
    if gate.dim() == 3:
        grad = grad.unflatten(0, (-1, batch)).sum(dim=0)
    return to_shared(grad, gate)
