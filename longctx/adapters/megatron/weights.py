"""Parameter names of the built-in model for Megatron's parameters, with their tensor-parallel shards."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor

from longctx.adapters.megatron.language_model import LanguageModel
from longctx.convert.megatron_table import FEED_FORWARD, NORMS, OUTSIDE_LAYERS
from longctx.mixers.shares import Share
from longctx.parallel.mesh import Axis

_OF_LAYER = {megatron: name for name, megatron in FEED_FORWARD.items()} | {
    megatron[-1]: name for name, megatron in NORMS.items()
}
"""A layer's parameter names, Megatron's to the built-in model's; mixer parameters have the prefix
`self_attention.mixer.` in Megatron and `mixer.` in the built-in model."""
_MIXER = ("self_attention.mixer.", "mixer.")
_OUTSIDE = {megatron: name for name, megatron in OUTSIDE_LAYERS.items()}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")


class NamedShard(NamedTuple):
    """This rank's shard of a parameter."""

    name: str
    """In the built-in model."""
    parameter: Tensor
    share: Share | None
    """How tensor-parallel ranks shard it; None: replicated."""


def named_shards(model: LanguageModel, tp: int) -> Iterator[NamedShard]:
    """Yield every parameter of a pipeline stage, over `tp` tensor-parallel ranks."""
    for megatron, parameter in model.named_parameters():
        match = _LAYER.fullmatch(megatron)
        if match is None:
            name = _OUTSIDE[megatron]
            if name == "head.weight" and model.share_embeddings_and_output_weights:
                name = "embedding.weight"  # the last stage's copy of the first stage's embedding
            rows = Share(0, (len(parameter) * tp,))
            yield NamedShard(name, parameter, None if name == "norm.weight" else rows)
            continue
        layer, rest = model.decoder.layers[int(match[1])], match[2]
        name = _OF_LAYER[rest] if rest in _OF_LAYER else _MIXER[1] + rest.removeprefix(_MIXER[0])
        share = layer.self_attention.shares.get(rest.removeprefix(_MIXER[0]))
        if rest == "mlp.linear_fc1.weight":
            share = Share(0, (len(parameter) * tp // 2,) * 2)
        elif rest == "mlp.linear_fc2.weight":
            share = Share(1, (parameter.shape[1] * tp,))
        yield NamedShard(f"blocks.{layer.layer_number - 1}.{name}", parameter, share)


def mark_tensor_parallel(model: LanguageModel, tp: int) -> None:
    """Set Megatron's `tensor_model_parallel` attributes on sharded parameters.

    Megatron's layers set them when they initialise a parameter, which is skipped here; without them the gradient norm
    would count only one rank's shard.
    """
    for shard in named_shards(model, tp):
        if shard.share is not None and not hasattr(shard.parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(shard.parameter, True, shard.share.dim, 1)


@torch.no_grad()
def set_parameters(model: LanguageModel, tp: Axis, full_tensor: Callable[[str], Tensor]) -> None:
    """Set every parameter to this rank's shard of `full_tensor(name)`, by its name in the built-in model."""
    for shard in named_shards(model, tp.size):
        value = full_tensor(shard.name)
        if shard.share is not None:
            value = shard.share.shard(value, tp.rank, tp.size)
        shard.parameter.copy_(value)
