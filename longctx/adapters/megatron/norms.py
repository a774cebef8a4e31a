"""LayerNorm and RMSNorm without TransformerEngine and Apex, for Megatron's sequence parallelism.

Megatron's own fallback (`WrappedTorchNorm`) does not support sequence parallelism.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.kernels.pointwise import rms_norm


class Norm(nn.Module):
    """LayerNorm or RMSNorm over channels, by `config.normalization`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        """Raises ValueError for another normalization, and for a zero-centered gamma."""
        super().__init__()
        if config.normalization not in ("LayerNorm", "RMSNorm"):
            raise ValueError(f"normalization is {config.normalization!r}: expected 'LayerNorm' or 'RMSNorm'")
        if config.layernorm_zero_centered_gamma:
            raise ValueError("layernorm_zero_centered_gamma: needs TransformerEngine or Apex")
        self.eps, self.rms = eps, config.normalization == "RMSNorm"
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        options = {"dtype": config.params_dtype, "device": device}
        self.weight = nn.Parameter(torch.ones(hidden_size, **options))
        self.bias = None if self.rms else nn.Parameter(torch.zeros(hidden_size, **options))
        for parameter in self.parameters():
            # Marks gradients that Megatron sums over the tensor-parallel ranks, each of which has a sequence slice.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., D]` over D."""
        if self.rms:
            return rms_norm(x, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
