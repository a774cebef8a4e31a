"""The additive linear recurrence on CUDA, in Triton: constant, scalar and vector decays.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

Linear attention, lightning attention and retention (constant g), simple GLA and Mamba-2 (a number per token), GLA (a
number per token and channel). The four functions of `longctx.kernels.recurrence.LinearRecurrence`, for float32, bf16
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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from longctx.kernels import tuning
from longctx.kernels.recurrence import Carry, Gates, Segment, state_heads
from longctx.kernels.triton_additive_backward import dk_dv_kernel, dq_kernel
from longctx.kernels.triton_additive_forward import apply_kernel, summary_kernel

SHORTEST_SEGMENT, LONGEST_SEGMENT = 1024, 2048
PROGRAMS_PER_PROCESSOR = 4
_FARTHEST = 2**24
"""Elements between tokens, so that a place within a chunk of 128 is an int32."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def segment_length(heads: int, length: int, device: torch.device) -> int:
    """The most tokens of a segment: short enough for about 4 programs on each of the device's processors.

    At least 1024: below it the states would be more than a quarter of the forward traffic. At most 2048, since the
    rounding errors of the decays' gradients add up along a segment.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = heads * length // (PROGRAMS_PER_PROCESSOR * processors)
    return min(max(SHORTEST_SEGMENT, 1 << max(wanted - 1, 0).bit_length()), LONGEST_SEGMENT)


@dataclass(frozen=True)
class _Problem:
    """What the launches of one call share: sizes, the decay as the kernels take it, and where the segments lie."""

    length: int
    batch: int
    heads: int
    query_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    gates: Gates
    segments: tuple[Segment, ...]

    @property
    def decay_kind(self) -> str:
        """One of tuning.DECAYS."""
        if not self.gates or self.gates[0].dim() == 1:
            return "constant"
        return "scalar" if self.gates[0].dim() == 3 else "vector"

    @property
    def gate(self) -> tuple[Tensor, tuple[int, int, int]]:
        """The decay, one of 0 where there is none, and its strides of B, T and H."""
        if self.decay_kind == "vector":
            return _with_strides(self.gates[0])
        gate = self.gates[0] if self.gates else torch.zeros(self.heads, device=self.device)
        return gate, (0, 0, gate.stride(0)) if gate.dim() == 1 else (gate.stride(0), gate.stride(1), gate.stride(2))

    @property
    def gate_share(self) -> int:
        """How many states share a head of the decay."""
        gate = self.gate[0]
        return self.heads // gate.shape[0 if gate.dim() == 1 else 2]

    @property
    def whole(self) -> tuple[tuple[int, int], ...]:
        """Where the segments begin and end."""
        return tuple((segment.begin, segment.end) for segment in self.segments)

    @property
    def readers(self) -> int:
        """Query heads of a state."""
        return self.query_heads // self.heads

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (len(self.segments), self.batch, self.heads, self.key_dim, self.value_dim)

    @property
    def precision(self) -> dict[str, Any]:
        """The dtype of products, and how float32 ones are made."""
        if self.dtype == torch.bfloat16:
            return {"DOT": tl.bfloat16, "PRECISION": "tf32"}
        exact = self.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
        return {"DOT": tl.float32, "PRECISION": "ieee" if exact else "tf32"}

    def blocks(self, name: str) -> tuning.Blocks:
        """Tile sizes of one of tuning.KERNELS."""
        kernel = f"{name}/{self.decay_kind}"
        return tuning.choose(kernel, self.key_dim, self.value_dim, self.dtype, self.device)

    def tiles(self, blocks: tuning.Blocks) -> int:
        """How many blocks of K and V a state is cut into."""
        return -(-self.key_dim // blocks["block_k"]) * -(-self.value_dim // blocks["block_v"])

    def shares(self, k: Tensor, v: Tensor) -> dict[str, int]:
        """How many states share a head of k, v and the decay, and how many query heads a state."""
        return {
            "K_SHARE": self.heads // k.shape[2],
            "V_SHARE": self.heads // v.shape[2],
            "GATE_SHARE": self.gate_share,
            "READERS": self.readers,
        }

    def launch(self, kernel: Any, blocks: tuning.Blocks, *arguments: Any, **constants: Any) -> None:
        """Run a program for each segment, sequence, head and tile of the state."""
        programs = self.tiles(blocks) * len(self.segments) * self.batch * self.heads
        if not programs:
            return
        on: AbstractContextManager[Any] = (
            torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        )
        with on:
            kernel[(programs,)](
                *arguments,
                self.heads,
                self.batch,
                K=self.key_dim,
                V=self.value_dim,
                KIND=self.decay_kind,
                C=blocks["chunk"],
                BK=blocks["block_k"],
                BV=blocks["block_v"],
                num_warps=blocks["warps"],
                num_stages=blocks["stages"],
                **self.precision,
                **constants,
            )


def _problem(
    k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], query_heads: int | None = None
) -> _Problem:
    """The problem that the tensors pose, where the kernels take it. `LinearRecurrence.check` has seen the shapes."""
    if k.dtype not in _DTYPES:
        raise ValueError(
            f"the Triton recurrence takes float32, bfloat16 and float16, not {k.dtype}: "
            "longctx.kernels.additive takes it, in torch operators"
        )
    if max(k.shape[3], v.shape[3]) > tuning.LARGEST_DIM:
        raise ValueError(
            f"the Triton recurrence takes head dims up to {tuning.LARGEST_DIM}, not K {k.shape[3]} and V {v.shape[3]}: "
            "use more heads of fewer channels, or longctx.kernels.additive"
        )
    heads = state_heads(k, v, gates)
    return _Problem(
        batch=k.shape[0],
        length=k.shape[1],
        heads=heads,
        query_heads=query_heads or heads,
        key_dim=k.shape[3],
        value_dim=v.shape[3],
        dtype=k.dtype,
        device=k.device,
        gates=gates,
        segments=tuple(segments),
    )


def _with_strides(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """x with neighbouring channels, as the kernels read them, and its strides of B, T and H."""
    if x.stride(-1) != 1 or x.stride(1) >= _FARTHEST:
        x = x.contiguous()
    return x, (x.stride(0), x.stride(1), x.stride(2))


def _maybe_with_strides(x: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int]]:
    return (None, (0, 0, 0)) if x is None else _with_strides(x)


def _per_state(x: Tensor, heads: int) -> Tensor:
    """What the gradient of x is written to: like x, or float32 with a head a state where states share heads of x."""
    if x.shape[2] == heads:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty(*x.shape[:2], heads, x.shape[3], dtype=torch.float32, device=x.device)


def _to_shared(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of each state."""
    if grad.shape == x.shape:
        return grad.to(x.dtype)
    return grad.unflatten(2, (x.shape[2], -1)).sum(dim=3).to(x.dtype)


