"""Attention experts from dense layers' weights (upcycling; Zhang et al. 2024, BAM).

Each function takes one parameter of N seeds (dense models of one shape), one seed per expert, and returns that
parameter of the attention experts, in the seeds' dtype and on their device; a seed may be repeated. The order, for
experts of H query heads over H_kv key/value heads of width K:

    kv = "each"    qkv rows: q of expert 0, 1, …, k of expert 0, 1, …, v of expert 0, 1, …
                   out columns: expert 0, 1, …
    kv = "shared"  qkv rows: per key head its q of expert 0, 1, …, then the mean of the experts' k and of their v
                   out columns: in the order of q

The router's weights sum to 1, so N equal seeds compute the same function as the seed, whatever the router's weights.

Each function raises ValueError if the seeds' shapes differ or do not match the heads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.moe.attention_experts import KeysValues, flatten_expert_heads


def mean(seeds: Sequence[Tensor]) -> Tensor:
    """Average a parameter that experts share (norms, embeddings) over the seeds: in float64, rounded once."""
    return _stacked(seeds).to(torch.float64).mean(dim=0).to(seeds[0].dtype)


def upcycle_qkv(seeds: Sequence[Tensor], heads: int, kv_heads: int, kv: KeysValues) -> Tensor:
    """Merge `qkv.weight [(H + 2 H_kv) K, D]` of the seeds' softmax layers into that of attention experts.

    The result is `[(N H + 2 N H_kv) K, D]` if each expert keeps its keys and values, and `[(N H + 2 H_kv) K, D]` if
    they share the mean. Rows: all query heads in the order of `flatten_expert_heads`, all key heads, all value heads.
    """
    stacked = _stacked(seeds)
    rows = stacked.shape[1]
    _check_heads(heads, kv_heads, rows, heads + 2 * kv_heads, "rows of qkv")
    width = rows // (heads + 2 * kv_heads)
    q, k, v = stacked.unflatten(1, (-1, width)).split([heads, kv_heads, kv_heads], dim=1)
    queries = flatten_expert_heads(q.unflatten(1, (kv_heads, heads // kv_heads)), 0, kv)
    if kv == "shared":
        keys, values = (mean(list(part)) for part in (k, v))
    else:
        keys, values = k.flatten(0, 1), v.flatten(0, 1)
    return torch.cat([queries, keys, values]).flatten(0, 1)


def upcycle_out(seeds: Sequence[Tensor], heads: int, kv_heads: int, kv: KeysValues) -> Tensor:
    """Merge `out.weight [D, H K]` of the seeds' softmax layers into that of attention experts, `[D, N H K]`.

    Columns: the query heads in the order of `flatten_expert_heads`.
    """
    stacked = _stacked(seeds)
    _check_heads(heads, kv_heads, stacked.shape[2], heads, "columns of out")
    by_head = stacked.movedim(0, 1).unflatten(2, (kv_heads, heads // kv_heads, -1))
    return flatten_expert_heads(by_head, 1, kv).flatten(1)


def _stacked(seeds: Sequence[Tensor]) -> Tensor:
    """Stack N tensors of one shape `[...]` to `[N, ...]`."""
    if not seeds:
        raise ValueError("upcycling: there are no seeds; pass the tensors of at least one")
    shapes = [list(seed.shape) for seed in seeds]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"upcycling: the seeds' shapes differ: {', '.join(map(str, shapes))}; use seeds of one shape")
    return torch.stack(list(seeds))


def _check_heads(heads: int, kv_heads: int, size: int, parts: int, what: str) -> None:
    if heads % kv_heads or size % parts:
        raise ValueError(
            f"upcycling: {size} {what} do not match {heads} query heads over {kv_heads} key/value heads; pass the "
            "heads of the seeds' layers"
        )
