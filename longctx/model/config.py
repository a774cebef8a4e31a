"""Model configuration, the recipe's `[model]`. Each registered mixer and feed-forward adds its own table."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, create_model, model_validator

from longctx.config import Config, Integer
from longctx.layers.basic import Norm
from longctx.mixers import MIXERS, Mixer, MixerConfig
from longctx.mixers.head_mixture import HeadMixtureConfig
from longctx.model.ffn import FeedForwardConfig
from longctx.model.ffn_registry import FFNS, NO_FFN
from longctx.model.moe import MoeConfig

VOCABULARY_MULTIPLE = 64
"""The tokenizer's vocabulary is padded to a multiple of this, for fast matrix products."""


class _ModelConfig(Config):
    """`[model]`: the decoder. Each mixer in the pattern has its own table."""

    layers: str
    """Pattern of mixer letters, repeated over the depth: `LLLS` is three lightning layers and one softmax layer."""
    depth: Integer = Field(gt=0)
    """Number of layers, each a mixer and, unless `ffn` is `none`, a feed-forward."""
    dim: Integer = Field(gt=0)
    """Model width (hidden size)."""
    ffn: str | tuple[str, ...] = "swiglu"
    """Name of the feed-forward, or a list of names, repeated over the depth: `["swiglu", "moe"]` has experts in every
    second layer; `none` is a layer without feed-forward, as in Mamba."""
    block: Literal["sequential", "parallel", "postnorm"] = "sequential"
    """`sequential`: pre-norm, the mixer and then the feed-forward. `parallel`: mixer and feed-forward share one norm
    and are added to the residual stream together, as in PaLM, GPT-J and Cohere's models. `postnorm`: as `sequential`,
    but the output of each norm replaces the residual stream, as in MiniMax-01."""
    residual: dict[str, tuple[float, float]] | None = None
    """Residual scaling, by the name of a mixer or feed-forward: the factors of the residual stream and of the layer's
    output when they are added (`softmax = [3.55, 1.0]`, DeepNorm's alpha and beta). Default: 1 and 1."""
    norm: Norm = "rms"
    """Norm of the residual stream: `rms`, or `zero_centered_rms`, which multiplies by 1 + weight."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of all norms, added to the mean square."""
    tie_embeddings: bool = True
    """Share one matrix between the input embedding and the output head."""
    heads: HeadMixtureConfig | None = None
    """Mixture of heads; without it all heads are active for every token."""
    vocab_size: Integer | None = Field(default=None, gt=0)
    """Rows of the embedding. Default: the tokenizer's vocabulary, rounded up to a multiple of 64."""

    @model_validator(mode="after")
    def _tables_fit_the_pattern(self) -> "_ModelConfig":
        problems = []
        mixers = ", ".join(f"{letter} ({kind.name})" for letter, kind in MIXERS.items())
        if not self.layers:
            problems.append(f"layers: the pattern is empty; expected letters of {mixers}")
        problems += [
            f"layers: {letter!r} in {self.layers!r} is not a mixer; expected letters of {mixers}"
            for letter in sorted(set(self.layers) - set(MIXERS))
        ]
        for letter, kind in MIXERS.items():
            table = getattr(self, kind.name)
            if letter in self.pattern and table is None:
                problems.append(f"layers: {letter} needs the table [model.{kind.name}]")
            elif letter not in self.pattern and table is not None:
                pattern = f"the pattern {self.layers!r} over {self.depth} layers"
                problems.append(f"{kind.name}: no {letter} in {pattern}; remove the table")
            elif table is not None:
                problems += [f"{kind.name}.{problem}" for problem in table.problems(self.dim)]
        names = self.feed_forwards
        known = ", ".join((*FFNS, NO_FFN))
        problems += [
            f"ffn: unknown feed-forward {n!r}; expected one of {known}"
            for n in dict.fromkeys(names)
            if n not in (*FFNS, NO_FFN)
        ]
        if not names:
            problems.append(f"ffn: the list is empty; expected one or more of {known}")
        for name in FFNS:
            table = getattr(self, name)
            if table is not None and name not in names:
                problems.append(f"{name}: no layer has ffn {name!r}; remove the table")
            elif table is None and name in names and FFNS[name].needs_table():
                problems.append(f"ffn: {name} needs the table [model.{name}]")
            elif table is not None:
                problems += [f"{name}.{problem}" for problem in table.problems()]
        problems += self._stream_problems()
        problems += self._heads_problems()
        problems += self._attention_router_problems()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _stream_problems(self) -> Iterator[str]:
        """Yield the problems of `block` and `residual`."""
        if self.block == "parallel" and set(self.feed_forwards) == {NO_FFN}:
            yield "block: 'parallel' needs layers with a feed-forward, and no layer has one (ffn)"
        if self.residual is None:
            return
        if self.block == "parallel":
            yield "residual: block 'parallel' has one residual connection per layer; use 'sequential' or 'postnorm'"
        names = {MIXERS[letter].name for letter in self.pattern if letter in MIXERS}
        names |= set(self.feed_forwards) - {NO_FFN}
        for name in sorted(self.residual.keys() - names):
            yield f"residual.{name}: no such layer; expected one of {', '.join(sorted(names))}"

    def _heads_problems(self) -> Iterator[str]:
        """Yield the problems of `[model.heads]` with the mixers that it lists."""
        if self.heads is None:
            return
        tables = {kind.name: getattr(self, kind.name) for c, kind in MIXERS.items() if c in self.pattern}
        for name in self.heads.mixers:
            table: MixerConfig | None = tables.get(name)
            if table is None:
                yield f"heads.mixers: the pattern {self.layers!r} has no {name!r}; expected one of {', '.join(tables)}"
            elif (routable := table.routable()) is None:
                yield f"heads.mixers: {name} does not support a mixture of heads"
            else:
                yield from (f"heads.{problem}" for problem in self.heads.problems(name, *routable))
                if self.heads.router == "norm" and getattr(table, "qk_norm", None) is not None:
                    yield f"heads.router: 'norm' compares the norms of queries, which {name}.qk_norm makes equal"

    def _attention_router_problems(self) -> list[str]:
        """Return the problem of the first layer whose router needs attention that its mixer does not expose."""
        for layer, (letter, name) in enumerate(zip(self.pattern, self.feed_forwards, strict=False)):
            table: FeedForwardConfig | None = getattr(self, name) if name in FFNS else None
            kind = MIXERS.get(letter)
            if table is None or kind is None or not table.needs_attention:
                continue
            if not kind.exposes_attention:
                suitable = ", ".join(f"{c} ({other.name})" for c, other in MIXERS.items() if other.exposes_attention)
                return [
                    f"{name}.router: layer {layer} (from 0) is {letter} ({kind.name}), which has no softmax attention; "
                    f"the router 'attention' needs a layer {suitable}"
                ]
            if self.heads is not None and kind.name in self.heads.mixers:
                return [
                    f"{name}.router: layer {layer} (from 0) has a mixture of heads ([model.heads]), and the router "
                    "'attention' needs all heads"
                ]
        return []

    @property
    def pattern(self) -> str:
        """The mixer letter of every layer."""
        return (self.layers * self.depth)[: self.depth]

    @property
    def feed_forwards(self) -> tuple[str, ...]:
        """The feed-forward name of every layer."""
        names = (self.ffn,) if isinstance(self.ffn, str) else self.ffn
        return (names * self.depth)[: self.depth]

    @property
    def mixture(self) -> MoeConfig | None:
        """The configuration of the mixture of experts, if there is one."""
        table: MoeConfig | None = getattr(self, MoeConfig.name)
        return table

    def vocabulary_rows(self, tokens: int) -> int:
        """Return the number of rows of the embedding for a tokenizer with `tokens` tokens."""
        if self.vocab_size is not None:
            return self.vocab_size
        return -(-tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def mixer(self, layer: int) -> MixerConfig:
        """Return the configuration of a layer's mixer."""
        table: MixerConfig = getattr(self, MIXERS[self.pattern[layer]].name)
        return table

    def routed_heads(self, layer: int) -> int | None:
        """Return the number of heads of a layer's mixer if it is a mixture of heads, else None."""
        table = self.mixer(layer)
        routable = table.routable()
        return routable[0] if self.heads is not None and table.name in self.heads.mixers and routable else None

    def attention_head_counts(self, layer: int, tp: int = 1) -> dict[str, int]:
        """Return the heads of each attention of a layer, by description, as one of `tp` ranks has them."""
        table = self.mixer(layer)
        routable = table.routable() if self.routed_heads(layer) else None
        if routable is None or self.heads is None:
            return {"heads": getattr(table, "heads", tp) // tp}
        return {kind: count // tp for kind, count in self.heads.attention_head_counts(*routable).items()}

    def available_schedules(self, layer: int, size: int, ulysses: int, tp: int = 1) -> tuple[str, list[str]]:
        """Return `MixerConfig.available_schedules` of a layer on one of `tp` ranks: those that fit all its heads."""
        table, counts = self.mixer(layer), self.attention_head_counts(layer, tp).values()
        tables = [table.model_copy(update={"heads": count}) for count in counts]
        (field, *_), names = zip(*(table.available_schedules(size, ulysses) for table in tables), strict=True)
        return field, [name for name in names[0] if all(name in others for others in names)]

    def build_mixer(self, layer: int) -> Mixer:
        """Build a layer's mixer, with its head router if it is a mixture of heads."""
        mixer = self.mixer(layer).build(self.dim, layer, self.depth, self.norm_eps)
        heads = self.routed_heads(layer)
        if heads is not None and self.heads is not None:
            mixer.add_head_router(self.heads, self.dim, heads)
        return mixer

    def shrunk(self) -> "ModelConfig":
        """Return one period of the pattern with narrow layers, for `longctx verify --shrink`."""
        tables = {kind.name: getattr(self, kind.name) for kind in MIXERS.values()}
        small: dict[str, Any] = {name: table.shrunk() for name, table in tables.items() if table is not None}
        depth = min(self.depth, max(len(self.layers), 1 if isinstance(self.ffn, str) else len(self.ffn)))
        for layer, name in enumerate(self.feed_forwards[:depth]):
            table = self.feed_forward(layer)
            if table is not None:
                small[name] = table.shrunk()
        if self.heads is not None:
            routables = [small[name].routable() for name in self.heads.mixers]
            few, group = min(heads for heads, _ in routables), max(group for _, group in routables)
            small["heads"] = self.heads.shrunk(few, group)
        unused = {name: None for name in FFNS if name not in small}
        return self.model_copy(update={"dim": 32, "depth": depth, **unused, **small})

    def feed_forward(self, layer: int) -> FeedForwardConfig | None:
        """Return the configuration of a layer's feed-forward; None if it has none."""
        name = self.feed_forwards[layer]
        if name == NO_FFN:
            return None
        table: FeedForwardConfig | None = getattr(self, name)
        return FFNS[name]() if table is None else table


if TYPE_CHECKING:
    ModelConfig = _ModelConfig
else:
    _TABLES: dict[str, Any] = {
        kind.name: (kind | None, Field(default=None)) for kind in (*MIXERS.values(), *FFNS.values())
    }
    ModelConfig = create_model(
        "ModelConfig", __base__=_ModelConfig, __module__=__name__, __doc__=_ModelConfig.__doc__, **_TABLES
    )


def position_keys() -> frozenset[str]:
    """Return the keys of `[model]`, dotted, that change no tensor: positions and masks of the mixers."""
    return frozenset(f"{kind.name}.{key}" for kind in MIXERS.values() for key in kind.positions)
