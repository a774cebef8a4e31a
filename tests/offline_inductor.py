"""What torch.compile makes of a function on CUDA, without a GPU: its Triton kernels, and the bytes that they move.

Needs a process of its own, whose torch.cuda answers for a GPU that is not there.
"""

import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.offline_gpu import record

_H100 = types.SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
    gcnArchName="",
)


def pretend_gpu() -> None:
    """Let torch.cuda answer as with one H100, in this process from now on."""
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": "NVIDIA H100",
        "_get_device_properties": _H100,
        "set_device": None,
        "_lazy_init": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *arguments, answer=answer, **keywords: answer)
    record(90)
    config.compile_threads = 1


@dataclass(frozen=True)
class Compiled:
    """The result of one compilation."""

    kernels: int
    """Triton kernels, one launch each."""
    others: int
    """Calls of operators that are not generated: matmuls, copies."""
    bytes_: int
    """Bytes that all of them read and write."""
    code: str


def compile_for_cuda(function: Callable[..., Any], *arguments: Any) -> Compiled:
    """Compile a function for the shapes, dtypes and strides of its arguments; those that are no tensors are fixed.

    Tensors are on the CPU or have no memory; their values are not read.
    """
    tensors = [x for x in arguments if isinstance(x, Tensor)]

    def call(*given: Tensor) -> Any:
        rest = iter(given)
        return function(*(next(rest) if isinstance(x, Tensor) else x for x in arguments))

    def trace(traced: Callable[..., Any], device: str) -> tuple[torch.fx.GraphModule, list[Tensor]]:
        inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) for x in tensors]
        return make_fx(traced, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs), inputs

    fake = FakeTensorMode()
    with fake:
        # Indexing in Python needs a torch that was built for the device, operators do not.
        with patch.object(torch.compiler, "is_compiling", lambda: True):
            on_cpu, _ = trace(torch.func.functionalize(call, remove="mutations"), "cpu")
        for node in on_cpu.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
        on_cpu.recompile()
        module, inputs = trace(on_cpu, "cuda")
    graph = GraphLowering(module)
    with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()), V.set_fake_mode(fake):
        graph.run(*inputs)
        code = graph.codegen()[0].value
        moved, *_ = graph.count_bytes()
    launched = re.findall(r"^\s+(\w+)\.run\(", code, re.MULTILINE)
    others = len(re.findall(r"^\s+(?:extern_kernels\.|\w+ = torch\.ops\.)", code, re.MULTILINE))
    return Compiled(len(launched), others, moved, code)
