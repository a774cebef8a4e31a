"""CUDA in the host code of kernels: Triton where it is installed, the device of a launch, copies of host tensors."""

import importlib
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@cache
def import_triton(module: str) -> ModuleType | None:
    """Import a module of Triton kernels; None where Triton is not installed."""
    return None if importlib.util.find_spec("triton") is None else importlib.import_module(module)


def launch_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one, on which Triton launches; nothing for other devices.

    Tensors of another device than the current one would otherwise be read by a kernel that runs on the current one.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on a device, copied from pinned memory without synchronizing; the tensor itself on a CPU.

    Pinned memory is not reused before the copy is done: torch's host allocator records an event for it.
    """
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


class DeviceCopy:
    """A host tensor's copy on a device, made without synchronizing; for other devices than CUDA the tensor itself.

    Streams other than the one that made the copy wait for it once. A CUDA graph reads the copy's memory whenever it is
    replayed: what a graph has captured is kept for the life of the process.
    """

    _captured: "set[DeviceCopy]" = set()  # noqa: RUF012 - shared by all copies

    def __init__(self, host: Tensor, device: torch.device) -> None:
        """Start the copy. Raises RuntimeError while a CUDA graph is captured, whose first call would be this one."""
        self._device = device
        if device.type != "cuda":
            self._tensor = host
            return
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a CUDA graph captures the first call with these segments, whose bounds are not on the GPU yet: "
                    "call the layer once with the same layout before the capture"
                )
            self._tensor = to_device(host, device)
            self._ready = torch.cuda.Event()
            self._ready.record()
            self._streams = {torch.cuda.current_stream().cuda_stream}

    def tensor(self) -> Tensor:
        """Return the copy, for kernels on the current stream."""
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                self._prepare_stream()
        return self._tensor

    def _prepare_stream(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            # A capture begins after a synchronization of the device, and may not wait for events from before it.
            self._captured.add(self)
            return
        stream = torch.cuda.current_stream()
        if stream.cuda_stream not in self._streams:
            stream.wait_event(self._ready)
            self._tensor.record_stream(stream)
            self._streams.add(stream.cuda_stream)
