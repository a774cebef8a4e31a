"""Launches and copies on CUDA devices, with stand-ins for torch.cuda."""

import ast
import importlib.util
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longctx.kernels.device import DeviceCopy, import_triton, launch_device, to_device

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


class Cuda:
    """What `torch.cuda` answers, and the order of what was asked of it."""

    def __init__(self):
        self.stream, self.capturing, self.devices, self.log = 1, False, [], []

    @contextmanager
    def device(self, device):
        self.devices.append(device)
        yield

    def current_stream(self):
        def waited(event):
            self.log.append(f"stream {self.stream} waits")

        return SimpleNamespace(cuda_stream=self.stream, wait_event=waited)

    def event(self):
        return SimpleNamespace(record=lambda: self.log.append(f"recorded on {self.stream}"))


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "device", cuda.device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: cuda.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", cuda.current_stream)
    monkeypatch.setattr(torch.cuda, "Event", cuda.event)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: cuda.log.append("pinned") or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, non_blocking: cuda.log.append("copied") or x.clone())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: cuda.log.append("kept for it"))
    monkeypatch.setattr(DeviceCopy, "_captured", set())
    return cuda


def test_triton_is_imported_only_where_it_is_installed(monkeypatch):
    load = import_triton.__wrapped__
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert load("longctx.kernels.linear.no_such_module") is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert load("longctx.kernels.linear.checks") is importlib.import_module("longctx.kernels.linear.checks")


def test_a_launch_makes_the_tensors_device_the_current_one(cuda):
    with launch_device(torch.device("cuda", 3)), launch_device(torch.device("cpu")):
        assert cuda.devices == [torch.device("cuda", 3)]


def test_batches_are_copied_from_pinned_memory_without_synchronizing(cuda):
    x = torch.arange(3)
    assert to_device(x, torch.device("cpu")) is x
    to_device(x, torch.device("cuda", 0))  # the stand-in for `to` takes non_blocking alone
    assert cuda.log == ["pinned", "copied"]


def test_on_a_cpu_a_copy_is_the_tensor_itself():
    x = torch.arange(3)
    assert DeviceCopy(x, torch.device("cpu")).tensor() is x


def test_other_streams_wait_once_for_the_copy(cuda):
    copy = DeviceCopy(torch.arange(3), torch.device("cuda", 0))
    assert cuda.log == ["pinned", "copied", "recorded on 1"]
    cuda.log.clear()
    copy.tensor()
    cuda.stream = 2
    first, second = copy.tensor(), copy.tensor()
    assert first is second
    assert cuda.log == ["stream 2 waits", "kept for it"]


def test_what_a_graph_captured_is_kept(cuda):
    copy = DeviceCopy(torch.arange(3), torch.device("cuda", 0))
    cuda.stream, cuda.capturing = 2, True
    cuda.log.clear()
    copy.tensor()
    assert cuda.log == []
    assert DeviceCopy._captured == {copy}


def test_a_first_call_inside_a_capture_is_refused(cuda):
    cuda.capturing = True
    with pytest.raises(RuntimeError, match="once with the same layout before the capture"):
        DeviceCopy(torch.arange(3), torch.device("cuda", 0))


def launches(file: Path):
    """Line numbers of `kernel[grid](...)`, and the ranges of lines inside `with launch_device(...)`."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Subscript(value=ast.Name(id=name))) if "kernel" in name:
                yield node.lineno, None
            case ast.With(items=[*items]) if any("launch_device" in ast.unparse(item) for item in items):
                yield None, range(node.lineno, node.end_lineno + 1)


def test_every_launch_is_on_its_tensors_device():
    found = 0
    for file in KERNELS.rglob("triton*.py"):
        guarded = [lines for _, lines in launches(file) if lines is not None]
        for line, _ in launches(file):
            if line is not None:
                found += 1
                assert any(line in lines for lines in guarded), f"{file.name}:{line} launches on the current device"
    assert found >= 5
