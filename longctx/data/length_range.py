"""Ranges of document lengths: which documents of a corpus a source of a mix reads."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class LengthRange:
    """Document lengths in tokens, end token included: `shortest` to `longest`, both included; None: no limit."""

    shortest: int = 1
    longest: int | None = None

    @property
    def has_all(self) -> bool:
        """Whether every document is in the range."""
        return self.shortest <= 1 and self.longest is None

    def contains(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which of the lengths, int64 [documents], are in the range."""
        inside: npt.NDArray[np.bool_] = lengths >= self.shortest
        return inside if self.longest is None else inside & (lengths <= self.longest)

    def fingerprint(self, corpus: str) -> str:
        """Return the fingerprint of a corpus's documents in this range, from that of all its documents."""
        if self.has_all:
            return corpus
        return hashlib.sha256(f"{corpus} documents of {self.shortest} to {self.longest} tokens".encode()).hexdigest()

    def __str__(self) -> str:
        """Return the range as a reader would say it, such as `at least 32,768 tokens`."""
        if self.longest is None:
            return f"at least {self.shortest:,} tokens"
        if self.shortest <= 1:
            return f"at most {self.longest:,} tokens"
        return f"{self.shortest:,} to {self.longest:,} tokens"
