"""`[model]`: the decoder's shape. Each mixer and feed-forward that is registered adds its own table."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, create_model, model_validator

from longctx.config import Config, Integer
from longctx.layers.basic import Norm
from longctx.mixers import MIXERS, Mixer, MixerConfig
from longctx.mixers.head_mixture import HeadsMixConfig
from longctx.model.feed_forwards import FFNS, NO_FFN
from longctx.model.ffn import FeedForwardConfig
from longctx.model.moe import MoeConfig

VOCABULARY_MULTIPLE = 64
"""A vocabulary that the recipe does not size is rounded up to this, so that matrices are of a shape that is fast."""


class _ModelConfig(Config):
    """`[model]`: the decoder's shape. Each mixer that the pattern names has a table of its own."""

    layers: str
    """A pattern of mixers' letters, repeated over the depth: `LLLS` is three lightning layers and a softmax layer."""
    depth: Integer = Field(gt=0)
    """Layers; a mixer each, and a feed-forward unless `ffn` says `none`."""
    dim: Integer = Field(gt=0)
    """Width."""
    ffn: str | tuple[str, ...] = "swiglu"
    """The feed-forward's name, or a list of names, repeated over the depth: `["swiglu", "moe"]` is experts in every
    second layer; `none` is a layer that is a mixer alone, as in Mamba."""
    block: Literal["sequential", "parallel", "postnorm"] = "sequential"
    """`sequential`: the feed-forward reads what the mixer has written, a norm before each; `parallel`: both read the
    stream behind one norm, and their outputs are added to it together, as in PaLM, GPT-J and Cohere's models;
    `postnorm`: as `sequential`, but what a norm gives is the stream from there on, as in MiniMax-01."""
    residual: dict[str, tuple[float, float]] | None = None
    """By the name of a mixer or a feed-forward what the stream is multiplied with before its output is added, and what
    the output is (`softmax = [3.55, 1.0]`, DeepNorm's alpha and beta); 1 and 1 where absent."""
    norm: Norm = "rms"
    """The norms of the stream: `rms`, or `zero_centered_rms`, which multiplies with 1 plus its weight."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square before its root, in every norm."""
    tie_embeddings: bool = True
    """One matrix for the input embedding and the output head."""
    heads: HeadsMixConfig | None = None
    """Without it every token reads every head."""
    vocab_size: Integer | None = Field(default=None, gt=0)
    """Rows of the embedding; where absent the tokenizer's, rounded up to a multiple of 64."""

    @model_validator(mode="after")
    def _tables_fit_the_pattern(self) -> "_ModelConfig":
        problems = []
        if not self.layers:
            problems.append("layers: give a pattern of " + ", ".join(f"{c} ({k.name})" for c, k in MIXERS.items()))
        for letter in sorted(set(self.layers) - set(MIXERS)):
            known = ", ".join(f"{c} ({kind.name})" for c, kind in MIXERS.items())
            problems.append(f"layers: {letter!r} in {self.layers!r} is no mixer; there are {known}")
        for letter, kind in MIXERS.items():
            table = getattr(self, kind.name)
            if letter in self.pattern and table is None:
                problems.append(f"layers: {letter} needs the table [model.{kind.name}]")
            elif letter not in self.pattern and table is not None:
                problems.append(f"{kind.name}: no layer of {self.layers!r} ({self.depth} deep) is {letter}; remove it")
            elif table is not None:
                problems += [f"{kind.name}.{problem}" for problem in table.problems(self.dim)]
        names = self.feed_forwards
        there = ", ".join((*FFNS, NO_FFN))
        problems += [
            f"ffn: there is no {n!r}; there are {there}" for n in dict.fromkeys(names) if n not in (*FFNS, NO_FFN)
        ]
        if not names:
            problems.append(f"ffn: give a name, or a list of names; there are {there}")
        for name in FFNS:
            table = getattr(self, name)
            if table is not None and name not in names:
                problems.append(f"{name}: no layer's ffn is {name!r}; remove this table")
            elif table is None and name in names and FFNS[name].needs_table():
                problems.append(f"ffn: {name} needs the table [model.{name}]")
            elif table is not None:
                problems += [f"{name}.{problem}" for problem in table.problems()]
        problems += self._stream_problems()
        problems += self._heads_problems()
        problems += self._attention_is_there()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _stream_problems(self) -> Iterator[str]:
        """What of `block` and `residual` is of no layer."""
        if self.block == "parallel" and set(self.feed_forwards) == {NO_FFN}:
            yield "block: 'parallel' is of a mixer and a feed-forward, and no layer has one (ffn)"
        if self.residual is None:
            return
        if self.block == "parallel":
            yield "residual: with block 'parallel' the stream is added to once; take 'sequential' or 'postnorm'"
        here = {MIXERS[letter].name for letter in self.pattern if letter in MIXERS} | set(self.feed_forwards) - {NO_FFN}
        for name in sorted(self.residual.keys() - here):
            yield f"residual.{name}: no layer is of this name; there are {', '.join(sorted(here))}"

    def _heads_problems(self) -> Iterator[str]:
        """What of `[model.heads]` does not fit the mixers that it names."""
        if self.heads is None:
            return
        tables = {kind.name: getattr(self, kind.name) for c, kind in MIXERS.items() if c in self.pattern}
        for name in self.heads.mixers:
            table: MixerConfig | None = tables.get(name)
            if table is None:
                yield f"heads.mixers: no layer of {self.layers!r} is {name!r}; there are {', '.join(tables)}"
            elif (routable := table.routable()) is None:
                yield f"heads.mixers: the heads of {name} cannot be routed"
            else:
                yield from (f"heads.{problem}" for problem in self.heads.problems(name, *routable))
                if self.heads.router == "norm" and getattr(table, "qk_norm", None) is not None:
                    yield f"heads.router: 'norm' reads how large queries are, and {name}.qk_norm makes them alike"

    def _attention_is_there(self) -> list[str]:
        """The words for layers whose router reads attention that their mixer does not have."""
        found = []
        for layer, (letter, name) in enumerate(zip(self.pattern, self.feed_forwards, strict=False)):
            table: FeedForwardConfig | None = getattr(self, name) if name in FFNS else None
            if table is not None and table.borrows and letter in MIXERS and not MIXERS[letter].lends:
                able = ", ".join(f"{c} ({kind.name})" for c, kind in MIXERS.items() if kind.lends)
                found.append(
                    f"{name}.router: layer {layer} (counted from 0) is {letter} ({MIXERS[letter].name}), which has no "
                    f"attention to route by; experts that are routed by it need a layer {able}"
                )
                break
            routed = self.heads is not None and letter in MIXERS and MIXERS[letter].name in self.heads.mixers
            if table is not None and table.borrows and routed:
                found.append(
                    f"{name}.router: layer {layer} (counted from 0) has routed heads ([model.heads]), and experts "
                    "that are routed by attention need all of them"
                )
                break
        return found

    @property
    def pattern(self) -> str:
        """The letter of every layer."""
        return (self.layers * self.depth)[: self.depth]

    @property
    def feed_forwards(self) -> tuple[str, ...]:
        """The name of every layer's feed-forward."""
        names = (self.ffn,) if isinstance(self.ffn, str) else self.ffn
        return (names * self.depth)[: self.depth]

    @property
    def mixture(self) -> MoeConfig | None:
        """The configuration of its experts, where it has some."""
        table: MoeConfig | None = getattr(self, MoeConfig.name)
        return table

    def vocabulary_rows(self, tokens: int) -> int:
        """Rows of the embedding for a tokenizer of `tokens` tokens."""
        if self.vocab_size is not None:
            return self.vocab_size
        return -(-tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def mixer(self, layer: int) -> MixerConfig:
        """The configuration of a layer's mixer."""
        table: MixerConfig = getattr(self, MIXERS[self.pattern[layer]].name)
        return table

    def routed_heads(self, layer: int) -> int | None:
        """The number of heads of a layer's mixer, where a token reads some of them; else None."""
        table = self.mixer(layer)
        routable = table.routable()
        return routable[0] if self.heads is not None and table.name in self.heads.mixers and routable else None

    def attended(self, layer: int, tp: int = 1) -> dict[str, int]:
        """Heads that go through one attention of a layer, in words, and how many one of `tp` ranks has."""
        table = self.mixer(layer)
        routable = table.routable() if self.routed_heads(layer) else None
        if routable is None or self.heads is None:
            return {"heads": getattr(table, "heads", tp) // tp}
        return {words: count // tp for words, count in self.heads.attended(*routable).items()}

    def available_schedules(self, layer: int, size: int, ulysses: int, tp: int = 1) -> tuple[str, list[str]]:
        """As in `MixerConfig.available_schedules`, those that fit all heads of a layer, of which one of `tp` ranks has
        some."""
        table = self.mixer(layer)
        tables = [table.model_copy(update={"heads": count}) for count in self.attended(layer, tp).values()]
        (field, *_), names = zip(*(each.available_schedules(size, ulysses) for each in tables), strict=True)
        return field, [name for name in names[0] if all(name in others for others in names)]

    def build_mixer(self, layer: int) -> Mixer:
        """A layer's mixer, with its router where heads are routed."""
        mixer = self.mixer(layer).build(self.dim, layer, self.depth, self.norm_eps)
        heads = self.routed_heads(layer)
        if heads is not None and self.heads is not None:
            mixer.mix_heads(self.heads, self.dim, heads)
        return mixer

    def shrunk(self) -> "ModelConfig":
        """The same pattern once, narrow: for `longctx verify --shrink`."""
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
        """The configuration of a layer's feed-forward; None where it has none."""
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
