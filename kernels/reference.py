"""Plain references, written from the equations, token by token or with the dense T x T matrix.

They keep the dtype that they are given, so that float64 `gradcheck` means something, and they are differentiable by
autograd. Nothing in the product calls them: they are what the fast paths are compared with.
"""

from itertools import pairwise

import torch
from torch import Tensor


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    starts: tuple[int, ...] = (),
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Every linear mixer with a matrix state, as the recurrence itself, token by token.

    `S_t = A_t S_{t-1} + k_t w_t^T`, `o_t = S_t^T q_t`. With `D_t = diag(exp(log_decay_t))`, 1 where it is absent:
    additive (beta absent): `A_t = D_t`, `w_t = v_t`: linear attention, lightning, retention, Mamba-2, GLA;
    delta rule: `A_t = (I - beta_t k_t k_t^T) D_t`, `w_t = beta_t v_t`: what the decayed state answers to k_t is moved
    towards v_t by the share beta_t (DeltaNet, Yang et al. 2024, eq. 5; Gated DeltaNet, 2025, eq. 10; Kimi Linear,
    2025, eq. 1). Where a document starts, S is zero before the token is read.

    Shapes: q `[B, T, Hq, K]`, k `[B, T, Hk, K]`, v `[B, T, Hv, V]`, log_decay `[H]`, `[B, T, H]` or `[B, T, H, K]`,
    beta `[B, T, H]`, initial_state `[B, H, K, V]`. Heads may be fewer where they divide the
    states' H, those of q also a multiple.
    Returns o `[B, T, max(Hq, H), V]` and the state after the last token `[B, H, K, V]`.
    """
    batch, length, _, key_dim = q.shape
    gates = [x for x in (log_decay, beta) if x is not None]
    heads = max([k.shape[2], v.shape[2], *(x.shape[0] if x.dim() == 1 else x.shape[2] for x in gates)])
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    q = q.repeat_interleave(max(1, heads // q.shape[2]), dim=2)
    decay = q.new_ones(batch, length, heads, 1)
    if log_decay is not None:
        along = log_decay.expand(batch, length, -1) if log_decay.dim() == 1 else log_decay
        along = along[..., None] if along.dim() == 3 else along
        decay = along.to(q.dtype).exp().repeat_interleave(heads // along.shape[2], dim=2)
    share = None if beta is None else beta.to(q.dtype).repeat_interleave(heads // beta.shape[2], dim=2)
    state = q.new_zeros(batch, heads, key_dim, v.shape[-1]) if initial_state is None else initial_state
    out = []
    for t in range(length):
        state = torch.zeros_like(state) if t in starts else state * decay[:, t, :, :, None]
        write = v[:, t]
        if share is not None:
            write = share[:, t, :, None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + k[:, t, :, :, None] * write[:, :, None, :]
        read = state.repeat_interleave(q.shape[2] // heads, dim=1)
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], read))
    return torch.stack(out, dim=1) if out else q.new_zeros(batch, 0, q.shape[2], v.shape[-1]), state


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    starts: tuple[int, ...] = (),
    before: Tensor | None = None,
) -> Tensor:
    """`y_t = activation(bias + sum_{i < W} weight[:, i] x_{t - (W - 1) + i})`, token by token (causal_conv1d's order).

    A token sees those before it from the start of its document on; the first document goes on from `before`.
    Shapes: x `[B, T, D]`, weight `[D, W]`, bias `[D]`, before `[B, W - 1, D]`, zeros by default; activation None or
    "silu". Returns `[B, T, D]`.
    """
    taps, out = weight.shape[1], []
    line = x if before is None else torch.cat([before, x], dim=1)
    first = x.shape[1] - line.shape[1]
    for t in range(x.shape[1]):
        begin = max((start for start in starts if start <= t), default=first)
        y = torch.zeros_like(x[:, t]) if bias is None else bias.expand_as(x[:, t])
        for seen in range(max(begin, t - taps + 1), t + 1):
            y = y + weight[:, taps - 1 - (t - seen)] * line[:, seen - first]
        out.append(y / (1 + torch.exp(-y)) if activation == "silu" else y)
    return torch.stack(out, dim=1) if out else torch.zeros_like(x)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`softmax(scale q k^T + mask) v` with the whole score matrix, and the log-sum-exp of its rows.

    Shapes: q `[B, Tq, H, K]`, k and v `[B, Tk, H_kv, ...]` with H a multiple of H_kv (query head h reads key head
    `h // (H / H_kv)`), mask `[Tq, Tk]` bool, True where a query sees a key.
    Returns out `[B, Tq, H, V]` and lse `[B, H, Tq]`; a row that sees nothing is 0 with lse -inf.
    """
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse.isinf(), 0.0)[..., None])
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse


def causal_document_mask(cu_seqlens: tuple[int, ...]) -> Tensor:
    """`[T, T]` bool: position i sees j where both lie in one document and `j <= i`. T is the last of `cu_seqlens`."""
    length = cu_seqlens[-1]
    mask = torch.zeros(length, length, dtype=torch.bool)
    for begin, end in pairwise(cu_seqlens):
        mask[begin:end, begin:end] = True
    return mask.tril()


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Negative log likelihood in nats of each token, `[T]`, 0 where the label is -100.

    Shapes: x `[T, D]`, weight `[N, D]`, labels `[T]` int64.
    """
    logp = torch.log_softmax(x @ weight.T, dim=-1)
    picked = logp.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels >= 0, -picked, torch.zeros_like(picked))


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last dimension."""
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * scale


def swiglu(gate_up: Tensor) -> Tensor:
    """`gate * sigmoid(gate) * up`, gate and up the halves of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up
