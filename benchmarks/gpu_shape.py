"""Sizes of one call in the GPU benchmark."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One sequence of `tokens`, with `heads` of `dim`."""

    tokens: int
    heads: int
    dim: int

    def __str__(self) -> str:
        tokens = f"{self.tokens // 1024}K" if self.tokens % 1024 == 0 else str(self.tokens)
        return f"{tokens}-{self.heads}-{self.dim}"
