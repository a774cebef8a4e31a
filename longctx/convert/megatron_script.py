"""What Megatron's script has to be told of a model whose weights `longctx.convert.megatron` writes: a spec of its
layers, and arguments."""

from longctx.config import Config
from longctx.convert.megatron_table import has_own_attention
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.config import ModelConfig
from longctx.model.ffn import SwigluConfig

SPEC = "mine"
"""What the spec is called."""


def script_spec(model: ModelConfig) -> str:
    """A module of Python that names the spec of the model's layers `mine`, for `--spec`: softmax layers whose heads are
    all read are Megatron's own attention, all others have the options that they have in the model."""
    used: dict[str, Config] = {}
    for layer, letter in enumerate(model.pattern):
        if not has_own_attention(model, layer):
            used[letter] = model.mixer(layer)
    said = [*used.values(), *([] if model.heads is None else [model.heads])]
    imported = sorted({(type(config).__module__, type(config).__name__) for config in said})
    lines = ["from longctx.adapters.megatron.specs import layer_spec"]
    lines += [f"from {module} import {name}" for module, name in imported]
    lines += ["", f"{SPEC} = layer_spec(", f"    {model.layers!r},"]
    if used:
        lines += [
            "    mixers={",
            *(f"        {letter!r}: {_said(config)}," for letter, config in used.items()),
            "    },",
        ]
    if model.heads is not None:
        lines.append(f"    heads={_said(model.heads)},")
    return "\n".join([*lines, ")"])


def _said(config: Config) -> str:
    """A configuration as Python, what is not the default."""
    options = ", ".join(f"{key}={value!r}" for key, value in config.model_dump(exclude_defaults=True).items())
    return f"{type(config).__name__}({options})"


def script_arguments(model: ModelConfig) -> str:
    """The arguments that say the rest of the model: widths, norms, and what Megatron's own attention is, where there is
    some."""
    ffn = model.feed_forward(0)
    assert isinstance(ffn, SwigluConfig)
    said = f"--num-layers {model.depth} --hidden-size {model.dim} --ffn-hidden-size {ffn.width(model.dim)}"
    said += f" --swiglu --disable-bias-linear --normalization RMSNorm --norm-epsilon {model.norm_eps}"
    softmax: SoftmaxConfig | None = getattr(model, SoftmaxConfig.name)
    if softmax is not None and any(has_own_attention(model, layer) for layer in range(model.depth)):
        width, groups = softmax.head_dim or model.dim // softmax.heads, softmax.kv_heads or softmax.heads
        said += f" --num-attention-heads {softmax.heads} --kv-channels {width}"
        said += f" --group-query-attention --num-query-groups {groups}" if groups != softmax.heads else ""
        said += f" --position-embedding-type rope --rotary-base {softmax.rope_theta:.0f}"
        said += f" --rotary-percent {softmax.rotary_dim / width}" if softmax.rotary_dim else ""
        said += " --use-rope-scaling" if softmax.rope_scaling else ""
        said += f" --window-size {softmax.window - 1},0" if softmax.window else ""
    else:
        # The script asks for heads, and by default it adds positions to embeddings.
        heads = getattr(model.mixer(0), "heads", 1)
        said += f" --num-attention-heads {heads} --kv-channels {max(1, model.dim // heads)}"
        said += " --position-embedding-type none"
    return said if model.tie_embeddings else f"{said} --untie-embeddings-and-output-weights"
