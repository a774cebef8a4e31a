"""Sampling of the next token: temperature, top-k, top-p."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Logits are divided by `temperature`; the `top_k` most probable tokens are kept, then the smallest set of the most
    probable ones whose share of the remaining probability reaches `top_p` (nucleus sampling, Holtzman et al. 2020).
    Ties are broken by token id. Temperature 0 is greedy decoding.

    Raises UserError if a value is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    """The same seed, logits and parameters give the same tokens."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature: {self.temperature} is out of range; give 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k: {self.top_k} is out of range; give 1 or more, or omit it")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is out of range; give more than 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed: {self.seed} is out of range; give an integer from 0 to 2^63 - 1")

    def draw(self, logits: Tensor, uniform: float) -> int:
        """Sample a token from `logits [N]` by inverse transform of a random number `uniform` in [0, 1).

        Computed in float64, whatever the dtype of the logits. Raises UserError if a logit is NaN.
        """
        if bool(logits.isnan().any()):
            raise UserError("the model's logits are NaN: its weights are damaged, or training diverged")
        if self.temperature == 0:
            return int(logits.argmax())
        wide = logits.double()
        # Shifted by the maximum: with a tiny temperature the others become -inf, not NaN.
        probability = ((wide - wide.max()) / self.temperature).softmax(dim=-1)
        kept, order = probability.sort(descending=True, stable=True)
        kept = kept[: self.top_k]
        if self.top_p < 1:
            # A token stays if those before it have not reached the share; the first always stays.
            kept = kept[kept.cumsum(dim=0) - kept < self.top_p * kept.sum()]
        cumulative = kept.cumsum(dim=0)
        rank = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
        return int(order[min(rank, len(kept) - 1)])
