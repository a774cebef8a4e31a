"""The floating-point operations that a kernel cannot do without, two for each multiplication and addition.

A chunked recurrence, a token and a head, with C the tokens of a chunk: the scores with the tokens up to its own place
in the chunk (the lower half, `(C + 1) / 2` of them on average), 2 K each, and the same share of the sums over values,
2 V each; the read of the state, 2 K V, and the write into it, 2 K V. C is the chunk length of our kernel in torch
operators, on every device and for every peer, so that equal work counts equally. The delta rule has two more: what the
state answers to the key, 2 K V, and the triangular system, whose entries are scores of keys below the diagonal, 2 K
each, and whose solution is 2 V for each of them. Causal attention: scores and sums over the keys up to a token's own
place, 2 K and 2 V each.

The backward pass counts twice the forward pass, since each product has two gradients. Decays, exponentials, masks, what
is computed and masked away, and what the backward pass computes a second time are not counted.
"""

BACKWARD = 2
"""Operations of the backward pass, those of the forward pass taken as 1."""


def _lower(size: int) -> int:
    """Entries of the lower half of a square, diagonal included."""
    return size * (size + 1) // 2


def recurrence(tokens: int, heads: int, key_dim: int, value_dim: int, chunk: int, *, delta: bool) -> int:
    """The forward pass of a linear recurrence in chunks of `chunk` tokens, the last one as long as what is left."""
    whole, rest = divmod(tokens, chunk)
    pairs = whole * _lower(chunk) + _lower(rest)
    products = pairs * (key_dim + value_dim) + 2 * tokens * key_dim * value_dim
    if delta:
        products += (pairs - tokens) * (key_dim + value_dim) + tokens * key_dim * value_dim
    return 2 * heads * products


def causal_attention(tokens: int, heads: int, key_dim: int, value_dim: int) -> int:
    """The forward pass of softmax attention under the causal mask."""
    return 2 * heads * _lower(tokens) * (key_dim + value_dim)
