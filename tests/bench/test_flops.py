"""Necessary operations, against counting them token by token."""

import pytest

from longctx.bench import flops
from longctx.bench.kernels import KERNELS, Shape
from longctx.kernels.linear.additive import chunked as additive

K, V = 5, 3


def counted(tokens: int, chunk: int, *, delta: bool) -> int:
    """Multiplications and additions of one head."""
    total = 0
    for token in range(tokens):
        place = token % chunk
        total += (place + 1) * 2 * K  # scores with itself and what precedes it in the chunk
        total += (place + 1) * 2 * V  # what these take of the values
        total += 2 * K * V  # the read of the state
        total += 2 * K * V  # the write
        if delta:
            total += place * (2 * K + 2 * V)  # the row of the triangular system and its solution
            total += 2 * K * V  # the state's answer
    return total


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (3, 4), (4, 4), (9, 4), (16, 1)])
def test_a_recurrence(tokens: int, chunk: int, delta: bool) -> None:
    assert flops.recurrence(tokens, 7, K, V, chunk, delta=delta) == 7 * counted(tokens, chunk, delta=delta)


@pytest.mark.parametrize("tokens", [1, 2, 11])
def test_causal_attention(tokens: int) -> None:
    assert flops.causal_attention(tokens, 3, K, V) == 3 * sum((t + 1) * (2 * K + 2 * V) for t in range(tokens))


def test_the_lightning_kernel_counts_its_own_chunks() -> None:
    """With heads of 128: 256 for each of a chunk and one token in the scores and sums of its half, 65,536 for the
    state."""
    lightning = KERNELS["lightning"].flops
    assert lightning is not None
    tokens = 10 * additive.CHUNK
    assert lightning(Shape(tokens, 8, 128, "float32")) == tokens * 8 * ((additive.CHUNK + 1) * 256 + 65_536)


def test_pointwise_kernels_have_none() -> None:
    assert [name for name, kernel in KERNELS.items() if kernel.flops is None] == ["rms-norm", "swiglu"]
