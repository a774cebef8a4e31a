"""Linear layers of transformers models over ranks: Gated DeltaNet, lightning attention and Mamba-2.

Each function replaces the `forward` of a transformers module, without a cache: the module keeps its parameters and
their names; convolution and recurrence run over ranks. Unsupported options of a module are refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.adapters.huggingface.attention import layout_of
from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.linear.additive import ADDITIVE
from longctx.kernels.linear.delta import DELTA
from longctx.layers.linear_attention import l2_norm
from longctx.parallel.layout import Layout
from longctx.parallel.linear.convolution import short_convolution
from longctx.parallel.linear.state_scan import state_scan


def _convolve(module: Any, x: Tensor, layout: Layout) -> Tensor:
    """Apply a module's `conv1d` and its activation."""
    if module.activation not in ("silu", "swish"):
        raise ValueError(f"{type(module).__name__}: activation is {module.activation!r}: expected 'silu' or 'swish'")
    weight = module.conv1d.weight.squeeze(1)
    return short_convolution(x, weight, module.conv1d.bias, layout, activation="silu")


def gated_delta(module: Any, hidden_states: Tensor, **arguments: Any) -> Tensor:
    """Forward of `Qwen3NextGatedDeltaNet`, `[B, T_local, D]` to the same."""
    layout = layout_of(arguments, module)
    q, k, v, z, b, a = module.fix_query_key_value_ordering(
        module.in_proj_qkvz(hidden_states), module.in_proj_ba(hidden_states)
    )
    mixed = _convolve(module, torch.cat([x.flatten(2) for x in (q, k, v)], dim=-1), layout)
    q, k, v = mixed.split([module.key_dim, module.key_dim, module.value_dim], dim=-1)
    q, k = (l2_norm(x.unflatten(-1, (-1, module.head_k_dim))) for x in (q, k))
    v = v.unflatten(-1, (-1, module.head_v_dim))
    dtype = accumulation_dtype(a.dtype)
    log_decay = -module.A_log.to(dtype).exp() * F.softplus(a.to(dtype) + module.dt_bias)
    q = q * module.head_k_dim**-0.5
    out, _ = state_scan(DELTA, q, k, v, (b.sigmoid(), log_decay), layout)
    normed = module.norm(out.reshape(-1, module.head_v_dim), z.reshape(-1, module.head_v_dim))
    return module.out_proj(normed.view(*out.shape[:2], -1))


def lightning(module: Any, hidden_states: Tensor, **arguments: Any) -> tuple[Tensor, None]:
    """Forward of `MiniMaxLightningAttention`, `[B, T_local, D]` to the same and no attention weights."""
    layout = layout_of(arguments, module)
    qkv = module.act_fn(module.qkv_proj(hidden_states)).unflatten(-1, (module.num_attention_heads, -1))
    q, k, v = qkv.split(module.head_dim, dim=-1)
    log_decay = -module.slope_rate.flatten().to(accumulation_dtype(q.dtype))
    out, _ = state_scan(ADDITIVE, q, k, v, (log_decay,), layout)
    gated = torch.sigmoid(module.output_gate(hidden_states)) * module.norm(out.flatten(2))
    return module.out_proj(gated), None


def mamba2(module: Any, hidden_states: Tensor, **arguments: Any) -> Tensor:
    """Forward of `Mamba2Mixer`, `[B, T_local, D]` to the same."""
    layout = layout_of(arguments, module)
    keys = module.n_groups * module.ssm_state_size
    gate, mixed, dt = module.in_proj(hidden_states).split(
        [module.intermediate_size, module.conv_dim, module.num_heads], dim=-1
    )
    x, k, q = _convolve(module, mixed, layout).split([module.intermediate_size, keys, keys], dim=-1)
    x = x.unflatten(-1, (module.num_heads, module.head_dim))
    k, q = (y.unflatten(-1, (module.n_groups, module.ssm_state_size)) for y in (k, q))
    dtype = accumulation_dtype(dt.dtype)
    dt = F.softplus(dt.to(dtype) + module.dt_bias).clamp(*module.time_step_limit)
    log_decay = -module.A_log.to(dtype).exp() * dt
    out, _ = state_scan(ADDITIVE, q, k, (x * dt[..., None]).to(x.dtype), (log_decay,), layout)
    out = out + x * module.D[:, None]
    return module.out_proj(module.norm(out.flatten(2), gate).to(hidden_states.dtype))


LINEAR: dict[str, Callable[..., Any]] = {
    "Qwen3NextGatedDeltaNet": gated_delta,
    "MiniMaxLightningAttention": lightning,
    "Mamba2Mixer": mamba2,
}
"""Forwards over ranks, by the class name of the module."""


def forward_over_ranks(module: nn.Module) -> Callable[..., Any] | None:
    """Return the forward over ranks of a linear layer, also one that FSDP has subclassed; None for other modules."""
    names = (kind.__name__ for kind in type(module).__mro__)
    return next((LINEAR[name] for name in names if name in LINEAR), None)
