"""What DeepSpeed keeps of a parameter in float32, in parts on all ranks: its weight, its moments, its gradient.

Whole tensors pass through, one at a time; each function is called by every rank.
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

from longctx.adapters.deepspeed.runtime import Wrapped

Moment = Literal["exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Moment, ...] = ("exp_avg", "exp_avg_sq")
"""Adam's."""


def gradient(parameter: Parameter) -> Tensor:
    """The whole gradient of a step's batches, float32, after the last one and before the optimizer's step."""
    whole: Tensor = safe_get_full_grad(parameter)
    return whole.float()


class Partitions:
    """The weights and moments of a model that DeepSpeed trains with torch's AdamW."""

    def __init__(self, wrapped: Wrapped) -> None:
        self._wrapped, self._stage = wrapped, wrapped.zero.stage
        self._inner = wrapped.engine.optimizer
        """DeepSpeed's optimizer from stage 1 on; torch's in stage 0."""

    def weight(self, parameter: Parameter) -> Tensor:
        """The whole weight, float32."""
        return parameter.detach() if self._stage == 0 else safe_get_full_fp32_param(parameter).detach()

    def set_weight(self, parameter: Parameter, value: Tensor) -> None:
        """Change it; what is computed with follows at `publish`, except in stage 3, where it does at once."""
        if self._stage == 0:
            parameter.detach().copy_(value)
        elif self._stage < 3:
            safe_set_full_fp32_param(parameter, value.to(parameter.device))
        else:
            mine = self._mine(parameter, value)
            safe_set_local_fp32_param(parameter, mine)
            divided: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]  # of a parameter of stage 3
            divided.data.copy_(mine)
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
                parameter.data.copy_(value)

    def publish(self) -> None:
        """After weights were changed."""
        if self._stage in (1, 2):
            self._inner.update_lp_params()

    def moment(self, parameter: Parameter, name: Moment) -> Tensor:
        """One of Adam's moments, whole, float32; `begin_states` comes first."""
        if self._stage == 0:
            state: Tensor = self._wrapped.optimizer.state[parameter][name]
            return state
        return safe_get_full_optimizer_state(parameter, name).detach()

    def set_moment(self, parameter: Parameter, name: Moment, value: Tensor) -> None:
        """Change it."""
        if self._stage == 0:
            self._wrapped.optimizer.state[parameter][name].copy_(value)
        elif self._stage < 3:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), name)
        else:
            safe_set_local_optimizer_state(parameter, self._mine(parameter, value), name)

    def _mine(self, parameter: Parameter, value: Tensor) -> Tensor:
        """This rank's part of a whole tensor, as stage 3 divides it: equal parts, the last ones filled up with 0."""
        divided: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        size = divided.numel()
        rank = torch.distributed.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
        here = value.flatten()[rank * size : (rank + 1) * size]
        return torch.nn.functional.pad(here, (0, size - here.numel()))

    def _flat(self) -> Iterable[Tensor]:
        """What torch's optimizer steps: this rank's parts of all parameters, many in one."""
        if self._stage == 3:
            flat: list[Tensor] = self._inner.fp32_partitioned_groups_flat
            return flat
        return [p for group in self._wrapped.optimizer.param_groups for p in group["params"]]

    @property
    def steps(self) -> float:
        """Steps that the moments are of."""
        taken = {float(state["step"]) for state in self._wrapped.optimizer.state.values() if state}
        assert len(taken) <= 1, taken
        return taken.pop() if taken else 0.0

    def begin_states(self) -> None:
        """Make the moments, zero, where there has been no step yet."""
        states = self._wrapped.optimizer.state
        for flat in self._flat():
            if not states.get(flat):
                states[flat] = {"step": torch.zeros((), device=flat.device)}
                states[flat] |= {name: torch.zeros_like(flat, requires_grad=False) for name in MOMENTS}
        if self._stage in (1, 2):
            # It links parameters to their moments after its first group has stepped, those of the others to nothing.
            self._inner._hp_optimizer_states_linked = False
            self._inner._lazy_init_hp_params_optimizer_state()

    def set_steps(self, steps: float) -> None:
        """Say how many steps the moments are of."""
        for state in self._wrapped.optimizer.state.values():
            state["step"].fill_(steps)
