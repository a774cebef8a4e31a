"""Float32 parameters in a bf16 DeepSpeed model, which has one dtype for all parameters.

DeepSpeed keeps the bfloat16 parameter and its float32 master weight; a layer marked `full_precision` computes with the
master weight.
"""

from typing import Any

import torch
from torch import Tensor, nn

from longctx.adapters.deepspeed.zero_state import ZeroState


class _UseMaster(torch.autograd.Function):
    """Returns `master`; the gradient goes to `parameter`, in its dtype."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, master: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return master.view_as(master)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


class FullPrecisionParameters:
    """Full float32 master weights, on every rank, of the layers marked `full_precision`; their forward uses them."""

    def __init__(self, model: nn.Module, state: ZeroState) -> None:
        """Register forward hooks. Call it after DeepSpeed's hooks are set, so that parameters are gathered before."""
        self._state = state
        self._masters: dict[nn.Module, dict[str, Tensor]] = {}
        for layer in model.modules():
            if getattr(layer, "full_precision", False):
                for module in layer.modules():
                    if list(module.parameters(recurse=False)) and module not in self._masters:
                        self._masters[module] = {}
                        module.register_forward_pre_hook(self._use_masters)
                        module.register_forward_hook(self._restore, always_call=True)

    def refresh(self) -> None:
        """Copy the master weights again after they have changed; every rank has to call it."""
        for module, masters in self._masters.items():
            for name, parameter in module.named_parameters(recurse=False):
                masters[name] = self._state.weight(parameter)

    def _use_masters(self, module: nn.Module, inputs: object) -> None:
        for name, master in self._masters[module].items():
            # Instance attributes take precedence over a module's parameters.
            module.__dict__[name] = _UseMaster.apply(module._parameters[name], master)  # type: ignore[no-untyped-call]

    def _restore(self, module: nn.Module, inputs: object, output: object) -> None:
        for name in self._masters[module]:
            module.__dict__.pop(name, None)
