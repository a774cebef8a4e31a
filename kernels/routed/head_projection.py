"""Projections to and from the heads that a token reads: a matrix for each head, of the chosen tokens alone.

    to heads:     y[t, e] = W_e x[t]           for the chosen (t, e), else 0
    from heads:   y[t]    = sum over the chosen e of W_e x[t, e]

Tokens are taken a block at a time, whose rows stay in cache while each head gathers its own: at 16,384 tokens of 2,048
channels and 16 heads of 64, half of them chosen, that takes 0.68 of the time of the whole product on 2 cores. On a GPU
the whole product is made and masked: its rows would have to be read again for every head.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from longctx.kernels.autograd import exact_backward, exact_forward
from longctx.kernels.dtypes import accumulation_dtype

BLOCK = 1024
"""Tokens whose rows stay in cache."""


def _blocks(chosen: Tensor) -> Iterator[tuple[int, slice, list[tuple[int, Tensor]]]]:
    """Row, tokens, and for each head that any of these have chosen the places of those that did."""
    for row in range(chosen.shape[0]):
        for begin in range(0, chosen.shape[1], BLOCK):
            at = slice(begin, min(begin + BLOCK, chosen.shape[1]))
            heads, tokens = chosen[row, at].T.nonzero(as_tuple=True)
            sizes = torch.bincount(heads, minlength=chosen.shape[2]).tolist()
            yield row, at, [(e, some) for e, some in enumerate(tokens.split(sizes)) if len(some)]


def _rows(places: Tensor | None, row: int, at: slice, tokens: Tensor, e: int, shape: torch.Size) -> Tensor:
    """Where the pairs of a head and some tokens of a block lie among all rows."""
    if places is not None:
        return places[row, at, e].index_select(0, tokens)
    _, length, heads = shape
    return (row * length + at.start + tokens) * heads + e


class _ToHeads(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx: Any, x: Tensor, weight: Tensor, chosen: Tensor, places: Tensor | None, count: int) -> Tensor:
        ctx.save_for_backward(x, weight, chosen, places)
        out = x.new_zeros(count, weight.shape[1])
        for row, at, heads in _blocks(chosen):
            block = x[row, at]
            for e, tokens in heads:
                pairs = _rows(places, row, at, tokens, e, chosen.shape)
                out.index_copy_(0, pairs, block.index_select(0, tokens) @ weight[e].T)
        return out

    @staticmethod
    @exact_backward
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, chosen, places = ctx.saved_tensors
        dtype = accumulation_dtype(x.dtype)
        dx = torch.zeros(x.shape, dtype=dtype, device=x.device)
        dweight = torch.zeros(weight.shape, dtype=dtype, device=x.device)
        for row, at, heads in _blocks(chosen):
            block, into = x[row, at], dx[row, at]
            for e, tokens in heads:
                grad = dy.index_select(0, _rows(places, row, at, tokens, e, chosen.shape))
                dweight[e] += grad.T @ block.index_select(0, tokens)
                into.index_add_(0, tokens, (grad @ weight[e]).to(dtype))
        return dx.to(x.dtype), dweight.to(weight.dtype), None, None, None


class _FromHeads(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx: Any, x: Tensor, weight: Tensor, chosen: Tensor, places: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, chosen, places)
        dtype = accumulation_dtype(x.dtype)
        out = torch.zeros(*chosen.shape[:2], weight.shape[1], dtype=dtype, device=x.device)
        for row, at, heads in _blocks(chosen):
            into = out[row, at]
            for e, tokens in heads:
                pairs = x.index_select(0, _rows(places, row, at, tokens, e, chosen.shape))
                into.index_add_(0, tokens, (pairs @ weight[e].T).to(dtype))
        return out.to(x.dtype)

    @staticmethod
    @exact_backward
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, chosen, places = ctx.saved_tensors
        dx = torch.zeros_like(x)
        dweight = torch.zeros(weight.shape, dtype=accumulation_dtype(x.dtype), device=x.device)
        for row, at, heads in _blocks(chosen):
            grads = dy[row, at]
            for e, tokens in heads:
                grad = grads.index_select(0, tokens)
                pairs = _rows(places, row, at, tokens, e, chosen.shape)
                dweight[e] += grad.T @ x.index_select(0, pairs)
                dx.index_copy_(0, pairs, grad @ weight[e])
        return dx, dweight.to(weight.dtype), None, None


def _check(x: Tensor, weight: Tensor, chosen: Tensor, shape: tuple[int, ...]) -> None:
    heads, batch_length = chosen.shape[-1], chosen.shape[:-1]
    if chosen.dtype != torch.bool or chosen.dim() != 3 or x.shape[:2] != batch_length or weight.shape[0] != heads:
        raise ValueError(
            f"routed projection: x {tuple(x.shape)}, weight {tuple(weight.shape)} and chosen {chosen.dtype} "
            f"{tuple(chosen.shape)} do not fit: expected chosen bool [B, T, E], x [B, T, ...], weight [E, out, in]"
        )
    if x.shape[2:] != shape:
        raise ValueError(f"routed projection: x is {tuple(x.shape)}, and the weight takes {shape} a token")


def _autocast(*tensors: Tensor) -> Iterator[Tensor]:
    """In autocast's dtype where it is on, as matrix products are."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return (x if dtype is None else x.to(dtype) for x in tensors)


