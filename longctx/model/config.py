"""`[model]`: the decoder's shape. Each mixer and feed-forward that is registered adds its own table."""

from typing import TYPE_CHECKING, Any

from pydantic import Field, create_model, model_validator

from longctx.config import Config, Integer
from longctx.mixers import MIXERS, MixerConfig
from longctx.model.ffn import FFNS, FeedForwardConfig

VOCABULARY_MULTIPLE = 64
"""A vocabulary that the recipe does not size is rounded up to this, so that matrices are of a shape that is fast."""


class _ModelConfig(Config):
    """`[model]`: the decoder's shape. Each mixer that the pattern names has a table of its own."""

    layers: str
    """A pattern of mixers' letters, repeated over the depth: `LLLS` is three lightning layers and a softmax layer."""
    depth: Integer = Field(gt=0)
    """Layers; a mixer and a feed-forward each."""
    dim: Integer = Field(gt=0)
    """Width."""
    ffn: str = "swiglu"
    """The feed-forward's name."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square before its root, in every norm."""
    tie_embeddings: bool = True
    """One matrix for the input embedding and the output head."""
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
        if self.ffn not in FFNS:
            problems.append(f"ffn: there is no {self.ffn!r}; there are {', '.join(FFNS)}")
        else:
            problems += [f"{name}: ffn is {self.ffn!r}; remove this table" for name in FFNS if self._unused(name)]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _unused(self, ffn: str) -> bool:
        return getattr(self, ffn) is not None and self.ffn != ffn

    @property
    def pattern(self) -> str:
        """The letter of every layer."""
        return (self.layers * self.depth)[: self.depth]

    def vocabulary_rows(self, tokens: int) -> int:
        """Rows of the embedding for a tokenizer of `tokens` tokens."""
        if self.vocab_size is not None:
            return self.vocab_size
        return -(-tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def mixer(self, layer: int) -> MixerConfig:
        """The configuration of a layer's mixer."""
        table: MixerConfig = getattr(self, MIXERS[self.pattern[layer]].name)
        return table

    def shrunk(self) -> "ModelConfig":
        """The same pattern once, narrow: for `longctx verify --shrink`."""
        tables = {kind.name: getattr(self, kind.name) for kind in MIXERS.values()}
        small: dict[str, Any] = {name: table.shrunk() for name, table in tables.items() if table is not None}
        small[self.ffn] = self.feed_forward().shrunk()
        return self.model_copy(update={"dim": 32, "depth": min(self.depth, len(self.layers)), **small})

    def feed_forward(self) -> FeedForwardConfig:
        """The configuration of the feed-forward layers."""
        table: FeedForwardConfig | None = getattr(self, self.ffn)
        return FFNS[self.ffn]() if table is None else table


if TYPE_CHECKING:
    ModelConfig = _ModelConfig
else:
    _TABLES: dict[str, Any] = {
        kind.name: (kind | None, Field(default=None)) for kind in (*MIXERS.values(), *FFNS.values())
    }
    ModelConfig = create_model(
        "ModelConfig", __base__=_ModelConfig, __module__=__name__, __doc__=_ModelConfig.__doc__, **_TABLES
    )