def _on_device(x: Tensor, device: torch.device) -> Tensor:
    """Move a tensor of the host without waiting for the device."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


@lru_cache(maxsize=16)
def _bounds(bounds: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Begins and ends, `[N, 2]` int32. All layers of a model have the same."""
    return _on_device(torch.tensor(bounds, dtype=torch.int32).view(-1, 2), device)


@lru_cache(maxsize=4)
def _documents(segments: tuple[Segment, ...], device: torch.device) -> Tensor | None:
    """`[T]` int32: how many documents have begun in a token's segment up to it. None where none begins anywhere."""
    if not any(segment.starts for segment in segments):
        return None
    ids = torch.zeros(max(segment.end for segment in segments), dtype=torch.int32)
    for segment in segments:
        if segment.starts:
            ids[[segment.begin + start for start in segment.starts]] = 1
            ids[segment.at] = ids[segment.at].cumsum(0, dtype=torch.int32)
    return _on_device(ids, device)


@lru_cache(maxsize=4)
def _cut_off(segments: tuple[Segment, ...], device: torch.device) -> Tensor | None:
    """`[N]` bool: in which segments documents begin. None where in none."""
    cut = [bool(segment.starts) for segment in segments]
    return _on_device(torch.tensor(cut), device) if any(cut) else None


def _summary(problem: _Problem, x: Tensor, y: Tensor, bounds: tuple[tuple[int, int], ...], reverse: bool) -> Carry:
    shape = problem.state_shape
    state = torch.empty(shape, dtype=torch.float32, device=problem.device)
    total = torch.empty(
        shape[:4] if problem.decay_kind == "vector" else shape[:3], dtype=torch.float32, device=problem.device
    )
    blocks = problem.blocks("summary")
    readers = problem.readers if reverse else 1
    problem.launch(
        summary_kernel,
        blocks,
        *_with_strides(x),
        *_with_strides(y),
        *problem.gate,
        _bounds(bounds, problem.device),
        state,
        total,
        X_SHARE=problem.heads * readers // x.shape[2],
        Y_SHARE=problem.heads * readers // y.shape[2],
        GATE_SHARE=problem.gate_share,
        READERS=readers,
        REVERSE=reverse,
    )
    cut = _cut_off(problem.segments, problem.device)
    if cut is not None:
        total.masked_fill_(cut.view(-1, *[1] * (total.dim() - 1)), float("-inf"))
    return Carry(total, state)


