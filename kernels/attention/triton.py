"""Triton kernels for block attention under masks by position, which no library kernel supports.

A mask is two integers per query, the keys `begin <= j < end` that it sees (longctx.kernels.attention.masks). Both grow
from query to query, so the work of a tile is found by comparing bounds: the forward and dq kernels, one program per
query tile, walk the runs of keys that its queries see and skip the gaps between them; the dk/dv kernel, one program per
key tile and key head, loops over the queries between two indices that a binary search found before the launch, for
each query head that reads it. No invisible tile is computed, no gradient is added atomically, and keys are not repeated
for grouped heads.

Method: FlashAttention-2 (Dao 2023), algorithms 1 and 2 (online softmax), with the global out and lse in the backward
pass. Scores, sums and accumulators are float32; products are in the dtype of the input, for float32 without TF32. Head
dims are padded to a power of two by masked loads.

Imports triton; this module is imported only when it is needed. With TRITON_INTERPRET=1 in the environment when triton
is first imported it runs on CPU tensors, for tests.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx.kernels.attention.masks import PlainMask, Positions, key_bounds, query_bounds
from longctx.kernels.attention.tiled import dense_rows
from longctx.kernels.device import launch_device

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, on tensors of any device."""

MAX_HEAD_DIM = 256

_VARYING = ["tq", "tk", "bound_b", "bound_h", "tile_b", "tile_h"]
"""Arguments that differ from batch to batch: no separate kernel is compiled where they are divisible by 16."""

_NEVER = tl.constexpr(2**31 - 1)
_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2.0))


@dataclass(frozen=True)
class TileConfig:
    """Queries and keys per tile, and Triton's launch options."""

    queries: int
    keys: int
    warps: int
    stages: int


FORWARD = {64: TileConfig(128, 64, 4, 3), 128: TileConfig(128, 64, 8, 2), 256: TileConfig(64, 32, 8, 2)}
BACKWARD = {64: TileConfig(64, 64, 4, 2), 128: TileConfig(64, 64, 8, 2), 256: TileConfig(32, 32, 8, 1)}
SMALL = {64: TileConfig(32, 32, 4, 1), 128: TileConfig(32, 32, 8, 1), 256: TileConfig(16, 16, 8, 1)}
"""Tiles by the larger padded head dim. FORWARD and BACKWARD: 16-bit inputs on GPUs with at least 160 KiB of shared
memory per block (A100, H100, H200, B200). SMALL, for both passes: float32, and GPUs with about 100 KiB (compute
capability 8.6, 8.9, 12.x). Chosen by the compiler's report of shared memory and registers, not tuned on a GPU."""

ROOMY = ((8, 0), (9, 0), (10, 0), (10, 3))
"""The compute capabilities with 160 KiB of shared memory or more."""


def tile_config(
    table: dict[int, TileConfig], head_dim: int, dtype: torch.dtype, capability: tuple[int, int]
) -> TileConfig:
    """Look up the tile in FORWARD or BACKWARD: by head dim (the larger of K and V, at most 256), dtype, capability."""
    if dtype == torch.float32 or capability not in ROOMY:
        table = SMALL
    return table[next(size for size in sorted(table) if head_dim <= size)]


