"""What a routed model begins with where it is made of trained dense ones (upcycling).

N sources, dense models of one shape, s = 0 … N - 1. In a layer with experts e = 0 … E - 1 (Komatsuzaki et al. 2023,
where N is 1; several sources as in Sukhbaatar et al. 2024, Branch-Train-MiX):

    gate_up_e = gate_up of source e mod N            down_e = down of source e mod N
    router: drawn; the bias that balances the load: 0

Where the layer has a shared expert too, which is as wide, what a token gets is the sum of it and of its experts:

    shared gate_up = mean over s of gate_up          shared down = 1/2 mean over s of down
                                                     down_e = 1/2 down of source e mod N

A softmax layer whose place attention experts take (Zhang et al. 2024, BAM) becomes all of them, expert e that of source
e mod N (`longctx.moe.attention_upcycle`), with a router that is drawn. In a layer with a mixture of heads (Jin et al.
2024) the router is 0: its logits are uniform, and every head that is read counts 1. All else (norms, embeddings, head,
mixers, feed-forwards that stay dense) is the mean over sources.

So where all sources are equal, and the weights of a token's experts sum to 1, the routed model's output is theirs, as
long as each token reads all heads.

A rule says it for one parameter, by names alone. A new kind of layer is a rule more in `RULES`.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Mean:
    """`factor` times the mean of the sources' tensors `name`, of the same shape."""

    name: str
    factor: float = 1.0


@dataclass(frozen=True)
class Spread:
    """`[E, ...]`: number e is `factor` times the tensor `name [...]` of source `source_of(e, N)`."""

    name: str
    factor: float = 1.0


@dataclass(frozen=True)
class Drawn:
    """What a model that is not made of others begins with."""


@dataclass(frozen=True)
class Zeros:
    """0."""


@dataclass(frozen=True)
class Experts:
    """A matrix of attention experts, arranged from the tensors `name`, for expert e of source `source_of(e, N)`."""

    name: str
    matrix: Literal["qkv", "out"]


Beginning = Mean | Spread | Experts | Drawn | Zeros
Rule = Callable[[str, Collection[str], Collection[str]], Beginning | None]
"""From a parameter's name, those of all tensors of a source, and those of the routed model: how it begins, or None."""


def source_of(expert: int, sources: int) -> int:
    """The source that an expert is taken from."""
    return expert % sources


def _expert(name: str, dense: Collection[str], routed: Collection[str]) -> Beginning | None:
    match = re.fullmatch(r"(.*\.ffn)\.(experts\.(?:gate_up|down)|shared\.(?:gate_up|down)\.weight)", name)
    if match is None:
        return None
    layer, matrix = match[1], match[2].split(".")[1]
    source = f"{layer}.{matrix}.weight"
    if source not in dense:
        return None
    factor = 0.5 if matrix == "down" and f"{layer}.shared.down.weight" in routed else 1.0
    return Spread(source, factor) if match[2].startswith("experts.") else Mean(source, factor)


def _expert_router(name: str, dense: Collection[str], routed: Collection[str]) -> Beginning | None:
    layer, _, rest = name.rpartition(".ffn.")
    if f"{layer}.ffn.experts.down" not in routed:
        return None
    if rest == "router.weight":
        return Drawn()
    return Zeros() if rest == "bias" else None


def _attention_expert(name: str, dense: Collection[str], routed: Collection[str]) -> Beginning | None:
    layer, _, rest = name.rpartition(".mixer.")
    if not layer or f"{layer}.mixer.router.weight" not in routed:
        return None
    if rest == "router.weight":
        return Drawn()
    if name in dense and rest == "qkv.weight":
        return Experts(name, "qkv")
    return Experts(name, "out") if name in dense and rest == "out.weight" else None


def _head_router(name: str, dense: Collection[str], routed: Collection[str]) -> Beginning | None:
    return Zeros() if name.endswith(".mixer.head_router.weight") and name not in dense else None


def _same(name: str, dense: Collection[str], routed: Collection[str]) -> Beginning | None:
    return Mean(name) if name in dense else None


RULES: tuple[Rule, ...] = (_expert, _expert_router, _attention_expert, _head_router, _same)
"""The first that says something decides."""


def beginning(name: str, dense: Collection[str], routed: Collection[str]) -> Beginning | None:
    """How the tensor `name` of a routed model begins; None where no rule knows it.

    `dense`: the names of a source's tensors; `routed`: those of the routed model.
    """
    return next((found for rule in RULES if (found := rule(name, dense, routed)) is not None), None)
