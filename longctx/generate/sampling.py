"""How the next token is drawn from its logits."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """What of a model's distribution is drawn from, and with which chance.

    Logits are divided by `temperature`; of the tokens, the `top_k` most probable are left; of these, as few of the most
    probable as have the share `top_p` of the probability together (Holtzman et al. 2020). Equally probable tokens are
    in the order of their numbers. At temperature 0 the most probable token is taken.

    Raises UserError where a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    """The same seed, logits and options give the same tokens."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature: {self.temperature} is no temperature; give 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k: of {self.top_k} tokens none can be drawn; give 1 or more, or leave it out")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is no share of the probability; give more than 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed: {self.seed} is out of range; give an integer from 0 on, below 2^63")

    def draw(self, logits: Tensor, chance: float) -> int:
        """The token for `logits [N]` and a number of chance, uniform in [0, 1).

        In float64, whatever the logits are. Raises UserError where a logit is not a number.
        """
        if bool(logits.isnan().any()):
            raise UserError("the model's logits are not numbers (NaN): its weights are damaged, or it did not converge")
        if self.temperature == 0:
            return int(logits.argmax())
        wide = logits.double()
        # The largest first: divided by a tiny temperature, the others become -inf and not NaN.
        probability = ((wide - wide.max()) / self.temperature).softmax(dim=-1)
        kept, order = probability.sort(descending=True, stable=True)
        kept = kept[: self.top_k]
        if self.top_p < 1:
            # A token stays where those before it do not have the share yet; the first always does.
            kept = kept[kept.cumsum(dim=0) - kept < self.top_p * kept.sum()]
        cumulated = kept.cumsum(dim=0)
        place = int(torch.searchsorted(cumulated, chance * cumulated[-1], right=True))
        return int(order[min(place, len(kept) - 1)])
