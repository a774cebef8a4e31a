"""Megatron-Core on a CPU: what it asks of CUDA without need, answered.

It asks for the current device, streams and CUDA's random numbers on every path; on gloo ranks all of it may as well be
the CPU. Nothing here changes what is computed. Used by tests alone.
"""

import contextlib
import functools
import gc
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

_KINDS = {torch.bfloat16: "torch.cuda.BFloat16Tensor", torch.float16: "torch.cuda.HalfTensor"}


class _OnCpu(TorchFunctionMode):
    """`device="cuda"` is the CPU, nothing is pinned, and `.cuda()` is what it is called on."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1:
            # Gradients that are clipped have to be of CUDA and float32; tests have them in float64 too.
            return _KINDS.get(args[0].dtype, "torch.cuda.FloatTensor")
        if function is torch.Tensor.to and len(args) > 1 and str(args[1]).startswith("cuda"):
            args = (args[0], "cpu", *args[2:])
        return function(*args, **kwargs)


class _Stream:
    """Everything that is asked of it is done already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, other: Any) -> None:
        """Nothing is under way."""

    def wait_event(self, event: Any) -> None:
        """Nothing is under way."""

    def synchronize(self) -> None:
        """Nothing is under way."""

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


class _Event(_Stream):
    def record(self, stream: Any = None) -> None:
        """It has happened."""


def _as_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What is on the host already, as the counts that collectives take."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


@contextlib.contextmanager
def _stream(stream: Any) -> Iterator[None]:
    yield


def _forget_groups() -> None:
    """Let go of what holds process groups that are no longer used: cached methods, and models that hold themselves.

    Each group has threads, which wake a hundred times a second; a rank of the tests would collect thousands of them.
    """
    from megatron.core.distributed import DistributedDataParallel

    for module in [each for each in gc.get_objects() if type(each) is DistributedDataParallel]:
        # Hooks of its parameters hold it, in a circle through C++ that Python's collector does not see.
        vars(module).clear()
    for name, module in list(sys.modules.items()):
        if name.startswith(("megatron.core", "longctx.adapters.megatron")):
            owners = [module, *(value for value in vars(module).values() if isinstance(value, type))]
            for value in [value for owner in owners for value in vars(owner).values()]:
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()
    gc.collect()


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Inside it Megatron-Core runs on the CPU."""
    answers = {
        "current_device": lambda: "cpu",
        "Stream": _Stream,
        "Event": _Event,
        "stream": _stream,
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "synchronize": lambda device=None: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "is_current_stream_capturing": lambda: False,
        "empty_cache": lambda: None,
        "set_device": lambda device: None,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        from megatron.core.tensor_parallel import random as parallel_random

        states = {
            "_get_cuda_rng_state": lambda *_, **__: torch.get_rng_state(),
            "_set_cuda_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        }
        for name, answer in states.items():
            stack.enter_context(patch.object(parallel_random, name, answer))
        from megatron.core.transformer.moe import moe_utils, token_dispatcher

        stack.enter_context(patch.object(moe_utils, "te_general_gemm", None, create=True))
        stack.enter_context(patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", _as_numbers))
        stack.enter_context(_OnCpu())
        stack.callback(_forget_groups)
        yield
