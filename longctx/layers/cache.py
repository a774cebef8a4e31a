"""What a layer remembers of the tokens that it has seen, so that generation goes on from there.

A linear recurrence remembers its state, a short convolution its last W - 1 inputs, LightNet a number for each channel:
the same size after any number of tokens. Softmax attention remembers keys and values, all of them or, with a window,
the newest; a router that reads earlier tokens remembers their scores. Of training nothing passes through here but
`attend_to_scores`, which is both.
"""

from typing import Any

import torch
from torch import Tensor

from longctx.kernels import convolution
from longctx.kernels.attention import block as attention
from longctx.kernels.attention.block import CAUSAL, FULL, BlockMask, Positions
from longctx.kernels.linear import api as kernel
from longctx.kernels.linear.operators import DELTA
from longctx.kernels.linear.recurrence import Gates, LinearRecurrence
from longctx.moe.token_graph import attention_aware
from longctx.parallel.layout import Layout
from longctx.parallel.linear.convolution import short_convolution
from longctx.parallel.linear.state_scan import Begun, state_scan


class Cache:
    """What one block remembers of one document, for each sequence of a batch; a new one is of no token.

    A layer reads and replaces what is of its kind and leaves the rest empty; `routed` is the feed-forward's, the rest
    the mixer's.
    """

    def __init__(self) -> None:
        self.tokens = 0
        """Tokens that the layer has seen."""
        self.state: Tensor | None = None
        """Of a linear recurrence: `[B, H, K, V]` in the accumulation dtype."""
        self.window: Tensor | None = None
        """Of a short convolution: its last W - 1 inputs, `[B, W - 1, D]`, zeros before the first."""
        self.log_sum: Tensor | None = None
        """Of LightNet: the log-sum-exp of each channel's keys, `[B, 1, D]` in the accumulation dtype."""
        self.keys = KVBuffer()
        """Of softmax attention: keys and values."""
        self.routed = KVBuffer()
        """Of a router that reads earlier tokens: its keys, where these are not the mixer's, and the tokens' scores."""

    @property
    def nbytes(self) -> int:
        """Bytes that are held, what buffers hold in advance included."""
        held = (self.state, self.window, self.log_sum, *self.keys.buffers, *self.routed.buffers)
        return sum(x.untyped_storage().nbytes() for x in held if x is not None)

    def check(self, layout: Layout) -> None:
        """Raise ValueError where a layer cannot go on from here over the tokens of `layout`."""
        if torch.is_grad_enabled():
            raise ValueError(
                "memory: gradients do not reach what a layer remembers; go on from it under torch.no_grad()"
            )
        if layout.size > 1 or len(layout.cu_seqlens) > 2:
            raise ValueError(
                f"memory: the layout has {len(layout.cu_seqlens) - 1} documents on {layout.size} ranks; what a layer "
                "remembers is of one document on one rank"
            )
        if layout.past_tokens != self.tokens:
            raise ValueError(
                f"memory: the layout continues {layout.past_tokens} tokens, and the layer remembers {self.tokens}; "
                f"give Layout((0, n), past_tokens={self.tokens})"
            )