def project_to_heads(x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """`[B, T, E, K]`: a projection of x `[B, T, D]` for each head, weight `[E, K, D]`, zero where `chosen` `[B, T, E]`
    (bool) is not. Differentiable in x and weight. Raises ValueError where shapes do not fit.
    """
    _check(x, weight, chosen, (weight.shape[2],))
    x, weight = _autocast(x, weight)
    if x.is_cuda:
        return torch.einsum("btd,ekd->btek", x, weight) * chosen[..., None]
    rows = _ToHeads.apply(x, weight, chosen, None, chosen.numel())  # type: ignore[no-untyped-call]
    return rows.view(*chosen.shape, weight.shape[1])


def project_from_heads(x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """`[B, T, D]`: the sum over the `chosen` `[B, T, E]` (bool) of the projections of each head, x `[B, T, E, V]` and
    weight `[E, D, V]`. Differentiable in x and weight. Raises ValueError where shapes do not fit.
    """
    _check(x, weight, chosen, (weight.shape[0], weight.shape[2]))
    x, weight = _autocast(x, weight)
    if x.is_cuda:
        return torch.einsum("btev,edv->btd", x * chosen[..., None], weight)
    out: Tensor = _FromHeads.apply(x.reshape(-1, x.shape[3]), weight, chosen, None)  # type: ignore[no-untyped-call]
    return out


def project_to_pairs(x: Tensor, weight: Tensor, chosen: Tensor, places: Tensor, count: int) -> Tensor:
    """`[count, K]`: what `project_to_heads` gives for the chosen pairs, each in the row that `places` `[B, T, E]`
    (int64) says, which are different ones; zero in rows that no pair has."""
    _check(x, weight, chosen, (weight.shape[2],))
    x, weight = _autocast(x, weight)
    if x.is_cuda:
        rows = x.new_zeros(count, weight.shape[1])
        return rows.index_copy(0, places[chosen], torch.einsum("btd,ekd->btek", x, weight)[chosen])
    return _ToHeads.apply(x, weight, chosen, places, count)  # type: ignore[no-untyped-call]


def project_from_pairs(x: Tensor, weight: Tensor, chosen: Tensor, places: Tensor) -> Tensor:
    """`[B, T, D]`: what `project_from_heads` gives for x `[count, V]`, whose rows are the pairs as in
    `project_to_pairs`."""
    _check(x.expand(*chosen.shape[:2], *x.shape), weight, chosen, (len(x), weight.shape[2]))
    x, weight = _autocast(x, weight)
    if x.is_cuda:
        heads = x.new_zeros(*chosen.shape, x.shape[1]).index_put((chosen,), x[places[chosen]])
        return torch.einsum("btev,edv->btd", heads, weight)
    return _FromHeads.apply(x, weight, chosen, places)  # type: ignore[no-untyped-call]
