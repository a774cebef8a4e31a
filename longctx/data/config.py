"""`[data]`: the part of a recipe that says what is read, and in which order."""

from typing import Annotated, Literal

from pydantic import Field

from longctx.config import Config, Integer


class DataConfig(Config):
    """`[data]`: a prepared corpus and how it is cut into sequences."""

    path: str = Field(min_length=1)
    """Directory that `longctx data prepare` wrote; a relative one starts at the working directory."""
    sequence_length: Integer = Field(gt=0)
    """Tokens in a sequence, over all context-parallel ranks."""
    shuffle_window: Annotated[Integer, Field(gt=0)] | Literal["none"] = 2**24
    """Tokens within which documents are mixed, after the row groups themselves are; the loader keeps about twice as
    many in memory (2 or 4 bytes each). `none`: documents in the order in which they were prepared."""
