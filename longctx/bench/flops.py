"""FLOP counts: the minimum floating-point operations of a kernel, two per multiply-add.

Chunkwise recurrence, per token and head, with chunks of C tokens. Intra-chunk: scores with the tokens up to its own in
the chunk (`(C + 1) / 2` on average), 2 K each, and their products with the values, 2 V each. Inter-chunk: the read of
the recurrent state, 2 K V, and its update, 2 K V. C is the chunk length of our torch kernel on every device and for
every peer, so that equal work counts equally. The delta rule adds the product of the state with the key, 2 K V, and the
triangular system: key-key scores below the diagonal, 2 K each, and forward substitution, 2 V for each of them. Causal
attention: scores and value sums over the keys up to a token's own, 2 K and 2 V each.

The backward pass counts twice the forward pass, since each product has two gradients. Decays, exponentials, masked-out
work and recomputation in the backward pass are not counted.
"""

BACKWARD = 2
"""FLOPs of the backward pass, as a multiple of the forward pass."""


def _lower(size: int) -> int:
    """Count the entries of the lower triangle of a square, with its diagonal."""
    return size * (size + 1) // 2


def recurrence(tokens: int, heads: int, key_dim: int, value_dim: int, chunk: int, *, delta: bool) -> int:
    """Count the forward FLOPs of a linear recurrence in chunks of `chunk` tokens, the last one shorter."""
    full_chunks, rest = divmod(tokens, chunk)
    pairs = full_chunks * _lower(chunk) + _lower(rest)
    products = pairs * (key_dim + value_dim) + 2 * tokens * key_dim * value_dim
    if delta:
        products += (pairs - tokens) * (key_dim + value_dim) + tokens * key_dim * value_dim
    return 2 * heads * products


def causal_attention(tokens: int, heads: int, key_dim: int, value_dim: int) -> int:
    """Count the forward FLOPs of causal softmax attention."""
    return 2 * heads * _lower(tokens) * (key_dim + value_dim)
