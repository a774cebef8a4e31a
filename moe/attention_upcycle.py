"""Attention experts made of dense layers' weights (upcycling; Zhang et al. 2024, BAM).

Every function takes the tensors that seeds, dense models of one shape, have under one name, an expert a seed, and gives
that of the mixture, in the seeds' dtype and on their device; a seed may stand several times. The arrangement, for
experts of H query heads over H_kv key/value heads of width K:

    kv = "each"    qkv rows: q of expert 0, 1, …, k of expert 0, 1, …, v of expert 0, 1, …
                   out columns: expert 0, 1, …
    kv = "shared"  qkv rows: of each key head the q that read it, of expert 0, 1, …, then the mean of the experts' k and
                   that of their v
                   out columns: in the order of q

The router's weights sum to 1: N equal seeds give what the seed does, whatever the router says.

Each function raises ValueError where the seeds' shapes differ or do not fit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.moe.attention_experts import KeysValues, side_by_side


def mean(seeds: Sequence[Tensor]) -> Tensor:
    """The mean of all seeds, of what the mixture has one of (norms, embeddings). Summed in float64, rounded once."""
    return _stacked(seeds).to(torch.float64).mean(dim=0).to(seeds[0].dtype)


def upcycled_qkv(seeds: Sequence[Tensor], heads: int, kv_heads: int, kv: KeysValues) -> Tensor:
    """`qkv.weight` of attention experts of `qkv.weight [(H + 2 H_kv) K, D]` of softmax layers with those heads each.

    `[(N H + 2 N H_kv) K, D]` where each expert keeps its keys and values, `[(N H + 2 H_kv) K, D]` where they share the
    mean of the seeds'. Rows: all query heads in the order of `side_by_side`, all key heads, all value heads.
    """
    stacked = _stacked(seeds)
    rows = stacked.shape[1]
    _check_heads(heads, kv_heads, rows, heads + 2 * kv_heads, "rows of qkv")
    width = rows // (heads + 2 * kv_heads)
    q, k, v = stacked.unflatten(1, (-1, width)).split([heads, kv_heads, kv_heads], dim=1)
    queries = side_by_side(q.unflatten(1, (kv_heads, heads // kv_heads)), 0, kv)
    if kv == "shared":
        keys, values = (mean(list(part)) for part in (k, v))
    else:
        keys, values = k.flatten(0, 1), v.flatten(0, 1)
    return torch.cat([queries, keys, values]).flatten(0, 1)


def upcycled_out(seeds: Sequence[Tensor], heads: int, kv_heads: int, kv: KeysValues) -> Tensor:
    """`out.weight [D, N H K]` of attention experts of `out.weight [D, H K]` of softmax layers with those heads each.

    Columns: the query heads in the order of `side_by_side`.
    """
    stacked = _stacked(seeds)
    _check_heads(heads, kv_heads, stacked.shape[2], heads, "columns of out")
    by_head = stacked.movedim(0, 1).unflatten(2, (kv_heads, heads // kv_heads, -1))
    return side_by_side(by_head, 1, kv).flatten(1)


def _stacked(seeds: Sequence[Tensor]) -> Tensor:
    """`[N, ...]`, of N tensors `[...]`."""
    if not seeds:
        raise ValueError("upcycling: no seed was given; give the tensors of one seed at least")
    shapes = [list(seed.shape) for seed in seeds]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"upcycling: the seeds' shapes differ: {', '.join(map(str, shapes))}; take seeds of one model")
    return torch.stack(list(seeds))


def _check_heads(heads: int, kv_heads: int, size: int, parts: int, what: str) -> None:
    if heads % kv_heads or size % parts:
        raise ValueError(
            f"upcycling: {size} {what} are not those of {heads} query heads over {kv_heads} key/value heads; give the "
            "heads of the seeds' layers"
        )
