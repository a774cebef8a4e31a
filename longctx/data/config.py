"""The `[data]` table of a recipe: the corpora, the sequence length and the shuffling."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from longctx.config import Config, Integer, PathText
from longctx.data.length_range import LengthRange


class SourceConfig(Config):
    """`[[data.mix]]`: a table per source of a mix, a corpus or its documents in a range of lengths. A sequence has
    documents of one source; sources take turns in a fixed order, such that after any number of sequences each has its
    share of them to within 2 sequences. On the command line: `data.mix=[{path="a",weight=2},{path="b",weight=1}]`."""

    path: PathText
    """Corpus directory written by `longctx data prepare`; relative to the working directory. All sources have one
    tokenizer. Several sources may have the same corpus, with other ranges of lengths."""
    weight: float = Field(gt=0)
    """Share of the training tokens, relative to the other sources' weights, on any scale."""
    min_document: Integer = Field(default=1, gt=0)
    """Shortest documents that are read, in tokens, end token included; shorter ones are left out of this source."""
    max_document: Integer | None = Field(default=None, gt=0)
    """Longest documents that are read, in tokens, end token included; longer ones are left out of this source. Default:
    no limit."""

    @property
    def lengths(self) -> LengthRange:
        """The lengths of the documents that are read."""
        return LengthRange(self.min_document, self.max_document)

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> "SourceConfig":
        if self.max_document is not None and self.max_document < self.min_document:
            raise ValueError(f"max_document: {self.max_document} is less than min_document = {self.min_document}")
        return self


class DataConfig(Config):
    """`[data]`: the prepared corpora and the sequences cut from them."""

    path: PathText | None = None
    """Corpus directory written by `longctx data prepare`; relative to the working directory. Either this or `mix` is
    required; the one that is set later, in an extending recipe or on the command line, replaces the other."""
    mix: tuple[SourceConfig, ...] = ()
    """Several corpora by weight, instead of `path` (docs/data.md)."""
    sequence_length: Integer = Field(gt=0)
    """Tokens per sequence, over all context-parallel ranks."""
    shuffle_window: Annotated[Integer, Field(gt=0)] | Literal["none"] = 2**24
    """Window, in tokens, within which documents are shuffled; row groups are shuffled first. The loader keeps about two
    windows per source in memory, at 2 or 4 bytes per token. `none`: documents in their stored order."""

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources of the sequences: those of the mix, or the one corpus."""
        return self.mix if self.path is None else (SourceConfig(path=self.path, weight=1.0),)

    @property
    def corpora(self) -> str:
        """The directories of the corpora, for messages."""
        return ", ".join(dict.fromkeys(source.path for source in self.sources))

    @model_validator(mode="after")
    def _has_path_or_mix(self) -> "DataConfig":
        if self.path is None and not self.mix:
            raise ValueError("path: missing: name one corpus, or several with tables [[data.mix]]")
        if self.path is not None and self.mix:
            raise ValueError("mix: data.path is set too: keep either path, one corpus, or mix, several by weight")
        return self