@triton.jit
def _load(pointer, rows, row_stride, columns, live_rows, live_columns, UPCAST: tl.constexpr):
    """Load rows of a matrix whose last stride is 1; 0 outside."""
    at = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    x = tl.load(pointer + at, mask=live_rows[:, None] & live_columns[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _bounds(BEGIN, END, rows, tq, TILE_Q: tl.constexpr):
    """Load begin and end of the keys of each query (none for rows beyond the last), and whether a run of keys ends at
    it: the keys of the tile's next query begin after its own end."""
    begin = tl.load(BEGIN + rows, mask=rows < tq, other=_NEVER)
    end = tl.load(END + rows, mask=rows < tq, other=0)
    inner = (tl.arange(0, TILE_Q) < TILE_Q - 1) & (rows + 1 < tq)
    following = tl.load(BEGIN + rows + 1, mask=inner, other=_NEVER)
    return begin, end, following > end


@triton.jit
def _next_run(begin, end, closing, done, TILE_K: tl.constexpr):
    """Find the first key from `done` on that a query of the tile sees (rounded down to a tile), and the run's end."""
    low = tl.maximum(begin, done)
    start = tl.min(tl.where(end > low, low, _NEVER))
    stop = tl.min(tl.where(closing & (end > start), end, _NEVER))
    return start // TILE_K * TILE_K, stop


@triton.jit(do_not_specialize=_VARYING[:4])
def _forward_kernel(
    Q, K, V, BEGIN, END, OUT, LSE,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, bound_b, bound_h,
    scale, tq, tk, heads, group, k_dim, v_dim,
    K_PAD: tl.constexpr, V_PAD: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    tile, row = tl.program_id(0), tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    shared = h // group
    queries = tile * TILE_Q + tl.arange(0, TILE_Q)
    live = queries < tq
    in_k, in_v = tl.arange(0, K_PAD), tl.arange(0, V_PAD)
    begin, end, closing = _bounds(
        BEGIN + b * bound_b + h * bound_h, END + b * bound_b + h * bound_h, queries, tq, TILE_Q
    )
    q = _load(Q + b * q_b + h * q_h, queries, q_t, in_k, live, in_k < k_dim, UPCAST)

    top = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    acc = tl.zeros([TILE_Q, V_PAD], tl.float32)
    start, stop = _next_run(begin, end, closing, 0, TILE_K)
    while stop < _NEVER:
        for at in range(start, stop, TILE_K):
            keys = at + tl.arange(0, TILE_K)
            k = _load(K + b * k_b + shared * k_h, keys, k_t, in_k, keys < tk, in_k < k_dim, UPCAST)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E)
            visible = (keys[None, :] >= begin[:, None]) & (keys[None, :] < end[:, None])
            scores = tl.where(visible, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            # Rows that have seen nothing have weights exp2(-inf - 0) = 0, not exp2(-inf + inf).
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(scores - finite[:, None])
            kept = tl.exp2(top - finite)
            v = _load(V + b * v_b + shared * v_h, keys, v_t, in_v, keys < tk, in_v < v_dim, UPCAST)
            acc = acc * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            total = total * kept + tl.sum(weights, axis=1)
            top = new_top
        start, stop = _next_run(begin, end, closing, tl.cdiv(stop, TILE_K) * TILE_K, TILE_K)

    seen = total > 0
    out = acc / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, top * _LN2 + tl.log(tl.where(seen, total, 1.0)), float("-inf"))
    # OUT is [B, Tq, H, V] and LSE [B, H, Tq], both contiguous.
    at = ((b * tq + queries.to(tl.int64)) * heads + h) * v_dim
    tl.store(OUT + at[:, None] + in_v[None, :], out.to(OUT.dtype.element_ty), live[:, None] & (in_v < v_dim)[None, :])
    tl.store(LSE + (b * heads + h) * tq + queries, lse, live)


@triton.jit(do_not_specialize=_VARYING[:1])
def _delta_kernel(
    DO, OUT, DELTA, do_b, do_t, do_h, o_b, o_t, o_h, tq, heads, v_dim,
    V_PAD: tl.constexpr, TILE_Q: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    tile, row = tl.program_id(0), tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    queries, in_v = tile * TILE_Q + tl.arange(0, TILE_Q), tl.arange(0, V_PAD)
    live = queries < tq
    do = _load(DO + b * do_b + h * do_h, queries, do_t, in_v, live, in_v < v_dim, UPCAST).to(tl.float32)
    out = _load(OUT + b * o_b + h * o_h, queries, o_t, in_v, live, in_v < v_dim, UPCAST).to(tl.float32)
    tl.store(DELTA + (b * heads + h) * tq + queries, tl.sum(do * out, axis=1), live)


@triton.jit(do_not_specialize=_VARYING[:4])
def _dq_kernel(
    Q, K, V, DO, BEGIN, END, LSE, DELTA, DQ,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, bound_b, bound_h,
    scale, tq, tk, heads, group, k_dim, v_dim,
    K_PAD: tl.constexpr, V_PAD: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    tile, row = tl.program_id(0), tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    shared = h // group
    queries = tile * TILE_Q + tl.arange(0, TILE_Q)
    live = queries < tq
    in_k, in_v = tl.arange(0, K_PAD), tl.arange(0, V_PAD)
    begin, end, closing = _bounds(
        BEGIN + b * bound_b + h * bound_h, END + b * bound_b + h * bound_h, queries, tq, TILE_Q
    )
    q = _load(Q + b * q_b + h * q_h, queries, q_t, in_k, live, in_k < k_dim, UPCAST)
    do = _load(DO + b * do_b + h * do_h, queries, do_t, in_v, live, in_v < v_dim, UPCAST)
    lse = tl.load(LSE + (b * heads + h) * tq + queries, live, other=0.0) * _LOG2E
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    delta = tl.load(DELTA + (b * heads + h) * tq + queries, live, other=0.0)

    dq = tl.zeros([TILE_Q, K_PAD], tl.float32)
    start, stop = _next_run(begin, end, closing, 0, TILE_K)
    while stop < _NEVER:
        for at in range(start, stop, TILE_K):
            keys = at + tl.arange(0, TILE_K)
            k = _load(K + b * k_b + shared * k_h, keys, k_t, in_k, keys < tk, in_k < k_dim, UPCAST)
            v = _load(V + b * v_b + shared * v_h, keys, v_t, in_v, keys < tk, in_v < v_dim, UPCAST)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E)
            visible = (keys[None, :] >= begin[:, None]) & (keys[None, :] < end[:, None])
            weights = tl.exp2(tl.where(visible, scores - lse[:, None], float("-inf")))
            dweights = tl.dot(do, tl.trans(v), input_precision="ieee")
            dscores = weights * (dweights - delta[:, None])
            dq += tl.dot(dscores.to(k.dtype), k, input_precision="ieee")
        start, stop = _next_run(begin, end, closing, tl.cdiv(stop, TILE_K) * TILE_K, TILE_K)

    at = ((b * tq + queries.to(tl.int64)) * heads + h) * k_dim
    dq = (dq * scale).to(DQ.dtype.element_ty)
    tl.store(DQ + at[:, None] + in_k[None, :], dq, live[:, None] & (in_k < k_dim)[None, :])


@triton.jit(do_not_specialize=_VARYING)
def _dkv_kernel(
    Q, K, V, DO, BEGIN, END, FIRST, LAST, LSE, DELTA, DK, DV,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, bound_b, bound_h, tile_b, tile_h,
    scale, tq, tk, heads, group, k_dim, v_dim,
    K_PAD: tl.constexpr, V_PAD: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    tile, row = tl.program_id(0), tl.program_id(1)
    kv_heads = heads // group
    b, shared = (row // kv_heads).to(tl.int64), (row % kv_heads).to(tl.int64)
    keys = tile * TILE_K + tl.arange(0, TILE_K)
    live = keys < tk
    in_k, in_v = tl.arange(0, K_PAD), tl.arange(0, V_PAD)
    k = _load(K + b * k_b + shared * k_h, keys, k_t, in_k, live, in_k < k_dim, UPCAST)
    v = _load(V + b * v_b + shared * v_h, keys, v_t, in_v, live, in_v < v_dim, UPCAST)

    dk = tl.zeros([TILE_K, K_PAD], tl.float32)
    dv = tl.zeros([TILE_K, V_PAD], tl.float32)
    for member in range(0, group):
        h = shared * group + member
        first = tl.load(FIRST + b * tile_b + h * tile_h + tile)
        last = tl.load(LAST + b * tile_b + h * tile_h + tile)
        bounds = b * bound_b + h * bound_h
        stats = (b * heads + h) * tq
        for at in range(first, last, TILE_Q):
            queries = at + tl.arange(0, TILE_Q)
            seeing = queries < last
            q = _load(Q + b * q_b + h * q_h, queries, q_t, in_k, seeing, in_k < k_dim, UPCAST)
            do = _load(DO + b * do_b + h * do_h, queries, do_t, in_v, seeing, in_v < v_dim, UPCAST)
            begin = tl.load(BEGIN + bounds + queries, seeing, other=0)
            end = tl.load(END + bounds + queries, seeing, other=0)
            lse = tl.load(LSE + stats + queries, seeing, other=0.0) * _LOG2E
            lse = tl.where(lse == float("-inf"), 0.0, lse)
            delta = tl.load(DELTA + stats + queries, seeing, other=0.0)
            # Transposed, so that neither product needs a transposed accumulator.
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * _LOG2E)
            visible = (keys[:, None] >= begin[None, :]) & (keys[:, None] < end[None, :])
            weights = tl.exp2(tl.where(visible, scores - lse[None, :], float("-inf")))
            dv += tl.dot(weights.to(do.dtype), do, input_precision="ieee")
            dweights = tl.dot(v, tl.trans(do), input_precision="ieee")
            dscores = weights * (dweights - delta[None, :])
            dk += tl.dot(dscores.to(q.dtype), q, input_precision="ieee")

    rows = (b * tk + keys.to(tl.int64)) * kv_heads + shared
    dk = (dk * scale).to(DK.dtype.element_ty)
    tl.store(DK + (rows * k_dim)[:, None] + in_k[None, :], dk, live[:, None] & (in_k < k_dim)[None, :])
    dv = dv.to(DV.dtype.element_ty)
    tl.store(DV + (rows * v_dim)[:, None] + in_v[None, :], dv, live[:, None] & (in_v < v_dim)[None, :])


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _common(k_dim: int, v_dim: int, tile: TileConfig) -> dict[str, int]:
    return {
        "K_PAD": max(16, triton.next_power_of_2(k_dim)),
        "V_PAD": max(16, triton.next_power_of_2(v_dim)),
        "TILE_Q": tile.queries,
        "TILE_K": tile.keys,
        # The interpreter multiplies bf16 matrices wrongly.
        "UPCAST": INTERPRETED,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _tile(table: dict[int, TileConfig], q: Tensor, v: Tensor) -> TileConfig:
    capability = torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else ROOMY[0]
    return tile_config(table, max(q.shape[3], v.shape[3]), q.dtype, capability)


def _bounds_of(mask: PlainMask | Positions, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, int, int]:
    begin, end = (x.contiguous() for x in key_bounds(mask, q.shape[1], k.shape[1], q.device))
    return begin, end, *_by_head(begin)


def _by_head(bounds: Tensor) -> tuple[int, int]:
    """Return the strides of sequences and of heads: 0 where all have the same bounds."""
    return (bounds.stride(0), bounds.stride(1)) if bounds.dim() == 3 else (0, 0)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: PlainMask | Positions, scale: float, tile: TileConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Return out `[B, Tq, H, V]` in q's dtype and lse `[B, H, Tq]` float32. Shapes as in longctx.kernels.attention.

    bf16, fp16 or float32, head dims up to 256. `tile` is for tests and measurements; None looks it up in FORWARD.
    """
    tile = tile or _tile(FORWARD, q, v)
    q, k, v = map(dense_rows, (q, k, v))
    batch, queries, heads, k_dim = q.shape
    v_dim = v.shape[3]
    begin, end, bound_b, bound_h = _bounds_of(mask, q, k)
    out = torch.empty(batch, queries, heads, v_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    with launch_device(q.device):
        _forward_kernel[(triton.cdiv(queries, tile.queries), batch * heads)](
            q, k, v, begin, end, out, lse,
            *_strides(q, k, v), bound_b, bound_h,
            scale, queries, k.shape[1], heads, heads // k.shape[2], k_dim, v_dim,
            **_common(k_dim, v_dim, tile),
        )  # fmt: skip
    return out, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: PlainMask | Positions,
    scale: float,
    tile: TileConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the block's contributions to dq, dk, dv in the dtypes of q, k, v, from the global out and lse."""
    tile = tile or _tile(BACKWARD, q, v)
    do, q, k, v, out = map(dense_rows, (do, q, k, v, out))
    lse = lse.contiguous()
    batch, queries, heads, k_dim = q.shape
    keys, kv_heads, v_dim = k.shape[1], k.shape[2], v.shape[3]
    begin, end, bound_b, bound_h = _bounds_of(mask, q, k)
    first, last = query_bounds(begin, end, keys, tile.keys)
    tile_b, tile_h = _by_head(first)
    common = _common(k_dim, v_dim, tile)
    q_grid = (triton.cdiv(queries, tile.queries), batch * heads)

    delta = torch.empty_like(lse)
    with launch_device(q.device):
        _delta_kernel[q_grid](
            do, out, delta, *_strides(do, out), queries, heads, v_dim,
            V_PAD=common["V_PAD"], TILE_Q=tile.queries, UPCAST=INTERPRETED,
        )  # fmt: skip
    sizes = scale, queries, keys, heads, heads // kv_heads, k_dim, v_dim
    strides = _strides(q, k, v, do)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    with launch_device(q.device):
        _dq_kernel[q_grid](
            q, k, v, do, begin, end, lse, delta, dq, *strides, bound_b, bound_h, *sizes, **common
        )  # fmt: skip
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    with launch_device(q.device):
        _dkv_kernel[(triton.cdiv(keys, tile.keys), batch * kv_heads)](
            q, k, v, do, begin, end, first, last, lse, delta, dk, dv,
            *strides, bound_b, bound_h, tile_b, tile_h, *sizes, **common,
        )  # fmt: skip
    return dq, dk, dv
