"""What Megatron's optimizers need where its own cases end.

Parameters of two dtypes in one group: its distributed optimizer (0.16 to 0.20) puts those in float32 first and goes on
counting as if it had not, so that checkpoints would have one parameter's moments under another's name. So does its
other optimizer of half precision, in more than one place: there such a save is refused.

Torch's Adam, which it takes where there is neither Apex nor TransformerEngine: that makes its state at the first step,
and counts steps for each parameter. Megatron reads the state before; its distributed optimizer does not expect the
count among what it fills, and gives all parameters one count together, which each of them would then raise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor


def count_both_dtypes() -> None:
    """From now on distributed optimizers know where parameters of two dtypes stand in a group, and others refuse to
    save them."""
    begin = DistributedOptimizer.__init__
    if hasattr(begin, "__wrapped__"):
        return

    @wraps(begin)
    def begin_and_count(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        groups = zip(getattr(self, "model_fp32_groups", ()), getattr(self, "model_float16_groups", ()), strict=True)
        for number, (exact, rounded) in enumerate(groups):
            for place, parameter in enumerate((*exact, *rounded)):
                self.model_param_group_index_map[parameter] = number, place

    DistributedOptimizer.__init__ = begin_and_count
    save = Float16OptimizerWithFloat16Params.sharded_state_dict

    @wraps(save)
    def save_of_one_dtype(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(self.fp32_from_fp32_groups):
            raise ValueError(
                "checkpoint: the optimizer has parameters in float32 beside those in half precision, which Megatron "
                "saves under each other's names: take the distributed optimizer (--use-distributed-optimizer)"
            )
        return save(self, *args, **kwargs)

    Float16OptimizerWithFloat16Params.sharded_state_dict = save_of_one_dtype


def _on_adam(optimizer: Any) -> Iterator[Any]:
    """The parts of a Megatron optimizer that step with torch's."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.Adam):
            yield part


@contextmanager
def moments(optimizer: Any) -> Iterator[None]:
    """Meanwhile a Megatron optimizer that made no step has the state that it makes at its first one."""
    parts = list(_on_adam(optimizer))
    for part in parts:
        for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
            empty = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            part.optimizer.state[parameter] = {"step": torch.zeros(()), **empty}
    try:
        yield
    finally:
        for part in parts:
            part.optimizer.state.clear()


def load_optimizer(optimizer: Any, loaded: Any) -> None:
    """Load a state that was read from a checkpoint."""
    for part in _on_adam(optimizer):
        if hasattr(part, "_set_main_param_and_optimizer_states"):
            _keep_count(part)
    optimizer.load_state_dict(loaded)
    for part in _on_adam(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def _keep_count(part: Any) -> None:
    """Have a distributed optimizer leave the count of steps, which it has set by then, as it is."""
    fill_in = part._set_main_param_and_optimizer_states

    def fill_all_but_the_count(model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, place = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][place]]
        fill_in(model_param, {"step": state["step"], **tensors})

    part._set_main_param_and_optimizer_states = fill_all_but_the_count
