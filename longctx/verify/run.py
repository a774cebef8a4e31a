"""Verification of parallel layouts: compares one training step on N ranks with the same step on one rank.

One rank itself is first compared with the equations of the model (`longctx.verify.equations`), in float64: a fault that
is the same on every rank shows only there.

Every layout runs one step: forward, backward, clipping, the optimizer, in float64 and in the recipe's precision. In
float64 the relative difference `|x - ref| / |ref|` (norms) of the loss, the logits, every parameter's gradient, the
gradient norm, and every parameter and first moment after the step must be within 1e-10, on every replica.

In the recipe's precision the reference is the float64 result of one rank: layouts may differ only in rounding. How much
rounding that is, one rank shows in `DRAWS` draws of weights and tokens in both packings. The bound is what a difference
by rounding exceeds once in a million times, by the distribution of its ratio to those (`BEYOND_CHANCE`), and at least
1e-5. `longctx.verify.bits` compares the recipe's precision without a bound.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longctx.model.config import ModelConfig
from longctx.parallel.local_ranks import LocalRanks
from longctx.recipe import Recipe
from longctx.verify.cases import Case, cases, own_cases, reference
from longctx.verify.equations.decoder import check_covered
from longctx.verify.equations.step import Equations, evaluate
from longctx.verify.measure import Precision, RankResult, Subject, gather_logits, measure

BOUND_FP64 = 1e-10
"""Bound in float64, of layouts from one rank and of one rank from the equations. Both differ in the order of sums only:
with 26 layers, two of each mixer, one rank's gradients are within 2e-12 of the equations'."""
NEGLIGIBLE = 1e-5
"""Norm, as a fraction of that of all gradients, below which a gradient is compared as if it had this norm. The exact
gradient may be 0, and what is computed rounding: that of a router that chooses one expert, whose normalised weight is
1, without auxiliary losses."""
EQUATIONS_LENGTH = 512
"""The most tokens of a sequence on which the equations are evaluated: they take a Python step per token, and matrices
over pairs of tokens."""
BOUND = 1e-5
DRAWS = 3
BEYOND_CHANCE = {1: 20.05, 4: 4.12}
"""Bound by degrees of freedom, as a multiple of the root mean square of one rank's 2 DRAWS differences. A norm of n
independent normal errors divided by that of six such norms exceeds it once in a million times: for n = 1 Student's t
with 6 degrees of freedom, for n = 4 the root of Fisher's F with 4 and 24. Errors of a tensor have common causes: one
with 64 numbers and more counts as four, a smaller one as one."""
SHRUNK_LENGTH = 256
SHRUNK_VOCABULARY = 128
SHRUNK_TILE = 48
"""Does not divide the length, so that the last tile is shorter."""
SEEDS_APART = 1000
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
    replicas: list[dict[str, Tensor]]
    """Of each replica: gradients, and what the step leaves."""

    @property
    def named(self) -> dict[str, Tensor]:
        """All compared tensors by name, those of the first replica."""
        return {"loss": self.loss, "logits": self.logits, **self.replicas[0]}

    def differences(self, reference: dict[str, Tensor]) -> dict[str, float]:
        """Return the relative difference of every tensor, the largest over replicas."""
        of_all = {"loss": self.loss, "logits": self.logits}
        return largest([differences(of_all | replica, reference) for replica in self.replicas])


@dataclass(frozen=True)
class Row:
    """A case in one precision: the relative difference and bound of every compared tensor, by name.

    `case` is what was compared with one rank, for its text.
    """

    case: object
    precision: str
    differences: dict[str, float]
    bounds: dict[str, float]

    @property
    def failures(self) -> list[str]:
        """Names of the tensors out of bounds; values that are not finite are."""
        return [n for n, value in self.differences.items() if not (math.isfinite(value) and value <= self.bounds[n])]

    @property
    def nearest(self) -> str:
        """The tensor, beside loss and logits, whose difference is largest relative to its bound."""
        names = [name for name in self.differences if name not in ("loss", "logits")]
        return max(names, key=lambda name: nan_is_worst(self.differences[name] / (self.bounds[name] or 1e-300)))


def nan_is_worst(value: float) -> float:
    """Order differences: NaN is larger than any."""
    return math.inf if math.isnan(value) else value


def largest(each: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the largest difference of every tensor, by name, over replicas or ranks."""
    return {name: max((one[name] for one in each), key=nan_is_worst) for name in each[0]}


def relative(x: Tensor, ref: Tensor, least: float = 0.0) -> float:
    """Compute `|x - ref| / |ref|`, with `least` for a smaller norm of the reference; `|x|` if both are 0."""
    norm = max(float(ref.norm()), least)
    return float((x - ref).norm()) / (norm if norm > 0 else 1.0)


