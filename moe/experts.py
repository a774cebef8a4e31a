"""What experts say of the tokens that chose them: dropless, on one rank or with the experts divided over many.

Tokens are sorted by expert, go to the rank that has it (one all-to-all), are computed there expert by expert, come back
(a second one), and are summed with their weights. Every rank of the axis may hold other tokens, as many as it likes:
the result is that of one rank with all experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from longctx.kernels.routed.permute import combine, spread
from longctx.moe.expert_router import ExpertRouting
from longctx.parallel.all_to_all_rows import exchange_counts, exchange_rows
from longctx.parallel.mesh import Axis


def mixture_of_experts(
    x: Tensor,
    routing: ExpertRouting,
    count: int,
    compute: Callable[[Tensor, Tensor], Tensor],
    axis: Axis,
) -> Tensor:
    """The weighted sum of the chosen experts' outputs, `[B, T_local, D]`; 0 for padding.

    x `[B, T_local, D]`, and the routing of its tokens among `count` experts, of which this rank of `axis` has number
    `rank * count / size` and those after it: `compute(rows, ends)` gives their outputs `[N, D]` for rows `[N, D]` that
    are sorted by expert, `ends [count / size]` int32 being the row after each one's last. Differentiable in x and the
    weights, every rank of the axis taking part. Raises ValueError where the experts do not divide.
    """
    if count % axis.size:
        raise ValueError(f"experts: {count} experts do not divide over {axis.size} ranks")
    active = routing.experts.shape[-1]
    experts = routing.experts.reshape(-1, active)
    flat = x.reshape(-1, x.shape[-1])
    key = experts.flatten() if routing.all_kept else torch.where(experts < 0, count, experts).flatten()
    ordered, order = key.sort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=x.device)
    places = places.view_as(experts)
    ends = torch.searchsorted(ordered, torch.arange(count, device=x.device), right=True)
    if not routing.all_kept:
        # Those that go nowhere stand last.
        places = torch.where(experts < 0, -1, places)
        order = order[: int(ends[-1])]
    rows = spread(flat, order // active, places)
    if axis.size == 1:
        out = compute(rows, ends.to(torch.int32))
    else:
        out = _divided(rows, ends.diff(prepend=ends.new_zeros(1)), compute, axis)
    return combine(out, places, routing.weights.reshape(-1, active)).view_as(x)


def _divided(rows: Tensor, counts: Tensor, compute: Callable[[Tensor, Tensor], Tensor], axis: Axis) -> Tensor:
    """`compute` where the experts are: rows sorted by expert, counts `[count]` of each."""
    sent = counts.view(axis.size, -1)
    got = exchange_counts(sent, axis)
    sends, receives = torch.stack([sent.sum(dim=1), got.sum(dim=1)]).tolist()
    arrived = exchange_rows(rows, sends, receives, axis)
    # They come rank by rank, each rank's by expert.
    here = torch.arange(got.shape[1], device=rows.device).repeat(axis.size)
    order = here.repeat_interleave(got.flatten(), output_size=sum(receives)).argsort(stable=True)
    back = order.argsort()
    out = compute(spread(arrived, order, back[:, None]), got.sum(dim=0).cumsum(dim=0).to(torch.int32))
    return exchange_rows(spread(out, back, order[:, None]), receives, sends, axis)
