"""Tile sizes of the Triton kernels: defaults, and autotuned sizes for a device in their place.

`choose_tiles` takes, in this order: `override_tiles`, the file that LONGCTX_TUNING names (read at first use), the sizes
that `tune` found in this process, the defaults.

The defaults are not tuned on a GPU. They rest on registers, spills and shared memory, compiled for sm_80, sm_90 and
sm_100 with triton 3.7.1 (tests/kernels/test_triton_compile.py); docs/gpu.md has their times on an H100.

- Constant and scalar decays: 4 warps and 128 x 64 of a state (float32: 64 registers per thread), so that a
  multiprocessor holds two programs, of which one computes while the other waits. dk and dv together hold more than
  twice as much as either: a program computes both up to a head dim of 64, where they still load ahead of time (32 in
  float32 and from sm_100 on).
- They take 64 tokens per chunk on sm_90 up to a head dim of 64: all products then use the tensor cores' larger
  instruction (wgmma). At 128, 64 tokens take fewer instructions too, but 8 to 240 bytes spill per thread, most of them
  with packed documents: 32 there, and 16 from a head dim of 256 on, where whole rows of keys or values fill the
  registers. `candidates` has both.
- From sm_100 on they take 32 tokens: at 64, products pass through tensor memory, with twice the instructions and more
  barriers, and Triton 3.7.1 fails to compile one of them. They take 8 warps, since 4 spill there.
- float32 takes 16 tokens and half of that tile, since each of its factors is kept as two of tf32.
- Vector decays take 64 tokens per chunk, 32 where products are not in bf16. Scores and gradients, in parallel
  over chunks, take a warp per sub-block of 16 tokens, and 32 channels at a time (16 in float32): more would spill.
  Walks over chunks hold a state tile of 128 x 64 in 4 warps, two of which fit a processor, or one of 128 x 128 in 8.
- The delta rule takes 64 tokens per chunk, where wgmma is used throughout and the backward pass keeps half as many
  states as at 32; it takes 32 where products are not in 16 bits. Its scans in bf16 on sm_90 have
  all 128 channels of V in one program of 8 warps, three stages deep: 8 warps on a multiprocessor, as with two programs
  of 64 channels, but fewer instructions, and loads that do not wait for the products before them. sm_100, whose tensor
  memory holds less, takes 64 channels, 4 warps, no pipeline. Exact products
  hold their factors in registers: small tiles and 8 warps.
- Other loads are two pipeline stages deep; one stage for vector decays before sm_90, which has less shared memory.
"""

import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal, TypedDict

import torch

MAX_HEAD_DIM = 512
"""Largest K and V. The kernels are meant for 16 to 256; above (V = 256 and a normalizer channel) they are slow."""
MAX_SUMMARY_TILE = 128 * 128
ADDITIVE_KERNELS = ("summary", "apply", "dq", "dk_dv", "dk", "dv")
"""Additive kernels of constant and scalar decays."""
VECTOR_KERNELS = ("summary", "prepare", "apply", "dv", "grads")
"""Kernels of additive vector decays: apply walks forward and dv in reverse; prepare's chunk size holds for these."""
DELTA_KERNELS = ("delta_prepare", "delta_forward", "delta_backward", "delta_pairs", "delta_grads")
"""Kernels of the delta rule; delta_prepare's chunk size holds for all of them."""
DECAY_KINDS = ("constant", "scalar", "vector")


class TileSizes(TypedDict):
    """Tokens per chunk, a program's tile of K and of V (powers of two, at least 16), warps, pipeline stages."""

    chunk: int
    block_k: int
    block_v: int
    warps: int
    stages: int


_tuned: dict[str, TileSizes] = {}
_overrides: dict[str, TileSizes] = {}


def padded_dim(dim: int) -> int:
    """Return the smallest power of two that is at least 16 and a head dim."""
    return max(16, 1 << (dim - 1).bit_length())


