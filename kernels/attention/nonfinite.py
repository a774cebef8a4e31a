"""Block attention whose inputs are not all finite: NaN and infinity reach the queries that see them, and nothing else.

A key or value that is not finite makes the outputs of all queries that see it NaN; a query that is not finite, its own.
Backward the same, and in the other direction: the gradients of the keys that such a query sees are NaN. Nothing else
changes by a bit (`longctx.kernels.finite` says how).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from longctx.kernels.attention.masks import BlockMask, key_bounds
from longctx.kernels.attention.tiled import Gradients
from longctx.kernels.finite import all_finite, bad_rows, is_checked, per_head, without

NAN = float("nan")


def contained_forward(
    run: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, mask: BlockMask
) -> tuple[Tensor, Tensor]:
    """Return out and lse of `run(q, k, v)`, NaN for the queries that are not finite or see what is not."""
    out, lse = run(q, k, v)
    if not is_checked(q) or all_finite(out):
        return out, lse
    bad_queries, bad_k, bad_v = (bad_rows(x) for x in (q, k, v))
    if not bool(bad_queries.any() | bad_k.any() | bad_v.any()):
        return out, lse
    reached = bad_queries | _seeing(bad_k | bad_v, mask, q)
    out, lse = run(without(q, bad_queries), without(k, bad_k), without(v, bad_v))
    return out.masked_fill(reached[..., None], NAN), lse.masked_fill(reached.transpose(1, 2), NAN)


def contained_backward(
    run: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Gradients],
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: BlockMask,
) -> Gradients:
    """Return dq, dk, dv of `run(do, q, k, v, out, lse)`, NaN where a bad query, or a bad key that it sees, reaches."""
    grads = run(do, q, k, v, out, lse)
    if not is_checked(q) or all_finite(*grads):
        return grads
    bad_k, bad_v = bad_rows(k), bad_rows(v)
    # The lse of a query that sees nothing is -inf.
    bad_lse = (lse.isnan() | (lse == float("inf"))).transpose(1, 2)
    bad_queries = bad_rows(q) | bad_rows(do) | bad_rows(out) | bad_lse | _seeing(bad_k | bad_v, mask, q)
    if not bool(bad_queries.any() | bad_k.any() | bad_v.any()):
        return grads
    do, q, out = (without(x, bad_queries) for x in (do, q, out))
    lse = lse.masked_fill(bad_queries.transpose(1, 2), 0.0)
    dq, dk, dv = run(do, q, without(k, bad_k), without(v, bad_v), out, lse)
    bad_keys = (_seen(bad_queries, mask, k) | bad_k | bad_v)[..., None]
    return dq.masked_fill(bad_queries[..., None], NAN), dk.masked_fill(bad_keys, NAN), dv.masked_fill(bad_keys, NAN)


def _bounds(mask: BlockMask, queries: Tensor, keys: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return begin and end of what queries `[B, Tq, H]` see of keys `[B, Tk, H_kv]`, expanded to `[B, Tq, H]`."""
    assert not isinstance(mask, Tensor)
    bounds = key_bounds(mask, queries.shape[1], keys.shape[1], queries.device)
    shape = queries.shape[0], queries.shape[1], heads
    begin, end = (
        (x[None, :, None] if x.dim() == 1 else x.transpose(1, 2)).expand(shape).to(torch.int64) for x in bounds
    )
    return begin, torch.maximum(begin, end)


def _seeing(bad: Tensor, mask: BlockMask, q: Tensor) -> Tensor:
    """Return the queries that see a bad key, `[B, Tq, H]`, for bad keys `[B, Tk, H_kv]`."""
    bad = per_head(bad, q.shape[2])
    if isinstance(mask, Tensor):
        return torch.einsum("qk,bkh->bqh", mask.float(), bad.float()) > 0
    begin, end = _bounds(mask, q[..., 0], bad, q.shape[2])
    before = torch.nn.functional.pad(bad.cumsum(dim=1), (0, 0, 1, 0))
    return before.gather(1, end) > before.gather(1, begin)


def _seen(bad: Tensor, mask: BlockMask, k: Tensor) -> Tensor:
    """Return the keys that a bad query sees, `[B, Tk, H_kv]`, for bad queries `[B, Tq, H]`."""
    if isinstance(mask, Tensor):
        return per_head(torch.einsum("qk,bqh->bkh", mask.float(), bad.float()) > 0, k.shape[2])
    begin, end = _bounds(mask, bad, k[..., 0], bad.shape[2])
    edges = torch.zeros(bad.shape[0], k.shape[1] + 1, bad.shape[2], dtype=torch.int64, device=bad.device)
    edges.scatter_add_(1, begin, bad.long()).scatter_add_(1, end, -bad.long())
    return per_head(edges.cumsum(dim=1)[:, :-1] > 0, k.shape[2])
