"""Upcycling: initialisation rules for a routed model made of trained dense models.

N sources, dense models of one shape, s = 0 … N - 1. In a layer with experts e = 0 … E - 1 (Komatsuzaki et al. 2023 for
N = 1; several sources as in Sukhbaatar et al. 2024, Branch-Train-MiX):

    gate_up_e = gate_up of source e mod N            down_e = down of source e mod N
    router: random; load-balancing bias: 0

A layer that also has a shared expert (of the same width) outputs the sum of it and of a token's experts, so each half
is scaled:

    shared gate_up = mean over s of gate_up          shared down = 1/2 mean over s of down
                                                     down_e = 1/2 down of source e mod N

A softmax layer that becomes attention experts (Zhang et al. 2024, BAM) is copied to all of them, expert e from source
e mod N (`longctx.moe.attention_upcycle`), with a random router. The router of a mixture of heads (Jin et al. 2024) is
0: its logits are uniform, and every active head has weight 1. All other parameters (norms, embeddings, head, mixers,
feed-forwards that stay dense) are the mean over sources.

So if all sources are equal, the weights of a token's experts sum to 1 and all heads are active, then the routed model
computes the same function as the sources.

A rule decides from names only how one parameter is initialised. A new kind of layer needs one more rule in `RULES`.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Mean:
    """Initialise with `factor` times the mean of the sources' tensors `name`, of the same shape."""

    name: str
    factor: float = 1.0


@dataclass(frozen=True)
class ExpertCopies:
    """Initialise `[E, ...]`: slice e is `factor` times the tensor `name [...]` of source `source_of(e, N)`."""

    name: str
    factor: float = 1.0


@dataclass(frozen=True)
class RandomInit:
    """Initialise as in a model trained from scratch (`longctx.model.initialise`)."""


@dataclass(frozen=True)
class Zeros:
    """Initialise with 0."""


@dataclass(frozen=True)
class AttentionExperts:
    """Merge the tensors `name`, for expert e that of source `source_of(e, N)`, into a matrix of attention experts."""

    name: str
    matrix: Literal["qkv", "out"]


TensorInit = Mean | ExpertCopies | AttentionExperts | RandomInit | Zeros
Rule = Callable[[str, Collection[str], Collection[str]], TensorInit | None]
"""(parameter's name, names of a source's tensors, names of the routed model's) -> its initialisation, or None if the
rule does not apply."""


def source_of(expert: int, sources: int) -> int:
    """Return the number of the source that an expert is copied from."""
    return expert % sources


def _expert(name: str, dense: Collection[str], routed: Collection[str]) -> TensorInit | None:
    match = re.fullmatch(r"(.*\.ffn)\.(experts\.(?:gate_up|down)|shared\.(?:gate_up|down)\.weight)", name)
    if match is None:
        return None
    layer, matrix = match[1], match[2].split(".")[1]
    source = f"{layer}.{matrix}.weight"
    if source not in dense:
        return None
    factor = 0.5 if matrix == "down" and f"{layer}.shared.down.weight" in routed else 1.0
    return ExpertCopies(source, factor) if match[2].startswith("experts.") else Mean(source, factor)


def _expert_router(name: str, dense: Collection[str], routed: Collection[str]) -> TensorInit | None:
    layer, _, rest = name.rpartition(".ffn.")
    if f"{layer}.ffn.experts.down" not in routed:
        return None
    if rest == "router.weight":
        return RandomInit()
    return Zeros() if rest == "bias" else None


def _attention_expert(name: str, dense: Collection[str], routed: Collection[str]) -> TensorInit | None:
    layer, _, rest = name.rpartition(".mixer.")
    if not layer or f"{layer}.mixer.router.weight" not in routed:
        return None
    if rest == "router.weight":
        return RandomInit()
    if name in dense and rest == "qkv.weight":
        return AttentionExperts(name, "qkv")
    return AttentionExperts(name, "out") if name in dense and rest == "out.weight" else None


def _head_router(name: str, dense: Collection[str], routed: Collection[str]) -> TensorInit | None:
    return Zeros() if name.endswith(".mixer.head_router.weight") and name not in dense else None


def _same(name: str, dense: Collection[str], routed: Collection[str]) -> TensorInit | None:
    return Mean(name) if name in dense else None


RULES: tuple[Rule, ...] = (_expert, _expert_router, _attention_expert, _head_router, _same)
"""The first rule that applies decides."""


def tensor_init(name: str, dense: Collection[str], routed: Collection[str]) -> TensorInit | None:
    """Return the initialisation of the tensor `name` of a routed model; None if no rule applies.

    `dense` are the names of a source's tensors, `routed` those of the routed model.
    """
    return next((init for rule in RULES if (init := rule(name, dense, routed)) is not None), None)
