"""Layer spec and command-line arguments for Megatron's script, for weights written by `longctx.convert.megatron`."""

from longctx.config import Config
from longctx.convert.megatron_table import has_own_attention
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.config import ModelConfig
from longctx.model.ffn import SwigluConfig

SPEC = "mine"
"""Name of the spec in its module."""


def script_spec(model: ModelConfig) -> str:
    """Return the source of a Python module that defines the layer spec `mine`, for `--spec`. Softmax layers whose heads
    are all active use Megatron's own attention; all other layers have their options in the model."""
    used: dict[str, Config] = {}
    for layer, letter in enumerate(model.pattern):
        if not has_own_attention(model, layer):
            used[letter] = model.mixer(layer)
    configs = [*used.values(), *([] if model.heads is None else [model.heads])]
    imported = sorted({(type(config).__module__, type(config).__name__) for config in configs})
    lines = ["from longctx.adapters.megatron.specs import layer_spec"]
    lines += [f"from {module} import {name}" for module, name in imported]
    lines += ["", f"{SPEC} = layer_spec(", f"    {model.layers!r},"]
    if used:
        lines += [
            "    mixers={",
            *(f"        {letter!r}: {_source(config)}," for letter, config in used.items()),
            "    },",
        ]
    if model.heads is not None:
        lines.append(f"    heads={_source(model.heads)},")
    return "\n".join([*lines, ")"])


def _source(config: Config) -> str:
    """Return a configuration as a Python expression, without defaults."""
    options = ", ".join(f"{key}={value!r}" for key, value in config.model_dump(exclude_defaults=True).items())
    return f"{type(config).__name__}({options})"


def script_arguments(model: ModelConfig) -> str:
    """Return the arguments for the rest of the model: widths, norms and, if used, Megatron's own attention."""
    ffn = model.feed_forward(0)
    assert isinstance(ffn, SwigluConfig)
    arguments = f"--num-layers {model.depth} --hidden-size {model.dim} --ffn-hidden-size {ffn.width(model.dim)}"
    arguments += f" --swiglu --disable-bias-linear --normalization RMSNorm --norm-epsilon {model.norm_eps}"
    softmax: SoftmaxConfig | None = getattr(model, SoftmaxConfig.name)
    if softmax is not None and any(has_own_attention(model, layer) for layer in range(model.depth)):
        width, groups = softmax.head_dim or model.dim // softmax.heads, softmax.kv_heads or softmax.heads
        arguments += f" --num-attention-heads {softmax.heads} --kv-channels {width}"
        arguments += f" --group-query-attention --num-query-groups {groups}" if groups != softmax.heads else ""
        arguments += f" --position-embedding-type rope --rotary-base {softmax.rope_theta:.0f}"
        arguments += f" --rotary-percent {softmax.rotary_dim / width}" if softmax.rotary_dim else ""
        arguments += " --use-rope-scaling" if softmax.rope_scaling else ""
        arguments += f" --window-size {softmax.window - 1},0" if softmax.window else ""
    else:
        # The script requires a number of heads, and adds position embeddings by default.
        heads = getattr(model.mixer(0), "heads", 1)
        arguments += f" --num-attention-heads {heads} --kv-channels {max(1, model.dim // heads)}"
        arguments += " --position-embedding-type none"
    return arguments if model.tie_embeddings else f"{arguments} --untie-embeddings-and-output-weights"
