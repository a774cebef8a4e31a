"""Kernel steps of the GPU benchmark: compilation, correctness at the sizes that are timed, times.

Correctness: the kernels run at the full size, and the torch operators in float64 on the same values of the first and
the last head (heads do not depend on each other).
"""

import gc
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_recurrences import Inputs, attend, draw, with_gradients
from benchmarks.gpu_shape import Shape
from benchmarks.gpu_timing import Call, kernels_of, milliseconds, peak_mib, relative
from longctx.bench.isolated import report
from longctx.kernels.attention import block as attention
from longctx.kernels.attention.block import CAUSAL
from longctx.kernels.linear.recurrence import Carry
from longctx.kernels.linear.segment_scan import scan_segments

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""Relative difference from float64 of outputs and of the gradients of tokens."""
GATES = 5
"""Times the bound, for gradients of gates: sums over channels and along the sequence."""
CONSTANT = {torch.float32: 1000.0, torch.bfloat16: float("inf"), torch.float16: float("inf")}
"""The same for a constant decay: a small sum over all tokens of large terms with both signs, which 16 bits may
round to anything finite."""
ATTENTION = ("cuda-flash", "cuda-cudnn", "triton")
"""Backends of causal attention that are checked and timed, as far as they support the call."""


def compile_recurrence(kind: str, dtype: str, shape: Shape, device: str) -> dict[str, Any]:
    """Compile the kernels of a recurrence by running them forward and backward on a short sequence."""
    inputs = draw(kind, shape, getattr(torch, dtype), torch.device(device))
    for result in with_gradients(inputs):
        assert result.isfinite().all()
    return {}


def compile_attention(dtype: str, shape: Shape, device: str) -> dict[str, Any]:
    """The same for causal attention."""
    for result in _attend(_attention_inputs(shape, getattr(torch, dtype), device), "triton"):
        assert result.isfinite().all()
    return {}


def compare(
    names: tuple[str, ...], got: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: torch.dtype
) -> dict[str, Any]:
    """Return the relative differences by name, and whether one is out of the bound of `dtype`."""
    errors, out = {}, []
    for name, x, ref in zip(names, got, want, strict=True):
        errors[name] = relative(x, ref)
        most = BOUNDS[dtype]
        if name in ("dlog_decay", "dbeta"):
            most *= CONSTANT[dtype] if x.dim() == 1 else GATES
        if not errors[name] <= most:
            out.append(f"{name} {errors[name]:.1e} (bound {most:.0e})")
    result: dict[str, Any] = {"worst": max(errors.values(), key=lambda x: x if x == x else float("inf"))}
    return {**result, "errors": errors, **({"wrong": True, "error": "; ".join(out)} if out else {})}


def documents(tokens: int) -> tuple[int, ...]:
    """Return starts of documents of very different lengths, one token among them."""
    return tuple(sorted({0, 1, tokens // 7, tokens // 3 + 5, tokens // 2, tokens - 3}))


def check_recurrence(kind: str, dtype: str, shape: Shape, device: str, packed: bool, last: int = 0) -> dict[str, Any]:
    """Compare o and all gradients with float64; `packed`: with documents, and with decays of exp(-1e4).

    With `last`, the last tokens are a document, and only they are compared: float64 takes long for a million.
    """
    starts = documents(shape.tokens) if packed else ()
    inputs = draw(kind, shape, getattr(torch, dtype), torch.device(device), strong=packed)
    return _check(inputs, starts, last)


def _check(inputs: Inputs, starts: tuple[int, ...] = (), last: int = 0) -> dict[str, Any]:
    _, tokens, heads, _ = inputs.q.shape
    chosen = sorted({0, heads - 1})
    begin = tokens - last if last else 0
    if last:
        starts = (begin,)

    def pick(x: Tensor) -> Tensor:
        return (x[chosen] if x.dim() == 1 else x[:, begin:, chosen]).clone()

    _poison()
    got = [pick(x) for x in with_gradients(inputs, starts)]
    names, dtype = list(inputs.names), inputs.q.dtype
    few = inputs.part(begin, chosen).double()
    del inputs
    _free()
    want = list(with_gradients(few, () if last else starts))
    if last and got[-1].dim() == 1:
        # The gradient of a constant decay is a sum over all documents.
        del names[-1], got[-1], want[-1]
    return compare(tuple(names), tuple(got), tuple(want), dtype)


def _poison() -> None:
    """Fill new memory of this process with NaN: what no kernel wrote shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # set by property
    torch.use_deterministic_algorithms(True, warn_only=True)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_head_major(kind: str, dtype: str, shape: Shape, device: str, last: int) -> dict[str, Any]:
    """Check inputs whose heads lie far apart: `[B, H, T, D]` transposed, all four in one tensor.

    At 262,144 tokens, 18 heads and d 128 the last head begins after more than 2^31 elements.
    """
    inputs = draw(kind, shape, getattr(torch, dtype), torch.device(device))
    tensors = torch.stack([inputs.q, inputs.k, inputs.v, inputs.do])  # [4, 1, T, H, D]
    tensors = tensors.permute(3, 0, 2, 1, 4).contiguous()  # [H, 4, T, 1, D]
    q, k, v, do = (x.permute(2, 1, 0, 3) for x in tensors.unbind(1))
    result = _check(Inputs(kind, q, k, v, inputs.gates, do), last=last)
    return {"farthest": (shape.heads - 1) * q.stride(2), **result}


