"""Peer implementations: the same kernels in other libraries, as installed, on the same inputs.

On CPU: the lightning attention of Hugging Face's MiniMax, the chunked torch implementations of its Mamba2 and
Qwen3Next, and torch's own operators. On CUDA: flash-linear-attention and torch's own operators. Peer libraries are
imported only when a peer is built.
"""

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.bench.kernels import EPS, Inputs, Workload, delta_scale

EXTRA = "pip install -e '.[compare]'"
"""The command that installs the peers outside torch."""


@dataclass(frozen=True)
class Peer:
    """Another library's implementation of `kernel`."""

    kernel: str
    title: str
    device: str
    """Type of the devices that it runs on."""
    build: Callable[[Inputs], Workload]
    """Makes the workload from the kernel's inputs, converting them to the peer's format where necessary."""
    package: str = "torch"
    distribution: str = "torch"
    """Name of the package on PyPI."""

    def missing(self) -> str | None:
        """Return why the peer cannot run here and how to install it, or None."""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.distribution} is not installed; {EXTRA}"
        return None


class _InterceptedError(Exception):
    """Carries the attention output out of a layer's forward pass."""

    def __init__(self, mixed: Tensor) -> None:
        super().__init__()
        self.mixed = mixed


class _Intercept(nn.Module):
    """Replaces the module that follows attention and ends the forward pass with its input."""

    def forward(self, mixed: Tensor) -> Tensor:
        raise _InterceptedError(mixed)


def _minimax(inputs: Inputs) -> Workload:
    """Build the block loop of `MiniMaxLightningAttention.forward`.

    The layer's own forward pass runs from the fused q, k, v to the concatenated output of the loop: the projection and
    activation before the loop are replaced by identities, and the norm after it by an intercept.
    """
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    q = inputs["q"]
    _, _, heads, head_dim = q.shape
    config = MiniMaxConfig(hidden_size=heads, num_attention_heads=heads, head_dim=head_dim, num_hidden_layers=1)
    layer = MiniMaxLightningAttention(config, 0)
    layer.qkv_proj, layer.act_fn, layer.norm = nn.Identity(), nn.Identity(), _Intercept()
    slope = -inputs["log_decay"].view(-1, 1, 1)
    layer.slope_rate = slope
    layer.query_decay, layer.key_decay, layer.diagonal_decay = layer.decay_factors(slope)
    layer.to(q.dtype)
    # Interleaved by head, as the layer's projection outputs them.
    leaves = {"qkv": torch.cat([q, inputs["k"], inputs["v"]], dim=-1).flatten(2)}

    def run(leaves: Inputs) -> Tensor:
        try:
            layer(leaves["qkv"], None, None)
        except _InterceptedError as intercepted:
            return intercepted.mixed.unflatten(2, (heads, head_dim))
        raise RuntimeError("MiniMax's lightning layer no longer applies a norm to the output of its loop")

    def gradients(grads: Mapping[str, Tensor]) -> Inputs:
        parts = grads["qkv"].unflatten(2, (heads, -1)).chunk(3, dim=-1)
        return dict(zip(("q", "k", "v"), parts, strict=True))

    return Workload(leaves, run, gradients=gradients)


def _mamba2(inputs: Inputs) -> Workload:
    """Build the chunked scan of `Mamba2`: x dt is our v, A dt our log decay (A = -1), B and C are k and q."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    # Unwrapped, to get the torch implementation even if a GPU-only kernel package is installed.
    scan = inspect.unwrap(mamba2_chunk_scan)
    dt = inputs["log_decay"].neg()
    leaves = {"q": inputs["q"], "k": inputs["k"], "dt": dt, "x": inputs["v"] / dt[..., None]}
    a = -torch.ones(dt.shape[2], device=dt.device)

    def run(leaves: Inputs) -> Tensor:
        return scan(leaves["x"], leaves["dt"], a, leaves["k"], leaves["q"], chunk_size=256)

    def gradients(grads: Mapping[str, Tensor]) -> Inputs:
        return {"q": grads["q"], "k": grads["k"], "v": grads["x"] / dt.detach()[..., None]}

    return Workload(leaves, run, gradients=gradients)


def _qwen3_next(inputs: Inputs) -> Workload:
    """Build the chunked gated delta rule of `Qwen3Next`."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    rule = inspect.unwrap(torch_chunk_gated_delta_rule)

    def run(leaves: Inputs) -> Tensor:
        out, _ = rule(leaves["q"], leaves["k"], leaves["v"], g=leaves["log_decay"], beta=leaves["beta"])
        return out

    return Workload(inputs, run)


def _fla(inputs: Inputs, module: str, function: str) -> Workload:
    """Build a chunkwise kernel of flash-linear-attention."""
    call = getattr(importlib.import_module(f"fla.ops.{module}"), function)
    constant = "log_decay" in inputs and inputs["log_decay"].dim() == 1
    scale = delta_scale(inputs["q"]) if "beta" in inputs else 1.0

    def run(leaves: Inputs) -> Tensor:
        gates = {name: leaves[name] for name in ("beta",) if name in leaves}
        if "log_decay" in leaves:
            gates["g_gamma" if constant else "g"] = leaves["log_decay"]
        return call(leaves["q"], leaves["k"], leaves["v"], scale=scale, **gates)[0]

    return Workload(inputs, run, constants=frozenset({"log_decay"}) if constant else frozenset())


def _sdpa(inputs: Inputs) -> Workload:
    def run(leaves: Inputs) -> Tensor:
        q, k, v = (leaves[name].transpose(1, 2) for name in ("q", "k", "v"))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return Workload(inputs, run)


def _torch_rms_norm(inputs: Inputs) -> Workload:
    def run(leaves: Inputs) -> Tensor:
        return F.rms_norm(leaves["x"], leaves["weight"].shape, leaves["weight"], EPS)

    return Workload(inputs, run)


def _torch_swiglu(inputs: Inputs) -> Workload:
    def run(leaves: Inputs) -> Tensor:
        gate, up = leaves["gate_up"].chunk(2, dim=-1)
        return F.silu(gate) * up

    return Workload(inputs, run)


_TRANSFORMERS = ("transformers", "transformers")
_FLA = ("fla", "flash-linear-attention")


def _fla_peer(kernel: str, module: str) -> Peer:
    function = f"chunk_{module}"
    return Peer(kernel, f"fla {function}", "cuda", partial(_fla, module=module, function=function), *_FLA)


def _torch_peers(device: str) -> list[Peer]:
    return [
        Peer("attention", "torch SDPA", device, _sdpa),
        Peer("rms-norm", "torch rms_norm", device, _torch_rms_norm),
        Peer("swiglu", "torch silu, mul", device, _torch_swiglu),
    ]


_ALL = (
    Peer("lightning", "HF MiniMax", "cpu", _minimax, *_TRANSFORMERS),
    Peer("simple-gla", "HF Mamba2", "cpu", _mamba2, *_TRANSFORMERS),
    Peer("gated-deltanet", "HF Qwen3Next", "cpu", _qwen3_next, *_TRANSFORMERS),
    *_torch_peers("cpu"),
    _fla_peer("lightning", "simple_gla"),
    _fla_peer("simple-gla", "simple_gla"),
    _fla_peer("gla", "gla"),
    _fla_peer("deltanet", "delta_rule"),
    _fla_peer("gated-deltanet", "gated_delta_rule"),
    _fla_peer("kda", "kda"),
    *_torch_peers("cuda"),
)
PEERS = {(peer.kernel, peer.device): peer for peer in _ALL}
"""Peers by (kernel, device type)."""
