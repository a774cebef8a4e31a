"""Plain references, written from the equations, token by token or with the dense T x T matrix.

They keep the dtype that they are given, so that float64 `gradcheck` means something, and they are differentiable by
autograd. Nothing in the product calls them: they are what the fast paths are compared with.
"""

from itertools import pairwise

import torch
from torch import Tensor


def lightning(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    starts: tuple[int, ...] = (),
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention with a constant decay per head, as the recurrence itself.

    `S_t = exp(log_decay_h) S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t` (Qin et al. 2024, Lightning Attention-2, eq. 3-5);
    where a document starts, S is zero before the token is read.

    Shapes: q, k `[B, T, H, K]`, v `[B, T, H, V]`, log_decay `[H]`, initial_state `[B, H, K, V]`.
    Returns o `[B, T, H, V]` and the state after the last token `[B, H, K, V]`.
    """
    batch, length, heads, key_dim = q.shape
    state = q.new_zeros(batch, heads, key_dim, v.shape[-1]) if initial_state is None else initial_state
    decay = log_decay.to(q.dtype).exp()[None, :, None, None]
    out = []
    for t in range(length):
        carried = torch.zeros_like(state) if t in starts else state * decay
        state = carried + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(out, dim=1) if out else torch.zeros_like(v), state


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