def check_scan(kind: str, segments: int, shape: Shape, device: str) -> dict[str, Any]:
    """Compare the scan over segments, both ways, with a loop in float64; transitions "scalar", "vector", "matrix"."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    heads, dim = shape.heads, shape.dim
    if kind == "matrix":
        transition = normal(segments, 1, heads, dim, dim) / (2 * dim**0.5)
    else:
        transition = -normal(segments, 1, heads, *((dim,) if kind == "vector" else ())).abs()
    carries = Carry(transition, normal(segments, 1, heads, dim, dim))
    state = normal(1, heads, dim, dim)
    scan: Any = scan_segments
    if device == "cpu":
        from longctx.kernels.linear import triton_segment_scan as interpreted

        def scan(carries: Carry, state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
            run = interpreted.scan_matrices if kind == "matrix" else interpreted.scan_segments_triton
            return run(carries.transition, carries.state, state, reverse)

    exact = Carry(carries.transition.double(), carries.state.double())
    got, want = [], []
    for reverse in (False, True):
        got += scan(carries, state, reverse=reverse)
        states, last = [], state.double()
        for number in reversed(range(segments)) if reverse else range(segments):
            states.append(last)
            last = exact[number].carry_over(last)
        want += [torch.stack(states[::-1] if reverse else states), last]
    names = ("states", "end", "states, reverse", "end, reverse")
    return compare(names, tuple(got), tuple(want), torch.float32)


def _attention_inputs(shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Draw q, k, v, do, with a quarter of the heads for keys and values."""
    generator = torch.Generator(device).manual_seed(0)
    counts = (shape.heads, max(1, shape.heads // 4), max(1, shape.heads // 4), shape.heads)
    return [
        torch.randn(1, shape.tokens, heads, shape.dim, generator=generator, device=device).to(dtype) for heads in counts
    ]


def _attend(inputs: list[Tensor], backend: str) -> tuple[Tensor, ...]:
    """Return o, dq, dk, dv of causal attention; of backends that do not repeat bitwise, too."""
    torch.use_deterministic_algorithms(False)
    q, k, v, do = inputs
    out, lse = attention.forward(q, k, v, CAUSAL, q.shape[3] ** -0.5, backend)
    return out, *attention.backward(do, q, k, v, out, lse, CAUSAL, q.shape[3] ** -0.5, backend)


def _backends(inputs: list[Tensor]) -> tuple[list[str], dict[str, str]]:
    """Return the backends of ATTENTION that support a causal call, and why the others do not."""
    q, k, v, _ = inputs
    reasons = attention.explain_backends(q, k, v, CAUSAL)
    refused = {name: reason for name in ATTENTION if (reason := reasons[name]) is not None}
    return [name for name in ATTENTION if name not in refused], refused


def check_attention(dtype: str, shape: Shape, device: str) -> dict[str, Any]:
    """Compare causal attention of every backend with float64, for the query heads of the last key head."""
    inputs = _attention_inputs(shape, getattr(torch, dtype), device)
    readers = shape.heads // inputs[1].shape[2]
    parts = (slice(-readers, None), slice(-1, None), slice(-1, None), slice(-readers, None))
    few = [x[:, :, part].double() for x, part in zip(inputs, parts, strict=True)]
    want = _attend(few, "tiled")
    able, refused = _backends(inputs)
    results, wrong = {}, []
    for backend in able:
        got = _attend(inputs, backend)
        heads = (parts[0], parts[0], parts[1], parts[2])
        picked = tuple(x[:, :, part] for x, part in zip(got, heads, strict=True))
        results[backend] = compare(("o", "dq", "dk", "dv"), picked, want, inputs[0].dtype)
        if results[backend].pop("wrong", False):
            wrong.append(f"{backend}: {results[backend]['error']}")
        report({"backends": results, "refused": refused})
    return {"wrong": True, "error": "; ".join(wrong)} if wrong else {}


def time_recurrence(kind: str, dtype: str, shape: Shape, device: str, repeats: int) -> dict[str, Any]:
    """Time forward, and forward and backward; kernels by time, and peak memory."""
    place = torch.device(device)
    inputs = draw(kind, shape, getattr(torch, dtype), place)

    def forward() -> None:
        with torch.no_grad():
            attend(inputs)

    def both() -> None:
        with_gradients(inputs, constant=False)

    least = min_bytes(kind, shape, getattr(torch, dtype).itemsize)
    report({"forward_bytes": least[0], "both_bytes": least[1]})
    timings(forward, both, place, repeats)
    return {}


def timings(forward: Call, both: Call | None, device: torch.device, repeats: int) -> None:
    """Report the times of a forward and of a whole pass as they come, then kernels and memory."""
    forward()
    whole = both or forward
    report({"peak_mib": peak_mib(whole, device)})
    for name, call in (("forward", forward), ("both", both)):
        if call is not None:
            report({name: milliseconds(call, device, repeats)})
    report({"kernels": kernels_of(whole, device, 12)})


def min_bytes(kind: str, shape: Shape, itemsize: int) -> tuple[int, int]:
    """Compute the least memory traffic in bytes of a forward, and of a forward and a backward pass.

    Forward: q, k, v and gates in, o out. Backward: those and do in, dq, dk, dv and the gates' gradients out.
    """
    recurrence, decay = kind.split("/")
    numbers = 4 * shape.tokens * shape.heads
    tensor = itemsize * shape.tokens * shape.heads * shape.dim
    gates = {"scalar": numbers, "vector": numbers * shape.dim}.get(decay, 0) + numbers * (recurrence == "delta")
    return 4 * tensor + gates, 11 * tensor + 3 * gates


def time_attention(dtype: str, shape: Shape, device: str, repeats: int) -> dict[str, Any]:
    """Time causal attention by every backend that supports it."""
    place = torch.device(device)
    inputs = _attention_inputs(shape, getattr(torch, dtype), device)
    able, refused = _backends(inputs)
    q, k, v, _ = inputs
    results = {}
    for backend in able:

        def forward(backend: str = backend) -> object:
            return attention.forward(q, k, v, CAUSAL, shape.dim**-0.5, backend)

        def both(backend: str = backend) -> object:
            return _attend(inputs, backend)

        both()
        results[backend] = {
            "forward": milliseconds(forward, place, repeats),
            "both": milliseconds(both, place, repeats),
        }
        report({"backends": results, "refused": refused})
    return {}
