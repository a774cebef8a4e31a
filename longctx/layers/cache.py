"""KV cache and recurrent state for decoding, and the operations that run with or without them.

Linear layers decode from a fixed-size cache: the recurrent state, the last J - 1 inputs of a short convolution, and
LightNet's running log-sum-exp per channel. Softmax attention keeps a KV cache of all tokens or, with a sliding window,
of the last ones. A router that averages scores over earlier tokens caches these scores.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels import convolution
from longctx.kernels.attention import block as attention
from longctx.kernels.attention.block import FULL, BlockMask, Mask, Positions
from longctx.kernels.attention.masks import plain_mask
from longctx.kernels.linear.checks import check_state
from longctx.kernels.linear.recurrence import Gates, Inputs, LinearRecurrence
from longctx.moe.token_graph import attention_aware
from longctx.parallel.layout import Layout
from longctx.parallel.linear.convolution import short_convolution
from longctx.parallel.linear.state_scan import StateScan, begin_state_scan


class Cache:
    """Decoding cache of one block, for a batch of sequences of one document each; a new one is empty.

    Each layer uses the fields of its kind and leaves the others empty; `router_kv` is the feed-forward's, the others
    are the mixer's.
    """

    def __init__(self) -> None:
        self.tokens = 0
        """Number of tokens consumed."""
        self.state: Tensor | None = None
        """Recurrent state of a linear layer, `[B, H, K, V]` in the accumulation dtype."""
        self.conv_window: Tensor | None = None
        """Last J - 1 inputs of a short convolution, `[B, J - 1, D]`, zeros before the first token."""
        self.log_sum: Tensor | None = None
        """LightNet's running log-sum-exp of each channel's keys, `[B, 1, D]` in the accumulation dtype."""
        self.kv = KVBuffer()
        """KV cache of softmax attention."""
        self.router_kv = KVBuffer()
        """Scores of the tokens, for a router that averages them, and its keys if these are not the mixer's."""

    @property
    def nbytes(self) -> int:
        """Allocated bytes, spare capacity included."""
        tensors = (self.state, self.conv_window, self.log_sum, *self.kv.buffers, *self.router_kv.buffers)
        return sum(x.untyped_storage().nbytes() for x in tensors if x is not None)

    def check(self, layout: Layout) -> None:
        """Raise ValueError if the tokens of `layout` do not continue the cached ones."""
        if torch.is_grad_enabled():
            raise ValueError("cache: gradients do not flow through cached tokens; decode under torch.no_grad()")
        if layout.size > 1 or len(layout.cu_seqlens) > 2:
            raise ValueError(
                f"cache: the layout has {len(layout.cu_seqlens) - 1} documents on {layout.size} ranks; decoding "
                "supports one document on one rank"
            )
        if layout.past_tokens != self.tokens:
            raise ValueError(
                f"cache: the layout continues {layout.past_tokens} tokens, but the cache holds {self.tokens}; "
                f"use Layout((0, n), past_tokens={self.tokens})"
            )


class KVBuffer:
    """Growing buffers of per-token tensors: usually keys `[B, n, H, K]` and values `[B, n, H, V]`, in token order.

    Full buffers are replaced by ones 1.5 times the required size, so that appending costs two or three copies per token
    in total. The tokens of a head are contiguous, since attention reads all of them for each new token.
    """

    def __init__(self) -> None:
        self.buffers: tuple[Tensor, ...] = ()
        """One buffer per tensor, `[B, H, capacity, ...]`."""
        self._begin = self._end = 0

    def __len__(self) -> int:
        return self._end - self._begin

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Append new tokens, `[B, n, H, ...]` per tensor; return views of all tokens held, the new ones last."""
        end = self._end + new[0].shape[1]
        if not self.buffers or end > self.buffers[0].shape[2]:
            held = len(self)
            required = held + new[0].shape[1]
            grown = tuple(x.new_empty(x.shape[0], x.shape[2], required + required // 2, x.shape[3]) for x in new)
            for old, buffer in zip(self.buffers, grown, strict=bool(self.buffers)):
                buffer[:, :, :held] = old[:, :, self._begin : self._end]
            self.buffers, self._begin, self._end, end = grown, 0, held, required
        for buffer, tokens in zip(self.buffers, new, strict=True):
            buffer[:, :, self._end : end] = tokens.transpose(1, 2)
        self._end = end
        return tuple(buffer[:, :, self._begin : end].transpose(1, 2) for buffer in self.buffers)

    def keep_last(self, count: int) -> None:
        """Drop all but the last `count` tokens."""
        self._begin = max(self._begin, self._end - count)


@dataclass(frozen=True)
class CachedScan:
    """A state scan that starts from the cached recurrent state and stores the final one in the cache."""

    recurrence: LinearRecurrence
    k: Tensor
    v: Tensor
    gates: Gates
    cache: Cache | None
    scan: StateScan | None
    """None for a single token, which runs the recurrence's decoding step."""

    def finish(self, q: Tensor) -> Tensor:
        """Return o `[B, T_local, Ho, V]` for q `[B, T_local, Hq, K]`."""
        if self.scan is None:
            return self._step(q)
        out, final = self.scan.finish(q)
        if self.cache is not None:
            self.cache.state = final
        return out

    def _step(self, q: Tensor) -> Tensor:
        assert self.cache is not None
        inputs = Inputs(q, self.k, self.v, self.gates)
        state = inputs.empty_state() if self.cache.state is None else self.cache.state
        with torch.autocast(q.device.type, enabled=False):
            self.recurrence.check(inputs)
            check_state("state", state, inputs)
            out, self.cache.state = self.recurrence.step(inputs, state)
        return out


