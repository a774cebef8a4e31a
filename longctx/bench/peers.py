"""The peers: what others compute the same with, called as it is installed, on the same inputs.

On a CPU the lightning layer of Hugging Face's MiniMax, the chunk functions of its Mamba2 and Qwen3Next in torch
operators, and torch's own operators; on CUDA flash-linear-attention and torch's own. Nothing here is imported before a
peer is built.
"""

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.bench.kernels import EPS, Inputs, Subject, delta_scale

EXTRA = "pip install 'longctx[compare]'"
"""What installs the peers that are not torch's own."""


@dataclass(frozen=True)
class Peer:
    """Another implementation of the kernel of that name."""

    kernel: str
    title: str
    device: str
    """The type of the devices that it runs on."""
    build: Callable[[Inputs], Subject]
    """From the kernel's inputs, which it may keep or copy into the form that it takes."""
    package: str = "torch"
    distribution: str = "torch"
    """What the package is installed by."""

    def missing(self) -> str | None:
        """What keeps it from running here and how to mend that, or None."""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.distribution} is not installed; {EXTRA}"
        return None


class _MixedError(Exception):
    """Carries the mixed values out of a layer."""

    def __init__(self, mixed: Tensor) -> None:
        super().__init__()
        self.mixed = mixed


class _Leave(nn.Module):
    """Stands where the layer goes on with the mixed values, and leaves with them."""

    def forward(self, mixed: Tensor) -> Tensor:
        raise _MixedError(mixed)


def _minimax(inputs: Inputs) -> Subject:
    """The loop over blocks of `MiniMaxLightningAttention.forward`.

    The layer's own forward runs, from its fused q, k, v to where the loop's blocks are put together: the projection
    and the activation before it are identities, and the norm behind it leaves.
    """
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    q = inputs["q"]
    _, _, heads, head_dim = q.shape
    config = MiniMaxConfig(hidden_size=heads, num_attention_heads=heads, head_dim=head_dim, num_hidden_layers=1)
    layer = MiniMaxLightningAttention(config, 0)
    layer.qkv_proj, layer.act_fn, layer.norm = nn.Identity(), nn.Identity(), _Leave()
    slope = -inputs["log_decay"].view(-1, 1, 1)
    layer.slope_rate = slope
    layer.query_decay, layer.key_decay, layer.diagonal_decay = layer.decay_factors(slope)
    layer.to(q.dtype)
    # Interleaved by head, as the layer's projection gives them.
    leaves = {"qkv": torch.cat([q, inputs["k"], inputs["v"]], dim=-1).flatten(2)}

    def run(leaves: Inputs) -> Tensor:
        try:
            layer(leaves["qkv"], None, None)
        except _MixedError as left:
            return left.mixed.unflatten(2, (heads, head_dim))
        raise RuntimeError("MiniMax's lightning layer no longer normalises what its loop has mixed")

    def gradients(grads: Mapping[str, Tensor]) -> Inputs:
        parts = grads["qkv"].unflatten(2, (heads, -1)).chunk(3, dim=-1)
        return dict(zip(("q", "k", "v"), parts, strict=True))

    return Subject(leaves, run, gradients=gradients)


def _mamba2(inputs: Inputs) -> Subject:
    """The chunked scan of `Mamba2`: x times dt is our v, dt times A our logarithms (A = -1), B and C are k and q."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    # Unwrapped it is torch operators also where a package that runs on GPUs alone is installed.
    scan = inspect.unwrap(mamba2_chunk_scan)
    dt = inputs["log_decay"].neg()
    leaves = {"q": inputs["q"], "k": inputs["k"], "dt": dt, "x": inputs["v"] / dt[..., None]}
    a = -torch.ones(dt.shape[2], device=dt.device)

    def run(leaves: Inputs) -> Tensor:
        return scan(leaves["x"], leaves["dt"], a, leaves["k"], leaves["q"], chunk_size=256)

    def gradients(grads: Mapping[str, Tensor]) -> Inputs:
        return {"q": grads["q"], "k": grads["k"], "v": grads["x"] / dt.detach()[..., None]}

    return Subject(leaves, run, gradients=gradients)


def _qwen3_next(inputs: Inputs) -> Subject:
    """The chunked gated delta rule of `Qwen3Next`."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    rule = inspect.unwrap(torch_chunk_gated_delta_rule)

    def run(leaves: Inputs) -> Tensor:
        out, _ = rule(leaves["q"], leaves["k"], leaves["v"], g=leaves["log_decay"], beta=leaves["beta"])
        return out

    return Subject(inputs, run)


def _fla(inputs: Inputs, module: str, function: str) -> Subject:
    """A chunk function of flash-linear-attention."""
    call = getattr(importlib.import_module(f"fla.ops.{module}"), function)
    constant = "log_decay" in inputs and inputs["log_decay"].dim() == 1
    scale = delta_scale(inputs["q"]) if "beta" in inputs else 1.0

    def run(leaves: Inputs) -> Tensor:
        gates = {name: leaves[name] for name in ("beta",) if name in leaves}
        if "log_decay" in leaves:
            gates["g_gamma" if constant else "g"] = leaves["log_decay"]
        return call(leaves["q"], leaves["k"], leaves["v"], scale=scale, **gates)[0]

    return Subject(inputs, run, constants=frozenset({"log_decay"}) if constant else frozenset())


def _sdpa(inputs: Inputs) -> Subject:
    def run(leaves: Inputs) -> Tensor:
        q, k, v = (leaves[name].transpose(1, 2) for name in ("q", "k", "v"))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return Subject(inputs, run)


def _torch_rms_norm(inputs: Inputs) -> Subject:
    def run(leaves: Inputs) -> Tensor:
        return F.rms_norm(leaves["x"], leaves["weight"].shape, leaves["weight"], EPS)

    return Subject(inputs, run)


def _torch_gated_unit(inputs: Inputs) -> Subject:
    def run(leaves: Inputs) -> Tensor:
        gate, up = leaves["gate_up"].chunk(2, dim=-1)
        return F.silu(gate) * up

    return Subject(inputs, run)


_TRANSFORMERS = ("transformers", "transformers")
_FLA = ("fla", "flash-linear-attention")


def _fla_peer(kernel: str, module: str) -> Peer:
    function = f"chunk_{module}"
    return Peer(kernel, f"fla {function}", "cuda", partial(_fla, module=module, function=function), *_FLA)


def _torch_peers(device: str) -> list[Peer]:
    return [
        Peer("attention", "torch SDPA", device, _sdpa),
        Peer("rms-norm", "torch rms_norm", device, _torch_rms_norm),
        Peer("gated-unit", "torch silu, mul", device, _torch_gated_unit),
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
"""By kernel and type of device: at most one."""