class KVBuffer:
    """Keys `[B, n, H, K]`, values `[B, n, H, V]`, or more or fewer such tensors, of the newest tokens, in order.

    Buffers that are full are replaced by ones half as large again as what they have to hold: over all tokens, a token
    costs a copy of two or three, and not of all. Those of a head lie together, since every token reads all of them.
    """

    def __init__(self) -> None:
        self.buffers: tuple[Tensor, ...] = ()
        """`[B, H, capacity, ...]` of each."""
        self._begin = self._end = 0

    def __len__(self) -> int:
        return self._end - self._begin

    def append(self, *added: Tensor) -> tuple[Tensor, ...]:
        """What is held, that of the new tokens `[B, n, H, ...]` last; views of the buffers."""
        more = added[0].shape[1]
        end = self._end + more
        if not self.buffers or end > self.buffers[0].shape[2]:
            held, room = len(self), len(self) + more
            grown = tuple(x.new_empty(x.shape[0], x.shape[2], room + room // 2, x.shape[3]) for x in added)
            for old, new in zip(self.buffers, grown, strict=bool(self.buffers)):
                new[:, :, :held] = old[:, :, self._begin : self._end]
            self.buffers, self._begin, self._end, end = grown, 0, held, room
        for buffer, new in zip(self.buffers, added, strict=True):
            buffer[:, :, self._end : end] = new.transpose(1, 2)
        self._end = end
        return tuple(buffer[:, :, self._begin : end].transpose(1, 2) for buffer in self.buffers)

    def forget(self, keep: int) -> None:
        """Hold the newest `keep` alone."""
        self._begin = max(self._begin, self._end - keep)


def scan(
    recurrence: LinearRecurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    layout: Layout,
    cache: Cache | None,
    begun: Begun | None = None,
) -> Tensor:
    """`longctx.parallel.linear.state_scan.state_scan`, o `[B, T_local, Ho, V]`; from the state that is remembered and
    to the next.

    One token takes `longctx.kernels.linear.step`, the same equations without what cuts a sequence into pieces.
    """
    if cache is None:
        return state_scan(recurrence, q, k, v, gates, layout, begun=begun)[0]
    if layout.length > 1:
        out, cache.state = state_scan(
            recurrence, q, k, v, gates, layout, initial_state=cache.state, final_state=True, begun=begun
        )
        return out
    state = kernel.empty_state(k, v, gates) if cache.state is None else cache.state
    now: list[Any] = [g if g.dim() == 1 else g[:, 0] for g in gates]
    beta = now.pop(0) if recurrence is DELTA else None
    with torch.autocast(q.device.type, enabled=False):
        out, cache.state = kernel.step(q[:, 0], k[:, 0], v[:, 0], state, now[0] if now else None, beta)
    return out[:, None]


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, activation: str | None, cache: Cache | None
) -> Tensor:
    """`longctx.parallel.linear.convolution.short_convolution`, `[B, T_local, D]`; from the inputs that are remembered
    on."""
    if cache is None:
        return short_convolution(x, weight, bias, layout, activation=activation)
    before, count = cache.window, weight.shape[1] - 1
    if layout.length > 1:
        out = short_convolution(x, weight, bias, layout, activation=activation, initial=before)
        cache.window = convolution.final_window(x, count, before=before)
        return out
    if before is None:
        before = x.new_zeros(x.shape[0], count, x.shape[2])
    with torch.autocast(x.device.type, enabled=False):
        now, cache.window = convolution.step(x[:, 0], before, weight, bias, activation)
    return now[:, None]


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None, held: KVBuffer
) -> tuple[Tensor, Tensor]:
    """Causal softmax attention of the new tokens to what is held and to themselves, `[B, n, H, V]`; and all keys that
    they saw, `[B, held + n, H_kv, K]`, a view.

    Shapes: q `[B, n, H, K]`, k and v `[B, n, H_kv, ...]`, turned to their positions; `window` as in
    `longctx.parallel.attention.softmax_attention`.
    """
    keys, values = held.append(k, v)
    out = _attend(q, keys, values, layout, scale, window)
    if window is not None:
        held.forget(window - 1)
    return out, keys


def attend_to_scores(
    q: Tensor, k: Tensor, layout: Layout, scale: float, window: int | None, r: Tensor, cache: Cache | None
) -> Tensor:
    """`longctx.moe.token_graph.attention_aware`, `[B, T_local, E]`; with a memory of the new tokens' scores r
    `[B, n, E]` and of those remembered, k being all keys that `attend` gave.
    """
    if cache is None:
        return attention_aware(r, q, k, layout, scale, window)
    (scores,) = cache.routed.append(r[:, :, None])
    values = scores.expand(-1, -1, k.shape[2], -1)
    out = _attend(q.to(r.dtype), k.to(r.dtype), values, layout, scale, window)
    if window is not None:
        cache.routed.forget(window - 1)
    return out.mean(dim=2)


def _attend(q: Tensor, keys: Tensor, values: Tensor, layout: Layout, scale: float, window: int | None) -> Tensor:
    """Of the new tokens, the last of those that keys and values are of."""
    new = layout.length
    earlier = keys.shape[1] - new
    mask: BlockMask
    if new == 1:
        # Every key is seen, and the query heads of a key head are as many queries of it: it is read once for them.
        mask, q = FULL, q[:, 0].unflatten(1, (keys.shape[2], -1)).transpose(1, 2)
    elif earlier == 0 and (window is None or window >= new):
        mask = CAUSAL
    else:
        mask = layout.cached(("memory", earlier, window, q.device), lambda: _mask(earlier, new, window, q.device))
    with torch.autocast(q.device.type, enabled=False):
        out, _ = attention.forward(q, keys, values, mask, scale)
    return out.transpose(1, 2).flatten(1, 2)[:, None] if new == 1 else out


def _mask(earlier: int, new: int, window: int | None, device: torch.device) -> Positions:
    """New tokens behind `earlier` ones; the same for every layer that remembers as many."""
    places = torch.arange(earlier + new, device=device)
    return Positions(places[earlier:], places, window=window)
