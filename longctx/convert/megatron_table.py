"""Row table between the built-in model and Megatron-Core checkpoints.

A mixer's parameter that joins several projections or kinds of heads is several tensors in Megatron, `….0`, `….1`, …
(`longctx.mixers.tensor_parallel.head_shares`), split by rows or, for the output projection, by columns. A softmax layer
may be Megatron's own attention, whose `linear_qkv` is grouped by query group: queries, key, value. If all layers are
equal, Megatron stacks their tensors: `decoder.layers.mlp.linear_fc1.weight` is then `[layers, ...]`. Otherwise names
contain the layer's number; this table always uses numbered names.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from longctx.convert.row_table import RowRange, RowTable
from longctx.mixers.softmax import Softmax, SoftmaxConfig
from longctx.mixers.tensor_parallel import head_shares
from longctx.model.config import ModelConfig
from longctx.model.decoder import Block, Decoder

NORMS = {
    "mixer_norm.weight": ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    "ffn_norm.weight": ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
}
"""The norms of a layer and their possible names in Megatron: fused into the next linear layer, or standalone."""
FEED_FORWARD = {"ffn.gate_up.weight": "mlp.linear_fc1.weight", "ffn.down.weight": "mlp.linear_fc2.weight"}
OUTSIDE_LAYERS = {
    "embedding.weight": "embedding.word_embeddings.weight",
    "norm.weight": "decoder.final_layernorm.weight",
    "head.weight": "output_layer.weight",
}
LINEARS = ("mlp.linear_fc1", "mlp.linear_fc2")
"""The linear modules of every layer that have an `_extra_state`, which is empty without TransformerEngine."""
ATTENTION = ("self_attention.linear_qkv", "self_attention.linear_proj")
"""The linear modules of Megatron's own attention."""


@dataclass(frozen=True)
class LayerNames:
    """The variant and the norm names of a layer in a checkpoint."""

    own_attention: bool
    """Whether the mixer is Megatron's own attention."""
    norms: dict[str, str]


def layer_prefix(number: int) -> str:
    """Return the prefix of a layer's tensor names."""
    return f"decoder.layers.{number}."


def has_own_attention(config: ModelConfig, layer: int) -> bool:
    """Return whether a layer can be Megatron's own attention: softmax attention without routed heads."""
    return config.pattern[layer] == SoftmaxConfig.letter and config.routed_heads(layer) is None


def megatron_row_table(config: ModelConfig, vocab_size: int, layer_names: Callable[[int], LayerNames]) -> RowTable:
    """Return the row table of a model; `layer_names` returns the names of a layer, counted from 0."""
    with torch.device("meta"):
        decoder = Decoder(config, vocab_size)
    table = RowTable({name: tensor.shape for name, tensor in decoder.state_dict().items()})
    for ours, theirs in OUTSIDE_LAYERS.items():
        if ours != "head.weight" or not config.tie_embeddings:
            table.put(ours, theirs)
    for number, block in enumerate(decoder.blocks):
        assert isinstance(block, Block)
        names, ours_prefix, theirs_prefix = layer_names(number), f"blocks.{number}.", layer_prefix(number)
        for ours, theirs in (*names.norms.items(), *FEED_FORWARD.items()):
            table.put(ours_prefix + ours, theirs_prefix + theirs)
        if names.own_attention and has_own_attention(config, number):
            assert isinstance(block.mixer, Softmax)
            qkv = _query_groups(block.mixer, f"{theirs_prefix}self_attention.linear_qkv.weight")
            table.put(f"{ours_prefix}mixer.qkv.weight", *qkv)
            table.put(f"{ours_prefix}mixer.out.weight", f"{theirs_prefix}self_attention.linear_proj.weight")
            continue
        shares = head_shares(block.mixer)
        for name in block.mixer.state_dict():
            share = shares.get(name)
            parts = share.parts if share is not None and share.dim == 0 else ()
            # For a parameter with a matrix per head, the rows of all heads.
            rows_per_head = table.shape(f"{ours_prefix}mixer.{name}")[1:-1].numel()
            theirs = f"{theirs_prefix}self_attention.mixer.{name}"
            ranges = _row_parts(theirs, [length * rows_per_head for length in parts]) if len(parts) > 1 else (theirs,)
            table.put(f"{ours_prefix}mixer.{name}", *ranges, same_shape=True)
    return table


def split_columns(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a checkpoint splits by columns into `….0`, `….1`, …, with the width of each part."""
    widths: dict[str, tuple[int, ...]] = {}
    for number in range(config.depth):
        with torch.device("meta"):
            shares = head_shares(config.build_mixer(number))
        for name, share in shares.items():
            if share.dim == 1 and len(share.parts) > 1:
                widths[f"{layer_prefix(number)}self_attention.mixer.{name}"] = share.parts
    return widths


def part_name(name: str, number: int) -> str:
    """Return the name of one part of a split tensor."""
    return f"{name}.{number}"


def _row_parts(name: str, lengths: Sequence[int]) -> Iterator[RowRange]:
    return (RowRange(part_name(name, number), 0, length) for number, length in enumerate(lengths))


def _query_groups(mixer: Softmax, name: str) -> list[RowRange]:
    """Return the ranges of queries, keys and values in a matrix whose rows are grouped by query group."""
    width, queries = mixer.head_dim, mixer.heads // mixer.kv_heads
    group = (queries + 2) * width
    begins = range(0, mixer.kv_heads * group, group)
    ranges = [RowRange(name, begin, queries * width) for begin in begins]
    for head in (queries, queries + 1):
        ranges += [RowRange(name, begin + head * width, width) for begin in begins]
    return ranges
