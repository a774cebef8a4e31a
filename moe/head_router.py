"""Head routers for a mixture of heads (MoH; Jin et al. 2024): the active heads of each token and their weights.

The first `shared` of H query heads are active for all tokens; of the other E = H - shared, `active` per token.
There are two routers, both of which route each token independently:

`learned` (equations 5 to 8), from logits that the layer projects from its input x:

    p = softmax(W_r x) over E;  chosen: the top `active`;  routed weight: p / sum of the chosen p * active
    shared weight: softmax(W_s x) * shared;  both kinds times 2 softmax(W_h x), one per kind

With uniform logits every active head has weight 1. `by_norm` (section 3.3) has no parameters and is for continued
training of dense layers: p is the softmax of the norms of the token's queries, divided by their standard deviation;
every active head has weight 1, with a straight-through gradient to p.

Load-balancing loss (equation 9, times E): `E sum_e f_e P_e`, f_e the fraction of tokens routed to head e, P_e the mean
of p_e, over all tokens of the sequence, on all ranks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longctx.kernels.dtypes import accumulation_dtype
from longctx.moe.report import RouterReport, entropy, load_balancing_loss, set_keys, stable_topk, token_mask
from longctx.parallel.layout import Layout

BALANCE = 0.01
"""Coefficient of the load-balancing loss in the published models."""


class HeadRouting(NamedTuple):
    """Active heads of each token and their weights; padding has none.

    A tuple, as `RouterReport` is, so that module wrappers (FSDP) find its tensors.
    """

    chosen: Tensor
    """`[B, T_local, E]` bool: the active routed heads of each token."""
    weights: Tensor
    """`[B, T_local, H]`, in the accumulation dtype: factors of the heads' outputs, 0 for inactive heads."""
    report: RouterReport


def _topk_mask(p: Tensor, active: int) -> Tensor:
    """Mark the `active` largest of each row: bool, of the shape of p."""
    return torch.zeros_like(p, dtype=torch.bool).scatter_(-1, stable_topk(p.detach(), active), True)


def _routing(p: Tensor, chosen: Tensor, weights: Tensor, layout: Layout, balance: float, finite: Tensor) -> HeadRouting:
    mask = token_mask(layout, p.device)
    chosen = chosen & mask[:, None]
    counts = chosen.sum(dim=(0, 1))
    report = RouterReport(
        loss=balance * load_balancing_loss(p, counts, layout),
        counts=counts,
        tokens=mask.sum() * p.shape[0],
        entropy=torch.where(mask, entropy(p.detach()), 0).sum(),
        dropped=counts.new_zeros(()),
        finite=finite,
        choice=(chosen * set_keys(p.shape[-1], p.device)).sum(dim=-1),
    )
    return HeadRouting(chosen, torch.where(mask[:, None], weights, 0), report)


def _check(logits: Tensor, active: int, layout: Layout) -> None:
    if logits.dim() != 3 or logits.shape[1] != layout.local_length:
        raise ValueError(
            f"head router: logits are {tuple(logits.shape)}, and the layout has {layout.local_length} tokens on this "
            "rank: expected [B, T_local, routed heads]"
        )
    count = logits.shape[2]
    if not 1 <= active <= count:
        raise ValueError(f"head router: {active} active of {count} routed heads: expected 1 to {count}")


def learned(
    routed: Tensor, shared: Tensor, kinds: Tensor, active: int, layout: Layout, balance: float = BALANCE
) -> HeadRouting:
    """Route tokens to heads with the published, learned router.

    Logits: routed `[B, T_local, E]`, shared `[B, T_local, shared]` and kinds `[B, T_local, 2]` (shared, routed);
    without shared heads, `shared` has width 0 and `kinds` is ignored. `balance` is the coefficient of the
    load-balancing loss. Computed in the accumulation dtype; differentiable in all three. Raises ValueError if shapes do
    not match.
    """
    _check(routed, active, layout)
    dtype = accumulation_dtype(routed.dtype)
    p = routed.to(dtype).softmax(dim=-1)
    chosen = _topk_mask(p, active)
    active_p = p * chosen
    weights = active * active_p / active_p.sum(dim=-1, keepdim=True)
    finite = routed.detach().isfinite().all()
    if shared.shape[-1]:
        finite = finite & shared.detach().isfinite().all() & kinds.detach().isfinite().all()
        by_kind = 2 * kinds.to(dtype).softmax(dim=-1)
        of_shared = shared.shape[-1] * shared.to(dtype).softmax(dim=-1)
        weights = torch.cat([of_shared * by_kind[..., :1], weights * by_kind[..., 1:]], dim=-1)
    return _routing(p, chosen, weights, layout, balance, finite)


def by_norm(norms: Tensor, shared: int, active: int, layout: Layout, balance: float = BALANCE) -> HeadRouting:
    """Route tokens to the heads whose queries have the largest norms, without parameters.

    norms `[B, T_local, E]` are those of the routed heads' queries before rotary embedding; `shared` further heads are
    active for all tokens. `balance` is the coefficient of the load-balancing loss. Computed in the accumulation dtype;
    differentiable in the norms, straight through the choice. Raises ValueError if shapes do not match.
    """
    norms = norms.to(accumulation_dtype(norms.dtype))
    _check(norms, active, layout)
    std = norms.std(dim=-1, keepdim=True) if norms.shape[-1] > 1 else torch.ones_like(norms)
    p = (norms / std.clamp_min(torch.finfo(norms.dtype).eps)).softmax(dim=-1)
    chosen = _topk_mask(p, active)
    # Straight-through estimator: 1 in the forward pass, the gradient of p in the backward pass.
    straight_through = chosen + p - p.detach()
    weights = torch.cat([p.new_ones(*p.shape[:2], shared), straight_through * chosen], dim=-1)
    return _routing(p, chosen, weights, layout, balance, norms.detach().isfinite().all())
