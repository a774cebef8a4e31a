"""Attention experts (Zhang et al. 2024, BAM): every token takes all of them, each by its weight.

    sum_j softmax(W_r x)_j MHA_j(x)

Since MHA_j(x) is W_o,j times what the expert's heads give, the weight may be multiplied to these, and the output
matrices of all experts, side by side, take them together: N experts of H heads are one softmax attention of N x H heads
and one output projection. Attention that groups its heads wants query heads together that read one key/value head,
which decides the order of heads (`side_by_side`).
"""

from typing import Literal

import torch
from torch import Tensor

from longctx.kernels.dtypes import accumulation_dtype
from longctx.moe.report import RouterReport, entropy, marks, real_rows, top
from longctx.parallel.layout import Layout

KeysValues = Literal["each", "shared"]
"""Whether each expert has keys and values of its own, or all read the same ones."""


def side_by_side(x: Tensor, dim: int, kv: KeysValues) -> Tensor:
    """`[..., N, G, S, ...]` to `[..., N G S, ...]`: query heads of experts in the order that one attention takes.

    N experts, at `dim`, each with G key/value heads that S query heads read. With `each` the heads of an expert lie
    together, as they are in it; with `shared` those that read one key/value head, an expert's S after the other's.
    """
    if kv == "shared":
        x = x.transpose(dim, dim + 1)
    return x.flatten(dim, dim + 2)


def soft_routing(logits: Tensor, layout: Layout) -> tuple[Tensor, RouterReport]:
    """The experts' weights for each token, `softmax(logits)` in the accumulation dtype, of the shape of the logits
    `[B, T_local, N]`.

    Differentiable. What the report says of them: no loss, since nobody can be left out; shares for counts. Raises
    ValueError where the shape does not fit the layout.
    """
    if logits.dim() != 3 or logits.shape[1] != layout.local_length:
        raise ValueError(
            f"soft routing: {tuple(logits.shape)} for a layout that gives this rank {layout.local_length} tokens: "
            "expected [B, T_local, experts]"
        )
    weights = logits.to(accumulation_dtype(logits.dtype)).softmax(dim=-1)
    p, real = weights.detach(), real_rows(layout, logits.device)
    report = RouterReport(
        loss=p.new_zeros(()),
        counts=torch.where(real[:, None], p, 0).sum(dim=(0, 1), dtype=torch.float64),
        tokens=real.sum() * len(p),
        entropy=torch.where(real, entropy(p), 0).sum(),
        dropped=torch.zeros((), dtype=torch.int64, device=p.device),
        finite=logits.detach().isfinite().all(),
        choice=torch.where(real, marks(p.shape[-1], p.device)[top(p, 1)[..., 0]], 0),
    )
    return weights, report