def differences(found: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative difference of every tensor in `found`, by name.

    That of a gradient, moment or parameter below `NEGLIGIBLE` times the norm of all of them is relative to that.
    """
    norms: dict[str, float] = {}
    for name, x in reference.items():
        if name not in ("loss", "logits"):
            kind = name.rpartition(" ")[0]  # "moment of", "updated", and "" of gradients
            norms[kind] = math.hypot(norms.get(kind, 0.0), float(x.norm()))
    least = {name: NEGLIGIBLE * norms.get(name.rpartition(" ")[0], 0.0) for name in found}
    least |= dict.fromkeys(("loss", "logits"), 0.0)
    return {name: relative(x, reference[name], least[name]) for name, x in found.items()}


def shrink(subject: Subject) -> Subject:
    """Shrink to a narrow model of the same kind, one pattern deep, on a short sequence and in small tiles."""
    model: ModelConfig = subject.model.shrunk()
    tiles = {"loss_tile": SHRUNK_TILE, "ffn_tile": "none" if subject.train.ffn_tile == "none" else SHRUNK_TILE}
    length, vocabulary = min(subject.length, SHRUNK_LENGTH), min(subject.vocab_size, SHRUNK_VOCABULARY)
    train = subject.train.model_copy(update=tiles)
    return replace(subject, model=model, train=train, vocab_size=vocabulary, length=length)


def subject_of(recipe: Recipe, vocab_size: int) -> Subject:
    """Return a recipe's model and training options as a subject, for a vocabulary of `vocab_size`."""
    length = recipe.data.sequence_length
    return Subject(
        recipe.model, recipe.train, vocab_size, length, recipe.seed, recipe.optimizer, own_cases(recipe.parallel)
    )


def verify(
    subject: Subject,
    ranks: LocalRanks,
    *,
    measure: Callable[[Subject, Case, Precision], RankResult] = measure,
    evaluate: Callable[[Subject, bool], dict[str, Tensor]] | None = evaluate,
) -> Iterator[Row]:
    """Compare one rank with the equations, then every case with one rank, yielding a row each, float64 first.

    `measure` runs on each rank, `evaluate` on one: the equations, left out if None. Raises UserError if these do not
    implement the model.
    """
    if evaluate is not None:
        check_covered(subject.model)

    def values(case: Case, precision: Precision, drawn: Subject = subject) -> Values:
        results = ranks.run(measure, drawn, case, precision, size=case.ranks)
        loss = torch.tensor(results[0].loss, dtype=torch.float64)
        replicas = [result.gradients | result.step for result in results if result.gradients]
        return Values(loss, gather_logits(results, drawn, case), replicas)

    all_cases = list(dict.fromkeys([*cases(ranks.size, subject.model), *subject.own]))
    all_cases = [case for case in all_cases if case.ranks <= ranks.size]
    exact = {packed: values(reference(packed), "fp64").named for packed in (False, True)}
    if evaluate is not None:
        short = subject if subject.length <= EQUATIONS_LENGTH else replace(subject, length=EQUATIONS_LENGTH)
        for packed in (False, True):
            found = exact[packed] if short is subject else values(reference(packed), "fp64", short).named
            (by_equations,) = ranks.run(evaluate, short, packed, size=1)
            compared = Equations(packed, None if short is subject else short.length)
            off = differences({name: found[name] for name in by_equations}, by_equations)
            yield Row(compared, "fp64", off, dict.fromkeys(off, BOUND_FP64))
    for case in all_cases:
        off = values(case, "fp64").differences(exact[case.packed])
        yield Row(case, "fp64", off, dict.fromkeys(off, BOUND_FP64))
    precision: Precision = subject.train.precision
    draws = []
    for number, packed in itertools.product(range(DRAWS), (False, True)):
        drawn, one_rank = replace(subject, seed=subject.seed + SEEDS_APART * number), reference(packed)
        want = exact[packed] if number == 0 else values(one_rank, "fp64", drawn).named
        draws.append(values(one_rank, precision, drawn).differences(want))
        if number == 0:
            bound = ONE_RANK_BOUNDS[precision]
            bounds = {n: bound if n in ("loss", "logits") else bound * ONE_RANK_GRADIENTS for n in draws[-1]}
            yield Row(one_rank, precision, draws[-1], bounds)
    bounds = {name: bound_of(x.numel(), [draw[name] for draw in draws]) for name, x in exact[False].items()}
    for case in all_cases:
        yield Row(case, precision, values(case, precision).differences(exact[case.packed]), bounds)


def bound_of(numbers: int, draws: Sequence[float]) -> float:
    """Return the bound of the difference of a tensor of so many numbers, from one rank's differences."""
    rounding = math.sqrt(sum(draw**2 for draw in draws) / len(draws))
    return max(BOUND, BEYOND_CHANCE[4 if numbers >= 64 else 1] * rounding)