def choose_tiles(kernel: str, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> TileSizes:
    """Return the tile sizes of a kernel "name/decay" (ADDITIVE_KERNELS, DELTA_KERNELS; DECAY_KINDS)."""
    if kernel in _overrides:
        return _overrides[kernel]
    key = _key(kernel, key_dim, value_dim, dtype, device)
    measured = _load_table(os.environ.get("LONGCTX_TUNING", "")).get(key) or _tuned.get(key)
    return measured or default_tiles(kernel, key_dim, value_dim, dtype, _compute_capability(device))


@cache
def default_tiles(kernel: str, key_dim: int, value_dim: int, dtype: torch.dtype, capability: int) -> TileSizes:
    """Return the default tile sizes for a compute capability (90 for sm_90). Raises ValueError for unknown kernels."""
    name, decay = kernel.split("/")
    names = (*(VECTOR_KERNELS if decay == "vector" else ADDITIVE_KERNELS), *DELTA_KERNELS)
    if name not in names or decay not in DECAY_KINDS:
        raise ValueError(
            f"unknown kernel {kernel!r}: expected name/decay, a name of {', '.join(names)}, a decay of "
            f"{', '.join(DECAY_KINDS)}"
        )
    k, v = padded_dim(key_dim), padded_dim(value_dim)
    max_dim = max(k, v)
    if max_dim > MAX_HEAD_DIM:
        raise ValueError(f"head dims are K {key_dim} and V {value_dim}: expected at most {MAX_HEAD_DIM}")
    if name in DELTA_KERNELS:
        return _delta_tiles(name, decay, k, v, dtype, capability)
    if decay == "vector":
        return _vector_tiles(name, k, v, dtype, capability)
    if name != "summary":
        return _additive_tiles(name, k, v, dtype, capability)
    # Summaries of constant and scalar decays, which hold little but the state.
    k = min(k, 128)
    v = min(v, MAX_SUMMARY_TILE // k)
    is_half = dtype in (torch.bfloat16, torch.float16)
    warps = 8 if k * v > 64 * 64 else 4
    stages = 2 if capability >= 90 and is_half else 1
    return {"chunk": 64 if is_half else 16, "block_k": k, "block_v": v, "warps": warps, "stages": stages}


def _vector_tiles(name: str, k: int, v: int, dtype: torch.dtype, capability: int) -> TileSizes:
    """Return the defaults of additive vector decays, for padded head dims."""
    bf16 = dtype == torch.bfloat16
    # Two stages of the walks take up to 208 KiB of shared memory: sm_90 and sm_100 have them, sm_80 and sm_120 do not.
    pipelined = 90 <= capability < 120
    if name in ("prepare", "grads"):
        return _chunk_parallel_tiles(k, v, dtype)
    warps = 8
    if name == "apply":
        v, warps = min(v, max(16, 64 * 128 // k)), 4 if bf16 else 8
    elif name == "dv":
        v = min(v, max(16, (128 if bf16 else 64) * 128 // k))
        warps = 8 if k * v > 64 * 64 or not bf16 else 4
    else:
        k, v, warps = min(k, 64), min(v, 128 if bf16 and pipelined else 64), 4
    stages = 2 if bf16 and pipelined else 1
    return {"chunk": 64 if bf16 else 32, "block_k": k, "block_v": v, "warps": warps, "stages": stages}


def _chunk_parallel_tiles(k: int, v: int, dtype: torch.dtype) -> TileSizes:
    """Return the defaults of kernels of vector decays that are parallel over chunks: a warp per 16 tokens."""
    if dtype == torch.bfloat16:
        return {"chunk": 64, "block_k": min(k, 32), "block_v": min(v, 64), "warps": 4, "stages": 1}
    return {"chunk": 32, "block_k": 16, "block_v": min(v, 32), "warps": 2, "stages": 1}


def _additive_tiles(name: str, k: int, v: int, dtype: torch.dtype, capability: int) -> TileSizes:
    """Return the defaults of constant and scalar decays but for summaries, for padded head dims."""
    max_dim, is_half, blackwell = max(k, v), dtype != torch.float32, capability >= 100
    together = 32 if blackwell or not is_half else 64
    most = 128 * 128 if is_half else 64 * 64
    side = 128 if blackwell and is_half and name in ("apply", "dq") else 64
    if name in ("apply", "dv"):
        v = min(v, side, max(16, most // k))
    elif name in ("dq", "dk"):
        k = min(k, side, max(16, most // v))
    elif max_dim > together:
        # A tile of less than K x V means a sweep each for dk and dv.
        k, v = min(k, max_dim // 2, 128), min(v, max_dim // 2, 128)
    if dtype != torch.bfloat16:
        # fp16 is multiplied as tf32, of twice the size.
        chunk = 32 if is_half and max_dim <= 64 else 16
    elif max_dim > 128:
        chunk = 32 if max_dim == 256 and name in ("apply", "dq") and capability >= 90 else 16
    elif capability == 90 and name != "dk_dv" and max_dim <= 64:
        chunk = 64
    else:
        chunk = 32
    warps = 8 if k * v > (64 * 64 if blackwell or not is_half else 64 * 128) else 4
    return {"chunk": chunk, "block_k": k, "block_v": v, "warps": warps, "stages": 1 + is_half}


def _delta_tiles(name: str, decay: str, k: int, v: int, dtype: torch.dtype, capability: int) -> TileSizes:
    """Return the defaults of the delta rule, for padded head dims."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    vector = decay == "vector"
    chunk = 64 if is_half and not vector else 32
    stages = 1
    if vector and name in ("delta_prepare", "delta_grads"):
        return _chunk_parallel_tiles(k, v if max(k, v) > 64 else min(v, 32), dtype)
    if dtype == torch.bfloat16:
        sizes = _delta_bfloat16_tiles(name, k, v, capability)
        if not vector:
            return sizes
        # Keys that read a state and keys that write it are two tensors: more of both does not fit.
        return {**sizes, "stages": min(sizes["stages"], 2), "block_v": min(sizes["block_v"], 128 if k <= 128 else 32)}
    if name == "delta_prepare":
        k, v, warps = min(k, 128 if is_half else 32), 16, 4
    elif name in ("delta_pairs", "delta_grads"):
        small = 32 if max(k, v) <= 64 or not is_half else 64
        k, v, warps = min(k, 64 if is_half else 32), min(v, small), 8
    else:
        v = min(v, max(16, (64 if is_half else 32 if not vector else 16) * 128 // k))
        warps = 8 if chunk == 64 or k * v > 64 * 64 else 4
    return {"chunk": chunk, "block_k": k, "block_v": v, "warps": warps if is_half else 8, "stages": stages}


def _delta_bfloat16_tiles(name: str, k: int, v: int, capability: int) -> TileSizes:
    """Return the defaults of the delta rule in bf16, but for what is parallel over chunks of vector decays."""
    hopper, blackwell = capability == 90, 100 <= capability < 120
    stages, warps = 1, 4
    if name == "delta_prepare":
        k, v = min(k, 128), 16
    elif name in ("delta_pairs", "delta_grads"):
        k, v = min(k, 128 if name == "delta_pairs" and hopper else 64), min(v, 64)
        stages = 2 if hopper or (name == "delta_pairs" and not blackwell) else 1
    elif hopper and k == 128 and v >= 128:
        # All of V in a program: keys and queries are loaded once, and three stages fit.
        v, warps, stages = 128, 8, 3
    else:
        wide = k <= 128 or (hopper and k == 256 and name == "delta_forward")
        v = min(v, 64 if wide else 32 if k == 256 else 16)
        warps = 4 if k <= 128 and (blackwell or hopper) else 8
        stages = 2 if hopper or (k <= 128 and not blackwell) else 1
    return {"chunk": 64, "block_k": k, "block_v": v, "warps": warps, "stages": stages}


def candidates(kernel: str, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> list[TileSizes]:
    """Return the sizes that `tune` tries: the default first, then its neighbours in each size that may vary."""
    default = default_tiles(kernel, key_dim, value_dim, dtype, _compute_capability(device))
    name, decay = kernel.split("/")
    result: list[TileSizes] = []
    if name in ADDITIVE_KERNELS and decay != "vector":
        return _additive_candidates(name, default, dtype)
    chunks: tuple[int, ...] = (default["chunk"],)
    if name in ("summary", "prepare", "delta_prepare"):
        chunks = (32, 64) if name == "delta_prepare" else (32, 64, 128)
    for chunk in chunks:
        for warps in (2, 4, 8) if name in DELTA_KERNELS or decay == "vector" else (4, 8):
            for stages in (1, 2, 3):
                sized: TileSizes = {**default, "chunk": chunk, "warps": warps, "stages": stages}
                result.append(sized)
                walks = name in ("summary", "apply", "dv", "delta_forward", "delta_backward")
                halves_v = walks or name in ("delta_pairs", "delta_grads")
                if halves_v and default["block_v"] > 32:
                    result.append({**sized, "block_v": default["block_v"] // 2})
                halves_k = name in ("dq", "dk", "prepare", "grads", "delta_prepare", "delta_pairs", "delta_grads")
                if halves_k and default["block_k"] > 16:
                    result.append({**sized, "block_k": default["block_k"] // 2})
    result.sort(key=lambda sizes: sum(sizes[name] != default[name] for name in default))  # type: ignore[literal-required]
    return result


def _additive_candidates(name: str, default: TileSizes, dtype: torch.dtype) -> list[TileSizes]:
    """Return the candidates of constant and scalar decays: the default, then those that differ least from it.

    Left out is what spilled hundreds of bytes or more wherever it was compiled: a thread with more than 64 numbers of
    the state, chunks of 128, and of 64 with whole states of 128 x 128 or with dk and dv together.
    """
    side: Literal["block_k", "block_v"] = "block_k" if name in ("dq", "dk") else "block_v"
    chunks = [default["chunk"], *(chunk for chunk in (32, 64, 16) if chunk != default["chunk"])]
    tiles = [default[side], *(default[side] * n // 2 for n in (1, 4) if name != "dk_dv")]
    result: list[TileSizes] = []
    for stages in (default["stages"], 3 - min(default["stages"], 2), 3):
        for warps in (default["warps"], 12 - default["warps"]):
            for tile in tiles:
                for chunk in chunks:
                    sizes: TileSizes = {**default, "chunk": chunk, "warps": warps, "stages": stages}
                    sizes[side] = tile
                    state = sizes["block_k"] * sizes["block_v"]
                    wide = chunk == 64 and name != "summary" and (state > 64 * 128 or name == "dk_dv")
                    half = 1 if dtype != torch.float32 else 2
                    fits = 16 <= tile <= 128 and half * state <= 64 * 32 * warps and not (chunk > 32 and half == 2)
                    if sizes == default or (fits and not wide):
                        result.append(sizes)
    result.sort(key=lambda sizes: sum(sizes[name] != default[name] for name in default))  # type: ignore[literal-required]
    return result


def tune(
    kernel: str,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    run: Callable[[], object],
    attempts: Iterable[TileSizes] | None = None,
    on_failure: Callable[[TileSizes, Exception], object] = lambda sizes, error: None,
) -> TileSizes | None:
    """Time `run` on a CUDA device with each of `attempts` (default: `candidates`), and keep and return the fastest.

    Skips candidates that do not compile or do not fit the device, and calls `on_failure` for each. Returns None, and
    keeps nothing, where none fits. Raises what leaves the device unusable, such as an illegal address.
    """
    from triton.errors import TritonError

    best, best_seconds = None, float("inf")
    for sizes in attempts or candidates(kernel, key_dim, value_dim, dtype, device):
        try:
            with override_tiles(kernel, sizes):
                seconds = _seconds(run, best_seconds)
        except torch.AcceleratorError:
            raise
        except (TritonError, RuntimeError) as error:
            # Triton's passes raise RuntimeError where they fail, its front end and the assembler a TritonError.
            on_failure(sizes, error)
            continue
        if seconds < best_seconds:
            best, best_seconds = sizes, seconds
    if best is not None:
        _tuned[_key(kernel, key_dim, value_dim, dtype, device)] = best
    return best


def _seconds(run: Callable[[], object], best_seconds: float) -> float:
    """Return the median time of a call, after one to warm up; stops after the first if it takes twice the best."""
    run()
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
        if times[0] > 2 * best_seconds:
            break
    return statistics.median(times)


def save(path: Path) -> None:
    """Write the autotuned sizes to a JSON file, for LONGCTX_TUNING."""
    path.write_text(json.dumps(_tuned, indent=1, sort_keys=True) + "\n")


@contextmanager
def override_tiles(kernel: str, sizes: TileSizes) -> Iterator[None]:
    """Make `choose_tiles` return these sizes for a kernel inside the context, whatever the shape."""
    _overrides[kernel] = sizes
    try:
        yield
    finally:
        del _overrides[kernel]


@cache
def _load_table(path: str) -> dict[str, TileSizes]:
    """Read the autotuned sizes of an earlier process; none without a path."""
    if not path:
        return {}
    try:
        table = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"LONGCTX_TUNING names {path}, which cannot be read: {error}") from error
    sizes = set(TileSizes.__annotations__)
    if not isinstance(table, dict) or any(not isinstance(x, dict) or set(x) != sizes for x in table.values()):
        raise ValueError(f"LONGCTX_TUNING names {path}, which is not a table of {', '.join(sorted(sizes))}: tune again")
    return table


@cache
def _compute_capability(device: torch.device) -> int:
    """Return the compute capability as one number; sm_90's for the interpreter, which runs on CPU tensors."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def _key(kernel: str, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name} | {kernel} | {padded_dim(key_dim)}x{padded_dim(value_dim)} | {str(dtype).removeprefix('torch.')}"
