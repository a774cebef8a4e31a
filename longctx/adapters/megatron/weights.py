"""The parameters of Megatron's model under the names that they have in the built-in one, and how ranks divide them."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor

from longctx.adapters.megatron.language_model import LanguageModel
from longctx.convert.megatron_table import FEED_FORWARD, NORMS, WHOLE
from longctx.mixers.shares import Share
from longctx.parallel.mesh import Axis

_OF_LAYER = {theirs: ours for ours, theirs in FEED_FORWARD.items()} | {names[-1]: ours for ours, names in NORMS.items()}
"""The names of a layer's parameters, Megatron's and ours; those of its mixer follow `self_attention.mixer.` there and
`mixer.` here."""
_MIXER = ("self_attention.mixer.", "mixer.")
_OUTSIDE = {theirs: ours for ours, theirs in WHOLE.items()}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")


class Placed(NamedTuple):
    """A parameter on a rank."""

    name: str
    """In the built-in model."""
    parameter: Tensor
    share: Share | None
    """How tensor-parallel ranks divide it; each has it whole where None."""


def parameters(model: LanguageModel, tp: int) -> Iterator[Placed]:
    """Every parameter of a pipeline's stage, over `tp` tensor-parallel ranks."""
    for name, parameter in model.named_parameters():
        match = _LAYER.fullmatch(name)
        if match is None:
            ours = _OUTSIDE[name]
            if ours == "head.weight" and model.share_embeddings_and_output_weights:
                ours = "embedding.weight"  # the last stage's copy of what the first one has
            rows = Share(0, (len(parameter) * tp,))
            yield Placed(ours, parameter, None if ours == "norm.weight" else rows)
            continue
        layer, rest = model.decoder.layers[int(match[1])], match[2]
        ours = _OF_LAYER[rest] if rest in _OF_LAYER else _MIXER[1] + rest.removeprefix(_MIXER[0])
        share = layer.self_attention.shares.get(rest.removeprefix(_MIXER[0]))
        if rest == "mlp.linear_fc1.weight":
            share = Share(0, (len(parameter) * tp // 2,) * 2)
        elif rest == "mlp.linear_fc2.weight":
            share = Share(1, (parameter.shape[1] * tp,))
        yield Placed(f"blocks.{layer.layer_number - 1}.{ours}", parameter, share)


def mark(model: LanguageModel, tp: int) -> None:
    """Say of each parameter whether ranks divide it, which Megatron's layers do as they draw it, and these are not
    drawn: the norm of the gradient would count what is divided once."""
    for placed in parameters(model, tp):
        if placed.share is not None and not hasattr(placed.parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(placed.parameter, True, placed.share.dim, 1)


@torch.no_grad()
def fill(model: LanguageModel, tp: Axis, whole: Callable[[str], Tensor]) -> None:
    """Fill every parameter with this rank's part of what `whole` gives for its name in the built-in model."""
    for placed in parameters(model, tp.size):
        value = whole(placed.name)
        if placed.share is not None:
            value = placed.share.of(value, tp.rank, tp.size)
        placed.parameter.copy_(value)
