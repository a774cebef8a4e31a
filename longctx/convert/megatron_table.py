"""Where the tensors of the built-in model lie in a checkpoint of Megatron-Core's.

A mixer's parameter that several projections or kinds of heads lie in is several tensors there, `….0`, `….1`, ...
(`longctx.mixers.tensor_parallel.divisions`): rows one after the other, or, of the matrix behind heads, columns side by
side. A softmax layer may be Megatron's own attention, whose `linear_qkv` has for each group of heads its queries, its
key and its value. Where all layers are alike, Megatron stacks each of their tensors:
`decoder.layers.mlp.linear_fc1.weight` is then `[layers, ...]`; else a layer has its number in the name, which this
table always has.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from longctx.convert.row_table import RowTable, Run
from longctx.mixers.softmax import Softmax, SoftmaxConfig
from longctx.mixers.tensor_parallel import divisions
from longctx.model.config import ModelConfig
from longctx.model.decoder import Block, Decoder

NORMS = {
    "mixer_norm.weight": ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    "ffn_norm.weight": ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
}
"""The norms of a layer, and what they may be called there: as part of the layer behind, or by themselves."""
FEED_FORWARD = {"ffn.gate_up.weight": "mlp.linear_fc1.weight", "ffn.down.weight": "mlp.linear_fc2.weight"}
WHOLE = {
    "embedding.weight": "embedding.word_embeddings.weight",
    "norm.weight": "decoder.final_layernorm.weight",
    "head.weight": "output_layer.weight",
}
LINEARS = ("mlp.linear_fc1", "mlp.linear_fc2")
"""The linear layers of every layer that have an `_extra_state`, which is empty without TransformerEngine."""
ATTENTION = ("self_attention.linear_qkv", "self_attention.linear_proj")
"""Those of Megatron's own attention."""


@dataclass(frozen=True)
class Layer:
    """How a layer's tensors are called."""

    own_attention: bool
    """Whether it is Megatron's own attention."""
    norms: dict[str, str]


def layer_prefix(number: int) -> str:
    """What names of a layer's tensors begin with."""
    return f"decoder.layers.{number}."


def has_own_attention(config: ModelConfig, layer: int) -> bool:
    """Whether a layer's mixer can be Megatron's own attention: softmax attention whose heads are read by all tokens."""
    return config.pattern[layer] == SoftmaxConfig.letter and config.routed_heads(layer) is None


def table(config: ModelConfig, rows: int, layer: Callable[[int], Layer]) -> RowTable:
    """Where the tensors of a model, with `rows` in its vocabulary, lie; `layer` says how those of a layer, counted from
    0, are called."""
    with torch.device("meta"):
        decoder = Decoder(config, rows)
    found = RowTable({name: tensor.shape for name, tensor in decoder.state_dict().items()})
    for ours, theirs in WHOLE.items():
        if ours != "head.weight" or not config.tie_embeddings:
            found.put(ours, theirs)
    for number, block in enumerate(decoder.blocks):
        assert isinstance(block, Block)
        how, prefix, there = layer(number), f"blocks.{number}.", layer_prefix(number)
        for ours, theirs in (*how.norms.items(), *FEED_FORWARD.items()):
            found.put(prefix + ours, there + theirs)
        if how.own_attention and has_own_attention(config, number):
            assert isinstance(block.mixer, Softmax)
            found.put(f"{prefix}mixer.qkv.weight", *_of_groups(block.mixer, f"{there}self_attention.linear_qkv.weight"))
            found.put(f"{prefix}mixer.out.weight", f"{there}self_attention.linear_proj.weight")
            continue
        shares = divisions(block.mixer)
        for name in block.mixer.state_dict():
            share = shares.get(name)
            parts = share.parts if share is not None and share.dim == 0 else ()
            # Of a matrix for each head the rows of all of them.
            rows_of_one = found.shape(f"{prefix}mixer.{name}")[1:-1].numel()
            theirs = f"{there}self_attention.mixer.{name}"
            runs = _parts(theirs, [length * rows_of_one for length in parts]) if len(parts) > 1 else (theirs,)
            found.put(f"{prefix}mixer.{name}", *runs, alike=True)
    return found


def columns(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that the table has whole and a checkpoint as several, `….0`, `….1`, side by side: their columns."""
    found: dict[str, tuple[int, ...]] = {}
    for number in range(config.depth):
        with torch.device("meta"):
            shares = divisions(config.build_mixer(number))
        for name, share in shares.items():
            if share.dim == 1 and len(share.parts) > 1:
                found[f"{layer_prefix(number)}self_attention.mixer.{name}"] = share.parts
    return found


def part(name: str, number: int) -> str:
    """What one of several tensors is called."""
    return f"{name}.{number}"


def _parts(name: str, lengths: Sequence[int]) -> Iterator[Run]:
    return (Run(part(name, number), 0, length) for number, length in enumerate(lengths))


def _of_groups(mixer: Softmax, name: str) -> list[Run]:
    """Queries, keys and values as they lie group by group."""
    width, queries = mixer.head_dim, mixer.heads // mixer.kv_heads
    group = (queries + 2) * width
    begins = range(0, mixer.kv_heads * group, group)
    runs = [Run(name, begin, queries * width) for begin in begins]
    for place in (queries, queries + 1):
        runs += [Run(name, begin + place * width, width) for begin in begins]
    return runs
