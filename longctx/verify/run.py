"""`longctx verify`: does this recipe's model compute the same on N ranks as on one?

Every layout that fits runs one step, forward and backward, in float64 and in the recipe's precision, and is compared
with one rank. In float64 the relative difference `|x - ref| / |ref|` (norms) of the loss, the logits and every
parameter's gradient has to be within 1e-10. In the recipe's precision the truth is the float64 result of one rank, and
a layout may be as far from it as one rank is, times `SLACK`, and at least 1e-5: rounding differs from layout to layout,
and nothing else may. One rank's own distance is a row of the table; of the loss, which is one number, the larger of
its two rows counts.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.model.config import ModelConfig
from longctx.parallel.local_ranks import LocalRanks
from longctx.recipe import Recipe
from longctx.verify.cases import Case, cases, reference
from longctx.verify.measure import Measured, Precision, Subject, measure, whole_logits

BOUND_FP64 = 1e-10
BOUND = 1e-5
SLACK = 3.0
SHRUNK_LENGTH = 256
SHRUNK_VOCABULARY = 128
SHRUNK_TILE = 48
"""Does not divide the length, so that tiles end raggedly."""
ONE_RANK_BOUNDS: dict[Precision, float] = {"fp32": 1e-3, "bf16": 0.5}
"""How far one rank's loss and logits may be from its float64 result: no statement about precision, a sign that
something broke."""
ONE_RANK_GRADIENTS = 100.0
"""The same for one parameter's gradient, as a multiple of the bound above. A norm of each head by itself (retention,
GLA, the delta rule) divides by an output that is nearly zero at the first tokens of a document, and makes as much of
its rounding: in bf16 a gradient may be 14 times its own size off, with every layout agreeing."""


@dataclass(frozen=True)
class Values:
    """What a step computed, whole."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """Everything that is compared, by name."""
        return {"loss": self.loss, "logits": self.logits, **self.gradients}


@dataclass(frozen=True)
class Row:
    """A case in a precision: the relative difference and the bound of everything that is compared, by name."""

    case: Case
    precision: Precision
    differences: dict[str, float]
    bounds: dict[str, float]

    @property
    def failures(self) -> list[str]:
        """The names that are out of bounds; what is not finite is."""
        return [n for n, value in self.differences.items() if not (math.isfinite(value) and value <= self.bounds[n])]

    @property
    def worst_gradient(self) -> str:
        """The parameter whose gradient is nearest to, or furthest beyond, its bound."""
        names = [name for name in self.differences if name not in ("loss", "logits")]
        return max(names, key=lambda name: _nan_is_worst(self.differences[name] / self.bounds[name]))


def _nan_is_worst(value: float) -> float:
    return math.inf if math.isnan(value) else value


def relative(x: Tensor, ref: Tensor) -> float:
    """`|x - ref| / |ref|`; where the reference is 0, `|x|`."""
    norm = ref.norm()
    return float((x - ref).norm() / (norm if norm > 0 else 1.0))


def shrink(subject: Subject) -> Subject:
    """The same kind of model, narrow, one pattern deep, on a short sequence, in small tiles: seconds, not minutes."""
    model: ModelConfig = subject.model.shrunk()
    tiles = {"loss_tile": SHRUNK_TILE, "ffn_tile": "none" if subject.train.ffn_tile == "none" else SHRUNK_TILE}
    length, vocabulary = min(subject.length, SHRUNK_LENGTH), min(subject.vocab_size, SHRUNK_VOCABULARY)
    return Subject(model, subject.train.model_copy(update=tiles), vocabulary, length, subject.seed)


def subject_of(recipe: Recipe, vocab_size: int) -> Subject:
    """What a recipe trains, for a vocabulary of that size."""
    return Subject(recipe.model, recipe.train, vocab_size, recipe.data.sequence_length, recipe.seed)


def verify(
    subject: Subject,
    ranks: LocalRanks,
    *,
    measure: Callable[[Subject, Case, Precision], Measured] = measure,
) -> Iterator[Row]:
    """Run every case and compare; a row as each is done, float64 first.

    `measure` is what runs on each rank.
    """

    def values(case: Case, precision: Precision) -> Values:
        parts = ranks.run(measure, subject, case, precision, size=case.ranks)
        gradients = next(part.gradients for part in parts if part.gradients)
        loss = torch.tensor(parts[0].loss, dtype=torch.float64)
        return Values(loss, whole_logits(parts, subject, case), gradients)

    todo = list(cases(ranks.size, subject.model))
    truth = {packed: values(reference(packed), "fp64").named() for packed in (False, True)}
    for case in todo:
        got = values(case, "fp64").named()
        differences = {name: relative(got[name], ref) for name, ref in truth[case.packed].items()}
        yield Row(case, "fp64", differences, dict.fromkeys(differences, BOUND_FP64))
    precision: Precision = subject.train.precision
    own = {}
    for packed in (False, True):
        got = values(reference(packed), precision).named()
        own[packed] = {name: relative(got[name], ref) for name, ref in truth[packed].items()}
        bound = ONE_RANK_BOUNDS[precision]
        bounds = {n: bound if n in ("loss", "logits") else bound * ONE_RANK_GRADIENTS for n in own[packed]}
        yield Row(reference(packed), precision, own[packed], bounds)
    # A loss is one number, and its rounding may cancel by chance: hardly in both of one rank's.
    loss = max(of_one["loss"] for of_one in own.values())
    for case in todo:
        got = values(case, precision).named()
        differences = {name: relative(got[name], ref) for name, ref in truth[case.packed].items()}
        spread = own[case.packed] | {"loss": loss}
        bounds = {name: max(BOUND, SLACK * spread[name]) for name in differences}
        yield Row(case, precision, differences, bounds)
