"""The routers of a mixture of heads (MoH, Jin et al. 2024): which heads a token reads, and what each counts.

Of H query heads the first `shared` are read by all tokens, and of the other E = H - shared each token reads `active`.
Two routers, both of one token at a time:

`learned` (equations 5 to 8), from logits that the layer projects from its input x:

    p = softmax(W_r x) over E;  chosen: the top `active`;  routed weight: p / sum of the chosen p * active
    shared weight: softmax(W_s x) * shared;  both kinds times 2 softmax(W_h x), one for each kind

Uniform logits give every head that is read the weight 1. `by_norm` (section 3.3), which has no parameters, for dense
layers that are trained on: p is the softmax of the norms of the token's queries, divided by their standard deviation;
every head that is read counts 1, and the gradient goes straight through to p.

The loss that balances the load (equation 9, times E): `E sum_e f_e P_e`, f_e the share of tokens that head e is read
by, P_e the mean of p_e, over all tokens of the sequence, on whichever rank they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longctx.kernels.dtypes import accumulation_dtype
from longctx.moe.report import RouterReport, entropy, load_loss, marks, real_rows, top
from longctx.parallel.layout import Layout

BALANCE = 0.01
"""The coefficient of the loss in the published models."""


class HeadRouting(NamedTuple):
    """What tokens read; rows of padding read nothing. A tuple, as a report is, so that wrappers of modules find its
    tensors."""

    chosen: Tensor
    """`[B, T_local, E]` bool: the routed heads that a token reads."""
    weights: Tensor
    """`[B, T_local, H]` in the accumulation dtype: what a head's output is multiplied with, 0 where it is not read."""
    report: RouterReport


def _mask(p: Tensor, active: int) -> Tensor:
    """The `active` largest of each row: bool, of the shape of p."""
    return torch.zeros_like(p, dtype=torch.bool).scatter_(-1, top(p.detach(), active), True)


def _routing(p: Tensor, chosen: Tensor, weights: Tensor, layout: Layout, balance: float, finite: Tensor) -> HeadRouting:
    real = real_rows(layout, p.device)
    chosen = chosen & real[:, None]
    counts = chosen.sum(dim=(0, 1))
    report = RouterReport(
        loss=balance * load_loss(p, counts, layout),
        counts=counts,
        tokens=real.sum() * p.shape[0],
        entropy=torch.where(real, entropy(p.detach()), 0).sum(),
        dropped=counts.new_zeros(()),
        finite=finite,
        choice=(chosen * marks(p.shape[-1], p.device)).sum(dim=-1),
    )
    return HeadRouting(chosen, torch.where(real[:, None], weights, 0), report)


def _check(logits: Tensor, active: int, layout: Layout) -> None:
    if logits.dim() != 3 or logits.shape[1] != layout.local_length:
        raise ValueError(
            f"head router: {tuple(logits.shape)} for a layout that gives this rank {layout.local_length} tokens: "
            "expected [B, T_local, routed heads]"
        )
    if not 1 <= active <= logits.shape[2]:
        raise ValueError(f"head router: {active} active of {logits.shape[2]} routed heads: expected 1 to all of them")


def learned(
    routed: Tensor, shared: Tensor, kinds: Tensor, active: int, layout: Layout, balance: float = BALANCE
) -> HeadRouting:
    """The published router, from logits: routed `[B, T_local, E]`, shared `[B, T_local, shared]` (perhaps 0 wide) and
    kinds `[B, T_local, 2]` (shared, routed), of which the last is not read where no head is shared.

    `balance` is the coefficient of the loss. Computed in the accumulation dtype. Differentiable in all three. Raises
    ValueError where shapes do not fit.
    """
    _check(routed, active, layout)
    dtype = accumulation_dtype(routed.dtype)
    p = routed.to(dtype).softmax(dim=-1)
    chosen = _mask(p, active)
    read = p * chosen
    weights = active * read / read.sum(dim=-1, keepdim=True)
    finite = routed.detach().isfinite().all()
    if shared.shape[-1]:
        finite = finite & shared.detach().isfinite().all() & kinds.detach().isfinite().all()
        by_kind = 2 * kinds.to(dtype).softmax(dim=-1)
        of_shared = shared.shape[-1] * shared.to(dtype).softmax(dim=-1)
        weights = torch.cat([of_shared * by_kind[..., :1], weights * by_kind[..., 1:]], dim=-1)
    return _routing(p, chosen, weights, layout, balance, finite)


def by_norm(norms: Tensor, shared: int, active: int, layout: Layout, balance: float = BALANCE) -> HeadRouting:
    """The router without parameters, from the norms `[B, T_local, E]` of the queries of the routed heads, before rotary
    positions; `shared` heads more are read by all tokens.

    `balance` is the coefficient of the loss. Computed in the accumulation dtype. Differentiable in the norms, straight
    through the choice. Raises ValueError where shapes do not fit.
    """
    norms = norms.to(accumulation_dtype(norms.dtype))
    _check(norms, active, layout)
    spread = norms.std(dim=-1, keepdim=True) if norms.shape[-1] > 1 else torch.ones_like(norms)
    p = (norms / spread.clamp_min(torch.finfo(norms.dtype).eps)).softmax(dim=-1)
    chosen = _mask(p, active)
    # Forward 1 for what is read; backward the gradient of p.
    straight = chosen + p - p.detach()
    weights = torch.cat([p.new_ones(*p.shape[:2], shared), straight * chosen], dim=-1)
    return _routing(p, chosen, weights, layout, balance, norms.detach().isfinite().all())