def summarize(k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment]) -> Carry:
    """Pass 1: the map of each segment; transition `[N, B, H]` or `[N, B, H, K]`, state `[N, B, H, K, V]`, float32.

    Of a segment in which documents begin only the last one is read. Errors, here and below: ValueError for dtypes and
    head dims that the kernels do not take.
    """
    problem = _problem(k, v, gates, segments)
    bounds = tuple((s.begin + (s.starts[-1] if s.starts else 0), s.end) for s in segments)
    return _summary(problem, k, v, bounds, reverse=False)


def summarize_grad(q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], do: Tensor) -> Carry:
    """Pass 1 backward: shapes as `summarize`. Of k and v only the shapes are used.

    Of a segment in which documents begin only the tokens before the first start are read.
    """
    problem = _problem(k, v, gates, segments, q.shape[2])
    bounds = tuple((s.begin, s.begin + s.starts[0] if s.starts else s.end) for s in segments)
    return _summary(problem, q, do, bounds, reverse=True)


def apply(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], states: Tensor
) -> tuple[Tensor, Tensor]:
    """Pass 2: o `[B, T, Hq, V]` in v's dtype, and the states after the segments `[N, B, H, K, V]`, float32."""
    problem = _problem(k, v, gates, segments, q.shape[2])
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=v.dtype, device=v.device)
    ends = torch.empty(problem.state_shape, dtype=torch.float32, device=v.device)
    blocks = problem.blocks("apply")
    problem.launch(
        apply_kernel,
        blocks,
        *_with_strides(q),
        *_with_strides(k),
        *_with_strides(v),
        *problem.gate,
        _documents(problem.segments, problem.device),
        _bounds(problem.whole, problem.device),
        states.contiguous(),
        *_with_strides(out),
        ends,
        **problem.shares(k, v),
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
    problem = _problem(k, v, gates, segments, q.shape[2])
    dends = dends.contiguous()
    dstates = torch.empty_like(dends)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (_per_state(x, problem.heads) for x in (k, v))
    inputs: list[Any] = [part for x in (q, k, v, do) for part in _with_strides(x)]
    inputs += [*problem.gate, _documents(problem.segments, problem.device), _bounds(problem.whole, problem.device)]
    shares = problem.shares(k, v)
    with_gates = bool(gates) and gate_grads

    blocks = problem.blocks("dq")
    terms, edges = _decay_grads(problem, blocks) if with_gates else (None, None)
    problem.launch(
        dq_kernel,
        blocks,
        *inputs,
        states.contiguous(),
        dends,
        *_with_strides(dq),
        *_maybe_with_strides(terms),
        edges,
        **shares,
    )

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
        problem.launch(dk_dv_kernel, blocks, *inputs, dends, *written, **shares)

    nothing = _maybe_with_strides(None)
    of_decay = (*_maybe_with_strides(terms), *_maybe_with_strides(dgate), edges)
    sweep(blocks, *_with_strides(dk), *(_with_strides(dv) if fused else nothing), *of_decay, dstates)
    if not fused:
        sweep(problem.blocks("dv"), *nothing, *_with_strides(dv), *nothing, *nothing, None, None)
    dgates = (None,) * len(gates) if dgate is None else (_gate_grad(problem, dgate),)
    return dq, _to_shared(dk, k), _to_shared(dv, v), dgates, dstates


def _decay_grads(problem: _Problem, blocks: tuning.Blocks) -> tuple[Tensor, Tensor]:
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


def _gate_grad(problem: _Problem, dgate: Tensor) -> Tensor:
    """The gradient of the decay, in its shape and dtype."""
    gate = problem.gates[0]
    if problem.decay_kind != "vector":
        dgate = dgate.unflatten(0, (-1, problem.batch)).sum(dim=0)
    if gate.dim() == 1:
        return dgate.sum(dim=(0, 1)).view(gate.shape[0], -1).sum(dim=1).to(gate.dtype)
    return _to_shared(dgate, gate)
