"""Verification of parallel layouts: compares one training step on N ranks with the same step on one rank.

Every layout runs one step, forward and backward, in float64 and in the recipe's precision. In float64 the relative
difference `|x - ref| / |ref|` (norms) of the loss, the logits and every parameter's gradient must be within 1e-10. In
the recipe's precision the reference is the float64 result of one rank, and the bound is `SLACK` times the difference of
one rank in that precision, at least 1e-5: layouts may differ only in rounding. The single rank's own difference is a
row of the table; for the loss, a single number, the larger of its two rows is used.
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
from longctx.verify.measure import Precision, RankResult, Subject, gather_logits, measure

BOUND_FP64 = 1e-10
BOUND = 1e-5
SLACK = 3.0
SHRUNK_LENGTH = 256
SHRUNK_VOCABULARY = 128
SHRUNK_TILE = 48
"""Does not divide the length, so that the last tile is shorter."""
ONE_RANK_BOUNDS: dict[Precision, float] = {"fp32": 1e-3, "bf16": 0.5}
"""Bounds of the difference of one rank's loss and logits from float64: beyond them something is broken, which is not a
matter of precision."""
ONE_RANK_GRADIENTS = 100.0
"""Bound for one parameter's gradient, as a multiple of the bound above. Per-head norms (retention, GLA, the delta rule)
divide by an output that is nearly zero at the first tokens of a document, which amplifies its rounding: in bf16 a
gradient may be off by 14 times its size although all layouts agree."""


@dataclass(frozen=True)
class Values:
    """Gathered results of a step."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """Return all compared tensors by name."""
        return {"loss": self.loss, "logits": self.logits, **self.gradients}


@dataclass(frozen=True)
class Row:
    """A case in one precision: the relative difference and bound of every compared tensor, by name."""

    case: Case
    precision: Precision
    differences: dict[str, float]
    bounds: dict[str, float]

    @property
    def failures(self) -> list[str]:
        """Names of the tensors out of bounds; values that are not finite are."""
        return [n for n, value in self.differences.items() if not (math.isfinite(value) and value <= self.bounds[n])]

    @property
    def worst_gradient(self) -> str:
        """Parameter whose gradient difference is largest relative to its bound."""
        names = [name for name in self.differences if name not in ("loss", "logits")]
        return max(names, key=lambda name: _nan_is_worst(self.differences[name] / self.bounds[name]))


def _nan_is_worst(value: float) -> float:
    return math.inf if math.isnan(value) else value


def relative(x: Tensor, ref: Tensor) -> float:
    """Compute `|x - ref| / |ref|`, or `|x|` if the reference is 0."""
    norm = ref.norm()
    return float((x - ref).norm() / (norm if norm > 0 else 1.0))


def shrink(subject: Subject) -> Subject:
    """Shrink to a narrow model of the same kind, one pattern deep, on a short sequence and in small tiles."""
    model: ModelConfig = subject.model.shrunk()
    tiles = {"loss_tile": SHRUNK_TILE, "ffn_tile": "none" if subject.train.ffn_tile == "none" else SHRUNK_TILE}
    length, vocabulary = min(subject.length, SHRUNK_LENGTH), min(subject.vocab_size, SHRUNK_VOCABULARY)
    return Subject(model, subject.train.model_copy(update=tiles), vocabulary, length, subject.seed)


def subject_of(recipe: Recipe, vocab_size: int) -> Subject:
    """Return a recipe's model and training options as a subject, for a vocabulary of `vocab_size`."""
    return Subject(recipe.model, recipe.train, vocab_size, recipe.data.sequence_length, recipe.seed)


def verify(
    subject: Subject,
    ranks: LocalRanks,
    *,
    measure: Callable[[Subject, Case, Precision], RankResult] = measure,
) -> Iterator[Row]:
    """Run and compare every case, yielding a row per case, float64 first.

    `measure` runs on each rank.
    """

    def values(case: Case, precision: Precision) -> Values:
        results = ranks.run(measure, subject, case, precision, size=case.ranks)
        gradients = next(result.gradients for result in results if result.gradients)
        loss = torch.tensor(results[0].loss, dtype=torch.float64)
        return Values(loss, gather_logits(results, subject, case), gradients)

    all_cases = list(cases(ranks.size, subject.model))
    exact = {packed: values(reference(packed), "fp64").named() for packed in (False, True)}
    for case in all_cases:
        got = values(case, "fp64").named()
        differences = {name: relative(got[name], ref) for name, ref in exact[case.packed].items()}
        yield Row(case, "fp64", differences, dict.fromkeys(differences, BOUND_FP64))
    precision: Precision = subject.train.precision
    one_rank = {}
    for packed in (False, True):
        got = values(reference(packed), precision).named()
        one_rank[packed] = {name: relative(got[name], ref) for name, ref in exact[packed].items()}
        bound = ONE_RANK_BOUNDS[precision]
        bounds = {n: bound if n in ("loss", "logits") else bound * ONE_RANK_GRADIENTS for n in one_rank[packed]}
        yield Row(reference(packed), precision, one_rank[packed], bounds)
    # The rounding of the loss, a single number, may cancel by chance, but hardly in both cases of one rank.
    loss = max(differences["loss"] for differences in one_rank.values())
    for case in all_cases:
        got = values(case, precision).named()
        differences = {name: relative(got[name], ref) for name, ref in exact[case.packed].items()}
        rounding = one_rank[case.packed] | {"loss": loss}
        bounds = {name: max(BOUND, SLACK * rounding[name]) for name in differences}
        yield Row(case, precision, differences, bounds)
