"""Fixes for Megatron's optimizers: parameters of two dtypes in one group, and checkpoints with torch's Adam.

Two dtypes in one parameter group: the distributed optimizer (0.16 to 0.20) puts float32 parameters first but numbers
them as if it had not, so checkpoints would have one parameter's moments under another's name. The other half-precision
optimizer has the same fault in several places; there, saving is refused.

Padding between buckets: a checkpoint of the format `fully_reshardable` reads parameters at their offsets in the padded
buffer from tensors without the padding at the end of each bucket (seen in 0.16.1). With several buckets, as the first
and the last pipeline stage have where embedding and head share a matrix, parameters would be saved shifted.

Torch's Adam, which Megatron uses without Apex and TransformerEngine: it creates its state at the first step and has a
step count per parameter. Megatron reads the state before the first step; its distributed optimizer does not expect the
step count among the state that it fills, and shares one count tensor among all parameters, which each would increment.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor


def fix_mixed_dtype_groups() -> None:
    """Patch Megatron: the distributed optimizer numbers parameters of two dtypes correctly, the other refuses to save
    them."""
    init = DistributedOptimizer.__init__
    if hasattr(init, "__wrapped__"):
        return

    @wraps(init)
    def init_and_renumber(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        groups = zip(getattr(self, "model_fp32_groups", ()), getattr(self, "model_float16_groups", ()), strict=True)
        for number, (fp32, float16) in enumerate(groups):
            for index, parameter in enumerate((*fp32, *float16)):
                self.model_param_group_index_map[parameter] = number, index

    DistributedOptimizer.__init__ = init_and_renumber
    save = Float16OptimizerWithFloat16Params.sharded_state_dict

    @wraps(save)
    def save_one_dtype(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(self.fp32_from_fp32_groups):
            raise ValueError(
                "checkpoint: the optimizer has float32 and half-precision parameters, which Megatron saves under each "
                "other's names: use the distributed optimizer (--use-distributed-optimizer)"
            )
        return save(self, *args, **kwargs)

    Float16OptimizerWithFloat16Params.sharded_state_dict = save_one_dtype


def fix_bucket_padding() -> None:
    """Patch Megatron: the distributed optimizer's reshardable checkpoints have the padding of buckets where offsets of
    parameters count it. The checkpoints have none: they are per parameter."""
    collect = DistributedOptimizer.sharded_param_state_fully_reshardable
    if hasattr(collect, "__wrapped__"):
        return

    @wraps(collect)
    def collect_with_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _padding_counted(self.buffers):
            return collect(self, *args, **kwargs)

    DistributedOptimizer.sharded_param_state_fully_reshardable = collect_with_padding


@contextmanager
def _padding_counted(buffers: Sequence[Any]) -> Iterator[None]:
    """Make the unpadded sizes of buffers and buckets the padded ones inside the block."""
    sizes = [(each, each.grad_data.numel()) for buffer in buffers for each in (buffer, *buffer.buckets)]
    unpadded = [each.numel_unpadded for each, _ in sizes]
    try:
        for each, numel in sizes:
            each.numel_unpadded = numel
        yield
    finally:
        for (each, _), numel in zip(sizes, unpadded, strict=True):
            each.numel_unpadded = numel


def _with_torch_adam(optimizer: Any) -> Iterator[Any]:
    """Yield the chained optimizers of a Megatron optimizer that use torch's Adam."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.Adam):
            yield part


@contextmanager
def initialized_moments(optimizer: Any) -> Iterator[None]:
    """Give a Megatron optimizer that has taken no step zero moments inside the block, as loading expects."""
    parts = list(_with_torch_adam(optimizer))
    for part in parts:
        for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            part.optimizer.state[parameter] = {"step": torch.zeros(()), **zeros}
    try:
        yield
    finally:
        for part in parts:
            part.optimizer.state.clear()


def load_optimizer(optimizer: Any, state_dict: Any) -> None:
    """Load a Megatron optimizer's state from a checkpoint."""
    for part in _with_torch_adam(optimizer):
        if hasattr(part, "_set_main_param_and_optimizer_states"):
            _keep_step_count(part)
    optimizer.load_state_dict(state_dict)
    for part in _with_torch_adam(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def _keep_step_count(part: Any) -> None:
    """Make a distributed optimizer keep the step count, which it has already loaded, when it fills in the state."""
    set_states = part._set_main_param_and_optimizer_states

    def set_states_but_step(model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, index = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][index]]
        set_states(model_param, {"step": state["step"], **tensors})

    part._set_main_param_and_optimizer_states = set_states_but_step
