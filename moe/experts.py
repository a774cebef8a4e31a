"""Dropless expert computation, on one rank or expert-parallel.

Tokens are permuted into the order of their experts, dispatched to the ranks that own these (one all-to-all), computed
by grouped GEMM, returned (a second all-to-all), and combined with their routing weights. Ranks may hold different
numbers of tokens; the result equals that of one rank with all experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from longctx.kernels.routed.permute import combine, permute
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
    """Compute the weighted sum of each token's experts, `[B, T_local, D]`; 0 for padding.

    x is `[B, T_local, D]`, `routing` that of its tokens among `count` experts. This rank of `axis` owns `count / size`
    experts, from number `rank * count / size`: `compute(rows, ends)` returns their outputs `[N, D]` for rows `[N, D]`
    sorted by expert, where `ends [count / size]` (int32) is the row after each expert's last. Differentiable in x and
    the weights; a collective over the axis, in the backward pass as well. Raises ValueError if the experts do not
    divide over the axis.
    """
    if count % axis.size:
        raise ValueError(f"experts: {count} experts do not divide over {axis.size} ranks")
    active = routing.experts.shape[-1]
    experts = routing.experts.reshape(-1, active)
    flat = x.reshape(-1, x.shape[-1])
    key = experts.flatten() if routing.all_kept else torch.where(experts < 0, count, experts).flatten()
    ordered, order = key.sort(stable=True)
    slots = torch.empty_like(order)
    slots[order] = torch.arange(len(order), device=x.device)
    slots = slots.view_as(experts)
    ends = torch.searchsorted(ordered, torch.arange(count, device=x.device), right=True)
    if not routing.all_kept:
        # Dropped choices and padding are sorted last.
        slots = torch.where(experts < 0, -1, slots)
        order = order[: int(ends[-1])]
    rows = permute(flat, order // active, slots)
    if axis.size == 1:
        out = compute(rows, ends.to(torch.int32))
    else:
        out = _expert_parallel(rows, ends.diff(prepend=ends.new_zeros(1)), compute, axis)
    return combine(out, slots, routing.weights.reshape(-1, active)).view_as(x)


def _expert_parallel(rows: Tensor, counts: Tensor, compute: Callable[[Tensor, Tensor], Tensor], axis: Axis) -> Tensor:
    """Run `compute` on the ranks that own the experts; `rows` are sorted by expert, `counts [count]` of each."""
    send_counts = counts.view(axis.size, -1)
    receive_counts = exchange_counts(send_counts, axis)
    sends, receives = torch.stack([send_counts.sum(dim=1), receive_counts.sum(dim=1)]).tolist()
    received = exchange_rows(rows, sends, receives, axis)
    # Received rows are ordered by rank, then by expert; `compute` needs them by expert.
    local_experts = torch.arange(receive_counts.shape[1], device=rows.device).repeat(axis.size)
    order = local_experts.repeat_interleave(receive_counts.flatten(), output_size=sum(receives)).argsort(stable=True)
    inverse = order.argsort()
    ends = receive_counts.sum(dim=0).cumsum(dim=0).to(torch.int32)
    out = compute(permute(received, order, inverse[:, None]), ends)
    return exchange_rows(permute(out, inverse, order[:, None]), receives, sends, axis)
