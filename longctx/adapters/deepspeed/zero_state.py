"""ZeRO state of a model in float32: master weights, Adam moments and gradients, partitioned over ranks.

Reads and writes one full tensor at a time; every rank has to call every function.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor
from torch.nn import Parameter

from longctx.adapters.deepspeed.runtime import DeepSpeedModel

Moment = Literal["exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Moment, ...] = ("exp_avg", "exp_avg_sq")
"""Adam's moments."""


def full_gradient(parameter: Parameter) -> Tensor:
    """Return the full accumulated gradient, float32; valid after the last micro-batch, before the optimizer step."""
    gradient: Tensor = safe_get_full_grad(parameter)
    return gradient.float()


class ZeroState:
    """Master weights, Adam moments and step count of a model that DeepSpeed trains with torch's AdamW."""

    def __init__(self, wrapped: DeepSpeedModel) -> None:
        self._wrapped, self._stage = wrapped, wrapped.zero.stage
        self._zero_optimizer = wrapped.engine.optimizer
        """DeepSpeed's ZeRO optimizer from stage 1 on; torch's optimizer in stage 0."""

    def weight(self, parameter: Parameter) -> Tensor:
        """Return the full master weight, float32."""
        return parameter.detach() if self._stage == 0 else safe_get_full_fp32_param(parameter).detach()

    def set_weight(self, parameter: Parameter, value: Tensor) -> None:
        """Set the master weight. The forward pass uses it after `update_lp_params`; in stage 3 immediately."""
        if self._stage == 0:
            parameter.detach().copy_(value)
        elif self._stage < 3:
            safe_set_full_fp32_param(parameter, value.to(parameter.device))
        else:
            local = self._local_partition(parameter, value)
            safe_set_local_fp32_param(parameter, local)
            partition: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]  # of a stage-3 parameter
            partition.data.copy_(local)
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
                parameter.data.copy_(value)

    def update_lp_params(self) -> None:
        """Copy changed master weights to the low-precision parameters."""
        if self._stage in (1, 2):
            self._zero_optimizer.update_lp_params()

    def moment(self, parameter: Parameter, name: Moment) -> Tensor:
        """Return one of Adam's moments, full, float32; call `init_moments` first."""
        if self._stage == 0:
            state: Tensor = self._wrapped.optimizer.state[parameter][name]
            return state
        return safe_get_full_optimizer_state(parameter, name).detach()

    def set_moment(self, parameter: Parameter, name: Moment, value: Tensor) -> None:
        """Set one of Adam's moments from the full tensor."""
        if self._stage == 0:
            self._wrapped.optimizer.state[parameter][name].copy_(value)
        elif self._stage < 3:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), name)
        else:
            safe_set_local_optimizer_state(parameter, self._local_partition(parameter, value), name)

    def _local_partition(self, parameter: Parameter, value: Tensor) -> Tensor:
        """Return this rank's stage-3 partition of a full tensor: equal flat shards, the last ones zero-padded."""
        partition: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        size = partition.numel()
        rank = torch.distributed.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
        local = value.flatten()[rank * size : (rank + 1) * size]
        return torch.nn.functional.pad(local, (0, size - local.numel()))

    def _flat_partitions(self) -> Iterable[Tensor]:
        """Return the tensors that torch's optimizer steps: this rank's partitions, many parameters in one tensor."""
        if self._stage == 3:
            flat: list[Tensor] = self._zero_optimizer.fp32_partitioned_groups_flat
            return flat
        return [p for group in self._wrapped.optimizer.param_groups for p in group["params"]]

    @property
    def steps(self) -> float:
        """Optimizer steps that the moments have seen."""
        steps = {float(state["step"]) for state in self._wrapped.optimizer.state.values() if state}
        assert len(steps) <= 1, steps
        return steps.pop() if steps else 0.0

    def init_moments(self) -> None:
        """Create zero moments if there has been no optimizer step yet."""
        states = self._wrapped.optimizer.state
        for flat in self._flat_partitions():
            if not states.get(flat):
                states[flat] = {"step": torch.zeros((), device=flat.device)}
                states[flat] |= {name: torch.zeros_like(flat, requires_grad=False) for name in MOMENTS}
        if self._stage in (1, 2):
            # DeepSpeed links all parameters to their moments once its first group has stepped, when the moments of the
            # other groups do not exist yet.
            self._zero_optimizer._hp_optimizer_states_linked = False
            self._zero_optimizer._lazy_init_hp_params_optimizer_state()

    def set_steps(self, steps: float) -> None:
        """Set the number of optimizer steps that the moments have seen."""
        for state in self._wrapped.optimizer.state.values():
            state["step"].fill_(steps)
