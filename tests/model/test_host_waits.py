"""On a GPU the host never waits in a layer: what a layer needs of its layout is copied once a batch, without waiting.

The forward pass runs on tensors that have no values and say that they are on a GPU; an operator that reads one, whose
result's shape depends on values, or that copies between CPU and GPU without `non_blocking`, makes the host wait.
Attention is left out: its schedule is planned once a batch, with a few reads. `benchmarks/gpu.sh` counts the waits of a
whole step on a real GPU.
"""

import traceback
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.kernels import fusion
from longctx.layers.rotary import layout_table
from longctx.mixers import softmax
from longctx.model.config import ModelConfig
from longctx.model.decoder import Decoder
from longctx.model.ffn import SwigluConfig
from longctx.model.moe import MoeConfig
from longctx.parallel.layout import Layout
from tests.mixers.cases import CONFIGS, OPTIONS, config_of
from tests.model.cases import VOCABULARY, routed

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="pretends to have a GPU")
ROOT = str(Path(__file__).parents[2])
ATEN = torch.ops.aten
READS = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.bincount.default, ATEN._unique2.default}
COPIES = {ATEN._to_copy.default, ATEN.copy_.default}


class Waits(TorchDispatchMode):
    """Records the lines of this repository at which the host waits for a GPU."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in READS:
            self._record(function)
        if function is ATEN._local_scalar_dense.default:
            return 1
        out = function(*args, **kwargs)
        if function in COPIES:
            places = {x.device.type for x in (*args, out) if isinstance(x, torch.Tensor)}
            non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
            if len(places) > 1 and not non_blocking:
                self._record(function)
        return out

    def _record(self, function):
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(ROOT) and ".venv" not in f.filename]
        ours = [f"{f.filename.removeprefix(ROOT)}:{f.lineno}" for f in frames if f.filename != __file__]
        self.lines.append(f"{function} at {ours[-1] if ours else 'the test'}")


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """What the host code asks of CUDA, answered; torch.compile leaves functions as they are."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(fusion, "_compiled", lambda function: function)
    monkeypatch.setattr(softmax, "softmax_attention", lambda q, k, v, layout, scale, mask: q * k.mean() * v.mean())


def lines_that_wait(config):
    with FakeTensorMode(allow_non_fake_inputs=True):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)  # `to` would replace parameters that have no values
        try:
            with torch.device("cuda"):
                model = Decoder(config, VOCABULARY)
        finally:
            torch.set_default_dtype(before)
        for block in model.blocks:
            block.ffn.tile = 7
        x = torch.zeros(1, 48, dtype=torch.int64, device="cuda")
        with Waits() as waits, suppress(DynamicOutputShapeException):  # recorded before
            model(x, Layout((0, 17, 48)), x)
    return waits.lines


def in_layers(lines):
    """Those but the copy of the experts' fixed numbers, once a process."""
    assert sum("/moe/report.py" in line for line in lines) <= 1
    return [line for line in lines if "/moe/report.py" not in line]


@pytest.mark.parametrize("name", [*CONFIGS, *OPTIONS])
def test_in_no_mixer_and_no_feed_forward(name):
    config = config_of(name)
    tables = {"swiglu": SwigluConfig(hidden=10), config.name: config}
    assert in_layers(lines_that_wait(ModelConfig(layers=name[0], depth=2, dim=12, **tables))) == []


def with_experts(**options):
    moe = MoeConfig(experts=4, active=2, hidden=16, **options)
    return ModelConfig(layers="L", depth=2, dim=16, ffn="moe", moe=moe, lightning=config_of("L"))


@pytest.mark.parametrize("options", [{}, {"jitter": 0.1, "shared": 1, "balance": 0.1}], ids=str)
def test_nor_where_tokens_go_to_experts(options):
    assert in_layers(lines_that_wait(with_experts(**options))) == []


def test_where_a_number_decides_on_shapes_the_host_waits_for_it():
    """The choices that a capacity keeps, the pairs of a mixture of heads: in these files and in no other."""
    found = {
        name: {line.split(" at ")[1].split(":")[0] for line in in_layers(lines_that_wait(config))}
        for name, config in (("capacity", with_experts(capacity=1.5)), ("heads", routed()))
    }
    assert found == {"capacity": {"/moe/experts.py"}, "heads": {"/moe/heads.py"}}


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.ones(3, device="cpu").to(x.device),
        lambda x: x[[0, 1]],
        lambda x: x.cpu(),
    ],
)
def test_what_makes_the_host_wait_is_recorded(wait):
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits, suppress(DynamicOutputShapeException):
        wait(torch.empty(2, 3, device="cuda"))
    assert waits.lines


def test_a_table_of_positions_is_made_once_for_all_layers():
    layout, x = Layout((0, 5)), torch.zeros(1)
    assert layout_table(layout, x, 4, 1e4) is layout_table(layout, x, 4, 1e4)
    assert layout_table(layout, x, 4, 1e4) is not layout_table(layout, x, 4, 1e5)
    assert layout_table(layout, x, 4, 1e4)[0].dtype == torch.float32
    assert layout_table(layout, x.double(), 4, 1e4)[0].dtype == torch.float64
