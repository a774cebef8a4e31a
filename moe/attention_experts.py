"""Attention experts (mixture of attention, BAM; Zhang et al. 2024): soft routing, so every token uses all experts.

    sum_j softmax(W_r x)_j MHA_j(x)

MHA_j(x) is W_o,j times the outputs of the expert's heads, so the routing weight can be applied to the heads instead:
N experts of H heads are one softmax attention of N x H heads and one output projection whose columns are the experts'
output matrices. Grouped-query attention needs the query heads of one key/value head to be adjacent, which determines
the order of heads (`flatten_expert_heads`).
"""

from typing import Literal

import torch
from torch import Tensor

from longctx.kernels.dtypes import accumulation_dtype
from longctx.moe.report import RouterReport, entropy, set_keys, stable_topk, token_mask
from longctx.parallel.layout import Layout

KeysValues = Literal["each", "shared"]
"""Whether each expert has its own keys and values, or all experts share one set."""


def flatten_expert_heads(x: Tensor, dim: int, kv: KeysValues) -> Tensor:
    """Flatten the query heads of all experts into one head dimension: `[..., N, G, S, ...]` to `[..., N G S, ...]`.

    N experts, at `dim`, each with G key/value heads that serve S query heads each. With `each`, an expert's heads stay
    adjacent, in their order; with `shared`, the query heads of one key/value head are adjacent, expert by expert.
    """
    if kv == "shared":
        x = x.transpose(dim, dim + 1)
    return x.flatten(dim, dim + 2)


def soft_routing(logits: Tensor, layout: Layout) -> tuple[Tensor, RouterReport]:
    """Return the experts' weights for each token, `softmax(logits)`, and the router's report.

    Shapes: logits and weights `[B, T_local, N]`, weights in the accumulation dtype; differentiable. The report has no
    loss, since every expert receives every token, and its counts are sums of weights. Raises ValueError if the shape
    does not match the layout.
    """
    if logits.dim() != 3 or logits.shape[1] != layout.local_length:
        raise ValueError(
            f"soft routing: logits are {tuple(logits.shape)}, and the layout has {layout.local_length} tokens on this "
            "rank: expected [B, T_local, experts]"
        )
    weights = logits.to(accumulation_dtype(logits.dtype)).softmax(dim=-1)
    p, mask = weights.detach(), token_mask(layout, logits.device)
    report = RouterReport(
        loss=p.new_zeros(()),
        counts=torch.where(mask[:, None], p, 0).sum(dim=(0, 1), dtype=torch.float64),
        tokens=mask.sum() * len(p),
        entropy=torch.where(mask, entropy(p), 0).sum(),
        dropped=torch.zeros((), dtype=torch.int64, device=p.device),
        finite=logits.detach().isfinite().all(),
        choice=torch.where(mask, set_keys(p.shape[-1], p.device)[stable_topk(p, 1)[..., 0]], 0),
    )
    return weights, report
