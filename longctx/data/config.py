"""The `[data]` table of a recipe: the corpus, the sequence length and the shuffling."""

from typing import Annotated, Literal

from pydantic import Field

from longctx.config import Config, Integer, PathText


class DataConfig(Config):
    """`[data]`: the prepared corpus and the sequences cut from it."""

    path: PathText
    """Corpus directory written by `longctx data prepare`; relative to the working directory."""
    sequence_length: Integer = Field(gt=0)
    """Tokens per sequence, over all context-parallel ranks."""
    shuffle_window: Annotated[Integer, Field(gt=0)] | Literal["none"] = 2**24
    """Window, in tokens, within which documents are shuffled; row groups are shuffled first. The loader keeps about two
    windows in memory, at 2 or 4 bytes per token. `none`: documents in their stored order."""
