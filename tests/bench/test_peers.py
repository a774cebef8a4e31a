"""Peers compute the same as our kernels, forward and backward, or say why they are not there."""

import importlib.util
import sys
import types

import pytest
import torch
from torch import Tensor

from longctx.bench.kernels import KERNELS, Shape
from longctx.bench.measure import KernelTask, build_workload, compare_to_peer, relative, run
from longctx.bench.peers import PEERS, Peer
from longctx.kernels.linear.api import linear_attention

CPU = {kernel: peer for (kernel, device), peer in PEERS.items() if device == "cpu"}
FLA = {kernel: peer for (kernel, device), peer in PEERS.items() if device == "cuda" and peer.package == "fla"}


def task(kernel: str, tokens: int = 600, dtype: str = "float32") -> KernelTask:
    return KernelTask(kernel, False, True, Shape(tokens, 3, 20, dtype), "cpu", 1, 0.0)


@pytest.mark.parametrize("kernel", CPU)
def test_a_peer_computes_the_same(kernel: str) -> None:
    missing = CPU[kernel].missing()
    if missing:
        pytest.skip(missing)
    found = compare_to_peer(task(kernel))
    assert {"o"} < found.keys()
    assert all(value < 1e-5 for value in found.values()), found


@pytest.mark.parametrize("kernel", ["lightning", "simple-gla", "gated-deltanet"])
def test_gradients_of_q_k_and_v_are_compared(kernel: str) -> None:
    missing = CPU[kernel].missing()
    if missing:
        pytest.skip(missing)
    assert {"o", "dq", "dk", "dv"} <= compare_to_peer(task(kernel, tokens=40)).keys()


@pytest.mark.parametrize("kernel", CPU)
def test_bf16_is_within_its_bound(kernel: str) -> None:
    missing = CPU[kernel].missing()
    if missing:
        pytest.skip(missing)
    found = compare_to_peer(task(kernel, dtype="bfloat16"))
    assert all(value < 2e-2 for value in found.values()), found


def test_another_computation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = CPU["rms-norm"]

    def doubled(inputs: dict[str, Tensor]) -> object:
        made = peer.build(inputs)
        return type(made)(made.leaves, lambda leaves: 2 * made.run(leaves))

    monkeypatch.setitem(PEERS, ("rms-norm", "cpu"), Peer("rms-norm", "doubled", "cpu", doubled))
    assert compare_to_peer(task("rms-norm"))["o"] == pytest.approx(1.0)


def test_what_is_missing_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert CPU["lightning"].missing() == "transformers is not installed; pip install -e '.[compare]'"
    assert FLA["kda"].missing() == "flash-linear-attention is not installed; pip install -e '.[compare]'"


def test_what_is_there_is_not_missing() -> None:
    assert CPU["attention"].missing() is None


def stand_in(calls: list[str]) -> types.ModuleType:
    """fla's chunk functions by our kernel, with fla's names of the arguments."""

    def chunk(q: Tensor, k: Tensor, v: Tensor, *, scale: float, **gates: Tensor) -> tuple[Tensor, None]:
        calls.append(" ".join(sorted(gates)))
        decay = gates.get("g_gamma", gates.get("g"))
        return linear_attention(q, k, v, decay, gates.get("beta"), scale=scale)[0], None

    module = types.ModuleType("fla.ops")
    for name in ("simple_gla", "gla", "delta_rule", "gated_delta_rule", "kda"):
        setattr(module, f"chunk_{name}", chunk)
    return module


@pytest.mark.parametrize(
    ("kernel", "module", "gates"),
    [
        ("lightning", "simple_gla", "g_gamma"),
        ("simple-gla", "simple_gla", "g"),
        ("gla", "gla", "g"),
        ("deltanet", "delta_rule", "beta"),
        ("gated-deltanet", "gated_delta_rule", "beta g"),
        ("kda", "kda", "beta g"),
    ],
)
def test_fla_is_given_our_gates_and_scale(
    monkeypatch: pytest.MonkeyPatch, kernel: str, module: str, gates: str
) -> None:
    calls: list[str] = []
    monkeypatch.setitem(sys.modules, f"fla.ops.{module}", stand_in(calls))
    one = task(kernel, tokens=70)
    ours = build_workload(one, one.shape)
    theirs = FLA[kernel].build(KERNELS[kernel].draw(one.shape, torch.Generator().manual_seed(0)))
    assert relative(run(theirs, None), run(ours, None)) < 1e-6
    assert theirs.constants == ours.constants
    assert calls == [gates]


def test_every_kernel_has_a_peer_on_cuda() -> None:
    assert {kernel for kernel, device in PEERS if device == "cuda"} == KERNELS.keys()
