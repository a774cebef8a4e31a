"""Reference softmax attention: the whole score matrix at once.

Dtype-preserving and differentiable by autograd, so that a float64 `gradcheck` means something. Only tests call it, to
compare the fast paths with.
"""

import torch
from torch import Tensor


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute `softmax(scale q k^T + mask) v` and the log-sum-exp of the rows of the score matrix.

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