def begin_cached_scan(
    recurrence: LinearRecurrence, k: Tensor, v: Tensor, gates: Gates, layout: Layout, cache: Cache | None
) -> CachedScan:
    """Start `longctx.parallel.linear.state_scan`, from the cached recurrent state if there is a cache.

    Shapes as there; `finish(q)` of the result returns o. Training (no cache) and chunked prefill run the chunkwise
    form, a single token the decoding step: the same equations.
    """
    if cache is None:
        return CachedScan(recurrence, k, v, gates, None, begin_state_scan(recurrence, k, v, gates, layout))
    if layout.length == 1:
        return CachedScan(recurrence, k, v, gates, cache, None)
    scan = begin_state_scan(recurrence, k, v, gates, layout, initial_state=cache.state, final_state=True)
    return CachedScan(recurrence, k, v, gates, cache, scan)


def cached_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, activation: str | None, cache: Cache | None
) -> Tensor:
    """Run `longctx.parallel.linear.convolution.short_convolution`, continuing the cached inputs: `[B, T_local, D]`."""
    if cache is None:
        return short_convolution(x, weight, bias, layout, activation=activation)
    before, count = cache.conv_window, weight.shape[1] - 1
    if layout.length > 1:
        out = short_convolution(x, weight, bias, layout, activation=activation, initial=before)
        cache.conv_window = convolution.final_window(x, count, before=before)
        return out
    if before is None:
        before = x.new_zeros(x.shape[0], count, x.shape[2])
    with torch.autocast(x.device.type, enabled=False):
        out, cache.conv_window = convolution.step(x[:, 0], before, weight, bias, activation)
    return out[:, None]


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, mask: Mask, kv: KVBuffer
) -> tuple[Tensor, Tensor]:
    """Add new tokens to the KV cache and attend from them to all cached tokens that the causal mask shows them.

    Return the output `[B, n, H, V]` and the cached keys `[B, cached + n, H_kv, K]`, a view. Shapes: q `[B, n, H, K]`,
    k and v `[B, n, H_kv, ...]`, with rotary positions applied; `mask` as in
    `longctx.parallel.attention.softmax_attention`.
    """
    keys, values = kv.append(k, v)
    out = _attend_to_cache(q, keys, values, layout, scale, mask)
    kv.keep_last(mask.cached_keys(len(kv)))
    return out, keys


def cached_score_attention(
    q: Tensor, k: Tensor, layout: Layout, scale: float, mask: Mask, r: Tensor, cache: Cache | None
) -> Tensor:
    """Run `longctx.moe.token_graph.attention_aware`, `[B, T_local, E]`, over cached scores as well.

    With a cache, r `[B, n, E]` are the new tokens' scores and k all keys, as returned by `cached_attention`.
    """
    if cache is None:
        return attention_aware(r, q, k, layout, scale, mask)
    (scores,) = cache.router_kv.append(r[:, :, None])
    values = scores.expand(-1, -1, k.shape[2], -1)
    out = _attend_to_cache(q.to(r.dtype), k.to(r.dtype), values, layout, scale, mask)
    cache.router_kv.keep_last(mask.cached_keys(len(cache.router_kv)))
    return out.mean(dim=2)


def _attend_to_cache(q: Tensor, keys: Tensor, values: Tensor, layout: Layout, scale: float, mask: Mask) -> Tensor:
    """Attend from the new tokens, the last ones of `keys` and `values`, to all of these."""
    new = layout.length
    cached = keys.shape[1] - new
    block_mask: BlockMask
    if new == 1:
        # The cache keeps only visible keys. Fold the query heads of each key head into queries, to read keys only once.
        block_mask, q = FULL, q[:, 0].unflatten(1, (keys.shape[2], -1)).transpose(1, 2)
    else:
        key = ("cache", cached, mask, q.device)
        block_mask = layout.cached(key, lambda: _block_mask(cached, new, mask, q.device))
    with torch.autocast(q.device.type, enabled=False):
        out, _ = attention.forward(q, keys, values, block_mask, scale)
    return out.transpose(1, 2).flatten(1, 2)[:, None] if new == 1 else out


def _block_mask(cached: int, new: int, mask: Mask, device: torch.device) -> BlockMask:
    """Apply the mask to `new` tokens after `cached` ones; layers with as many cached tokens share the result."""
    places = torch.arange(cached + new, device=device)
    positions = Positions(places[cached:], places, mask=mask)
    return plain_mask(*positions.bounds, cached + new) or positions
