"""Parameters that are computed with in float32 in a bf16 model of DeepSpeed's, which has one dtype for all of them.

DeepSpeed keeps the bfloat16 parameter and its float32 master, and the layer is lent the master while it computes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from longctx.adapters.deepspeed.partitions import Partitions


class _Precise(torch.autograd.Function):
    """The value of `master`, and the gradient to `parameter`."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, master: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return master.view_as(master)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


class PreciseParameters:
    """The parameters of a model's layers that say `full_precision`: a copy of each master, on every rank."""

    def __init__(self, model: nn.Module, partitions: Partitions) -> None:
        """After DeepSpeed has set its own hooks on the model, so that parameters are there when these run."""
        self._partitions = partitions
        self._masters: dict[nn.Module, dict[str, Tensor]] = {}
        for layer in model.modules():
            if getattr(layer, "full_precision", False):
                for module in layer.modules():
                    if list(module.parameters(recurse=False)) and module not in self._masters:
                        self._masters[module] = {}
                        module.register_forward_pre_hook(self._lend)
                        module.register_forward_hook(self._take_back, always_call=True)

    def refresh(self) -> None:
        """After weights have changed; every rank calls it."""
        for module, masters in self._masters.items():
            for name, parameter in module.named_parameters(recurse=False):
                masters[name] = self._partitions.weight(parameter)

    def _lend(self, module: nn.Module, inputs: object) -> None:
        for name, master in self._masters[module].items():
            # Looked up before the parameters of a module are.
            module.__dict__[name] = _Precise.apply(module._parameters[name], master)  # type: ignore[no-untyped-call]

    def _take_back(self, module: nn.Module, inputs: object, output: object) -> None:
        for name in self._masters[module]:
            module.__dict__.pop(name, None)
