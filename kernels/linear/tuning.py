"""Tile sizes of the Triton kernels: a table, and what was measured on a device in its place.

`choose_tiles` answers from, in this order: what `forced` sets, the file that LONGCTX_TUNING names (read at first use),
what `tune` measured in this process, the table.

The table is a first guess: not measured on a GPU. What is known of it comes from compiling for sm_90 with triton 3.7.1
(tests/kernels/linear/test_triton_compile.py): registers, spills and shared memory. Its rules:

- A program keeps at most 128 x 128 of a state (float32: 64 registers a thread at 8 warps), half of that for vector
  decays, which have more beside it.
- 32 tokens a chunk: at 64 the tensor cores' larger instruction (wgmma) would be used, but at head dim 128 registers
  spill, by 80 to 1500 bytes a thread. Summaries, which hold little else, take 64. Vector decays take 16, since every
  doubling adds a product per score; float32 too.
- The delta rule takes 64 tokens a chunk, where wgmma is used throughout and the states that the backward pass keeps are
  half as many as at 32; 32 where a decay is a vector or products are not in 16 bits. Below 64 tokens more than
  C / 16 warps multiply the same again, so vectors take few warps and small blocks where no state is carried. Exact
  products hold their factors in registers: small blocks and 8 warps.
- Loads are two stages deep, one where a program makes both dk and dv, and before sm_90, which has less shared memory.
"""

import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypedDict

import torch

LARGEST_DIM = 512
"""Of K and V. Made for 16 to 256; beyond it (a V of 256 with a channel that normalises) they work, slowly."""
STATE_TILE = {"constant": 128 * 128, "scalar": 128 * 128, "vector": 128 * 64}
KERNELS = ("summary", "apply", "dq", "dk_dv", "dk", "dv")
DELTA_KERNELS = ("delta_prepare", "delta_forward", "delta_backward", "delta_grads")
"""Of the delta rule, whose chunks are all as long as delta_prepare says."""
DECAYS = ("constant", "scalar", "vector")


class Blocks(TypedDict):
    """Tokens of a chunk, a program's part of K and of V (powers of two from 16 on), warps, loads in flight."""

    chunk: int
    block_k: int
    block_v: int
    warps: int
    stages: int


_measured: dict[str, Blocks] = {}
_forced: dict[str, Blocks] = {}


def padded(dim: int) -> int:
    """The power of two, 16 at least, that holds a head dim."""
    return max(16, 1 << (dim - 1).bit_length())


def choose_tiles(kernel: str, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> Blocks:
    """The tile sizes of a kernel, "name/decay" of KERNELS and DECAYS, for head dims up to 512."""
    if kernel in _forced:
        return _forced[kernel]
    key = _key(kernel, key_dim, value_dim, dtype, device)
    found = _from_file(os.environ.get("LONGCTX_TUNING", "")).get(key) or _measured.get(key)
    return found or table(kernel, key_dim, value_dim, dtype, _architecture(device))


def table(kernel: str, key_dim: int, value_dim: int, dtype: torch.dtype, architecture: int) -> Blocks:
    """The guess for a device of compute capability `architecture` (90 for sm_90)."""
    name, decay = kernel.split("/")
    names = KERNELS + DELTA_KERNELS
    if name not in names or decay not in DECAYS:
        raise ValueError(f"tuning: no kernel {kernel!r}; names are {', '.join(names)}, decays {', '.join(DECAYS)}")
    k, v = padded(key_dim), padded(value_dim)
    if max(k, v) > LARGEST_DIM:
        raise ValueError(f"tuning: head dims go to {LARGEST_DIM}, not {key_dim} and {value_dim}")
    if name in DELTA_KERNELS:
        return _delta(name, decay, k, v, dtype)
    largest = STATE_TILE[decay]
    if name in ("apply", "dv"):
        v = min(v, largest // k)
    elif name in ("dq", "dk"):
        k = min(k, largest // v)
    elif name == "summary" or k * v > largest:
        # Only summaries work with any block of both. For dk_dv this says that the sweep has to be made in two.
        k, v = min(k, 128), min(v, largest // min(k, 128))
    low = dtype in (torch.bfloat16, torch.float16)
    chunk = 32 if low and decay != "vector" and max(padded(key_dim), padded(value_dim)) < LARGEST_DIM else 16
    if name == "summary" and low and decay != "vector":
        chunk = 64
    warps = 8 if k * v > 64 * 64 or (decay == "vector" and k * v == 64 * 64) else 4
    stages = 2 if architecture >= 90 and low and name != "dk_dv" else 1
    return {"chunk": chunk, "block_k": k, "block_v": v, "warps": warps, "stages": stages}


def _delta(name: str, decay: str, k: int, v: int, dtype: torch.dtype) -> Blocks:
    """The guess for the delta rule, head dims padded."""
    low = dtype in (torch.bfloat16, torch.float16)
    vector = decay == "vector"
    chunk = 64 if low and not vector else 32
    if name == "delta_prepare":
        k, v, warps = min(k, 32 if vector or not low else 128), 16, 2 if vector else 4
    elif name == "delta_grads":
        small = 32 if max(k, v) <= 64 or not low else 64
        k, v, warps = min(k, 32 if vector or not low else 64), min(v, small), 2 if vector else 8
    else:
        v = min(v, max(16, (64 if low else 16) * 128 // k))
        warps = 8 if chunk == 64 or k * v > 64 * 64 else 4
    return {"chunk": chunk, "block_k": k, "block_v": v, "warps": warps if low else 8, "stages": 1}


def candidates(kernel: str, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> list[Blocks]:
    """What `tune` tries: the table's entry, and its neighbours in each size that is free."""
    guess = table(kernel, key_dim, value_dim, dtype, _architecture(device))
    name, decay = kernel.split("/")
    found = []
    chunks: tuple[int, ...] = (16, 32) if decay == "vector" else (32, 64, 128)
    if name in DELTA_KERNELS:
        chunks = (32, 64) if name == "delta_prepare" else (guess["chunk"],)
    for chunk in chunks:
        for warps in (2, 4, 8) if name in DELTA_KERNELS else (4, 8):
            for stages in (1, 2, 3):
                sized: Blocks = {**guess, "chunk": chunk, "warps": warps, "stages": stages}
                found.append(sized)
                halves_v = name in ("summary", "apply", "dv", "delta_forward", "delta_backward", "delta_grads")
                if halves_v and guess["block_v"] > 32:
                    found.append({**sized, "block_v": guess["block_v"] // 2})
                if name in ("dq", "dk", "delta_prepare", "delta_grads") and guess["block_k"] > 16:
                    found.append({**sized, "block_k": guess["block_k"] // 2})
    found.sort(key=lambda blocks: sum(blocks[size] != guess[size] for size in guess))  # type: ignore[literal-required]
    return found


def tune(
    kernel: str,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    run: Callable[[], object],
    attempts: Iterable[Blocks] | None = None,
) -> Blocks | None:
    """Measure what `run` takes on a CUDA device with each of `attempts` (default: `candidates`), and keep the best.

    A candidate that does not fit the device is passed over. Returns None, and changes nothing, where none fits.
    """
    import triton

    best, least = None, float("inf")
    for blocks in attempts or candidates(kernel, key_dim, value_dim, dtype, device):
        try:
            with forced(kernel, blocks):
                took = _seconds(run, least)
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
            continue
        if took < least:
            best, least = blocks, took
    if best is not None:
        _measured[_key(kernel, key_dim, value_dim, dtype, device)] = best
    return best


def _seconds(run: Callable[[], object], least: float) -> float:
    """Median time of a call; one that warms up, and fewer repeats where the first is twice the best so far."""
    run()
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
        if times[0] > 2 * least:
            break
    return statistics.median(times)


def save(path: Path) -> None:
    """Write what was measured to a JSON file, for LONGCTX_TUNING."""
    path.write_text(json.dumps(_measured, indent=1, sort_keys=True) + "\n")


@contextmanager
def forced(kernel: str, blocks: Blocks) -> Iterator[None]:
    """Within it, `choose_tiles` gives these sizes for a kernel, whatever the shape."""
    _forced[kernel] = blocks
    try:
        yield
    finally:
        del _forced[kernel]


@cache
def _from_file(path: str) -> dict[str, Blocks]:
    """What an earlier process measured; nothing without a path."""
    if not path:
        return {}
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"LONGCTX_TUNING names {path}, which cannot be read: {error}") from error
    sizes = set(Blocks.__annotations__)
    if not isinstance(found, dict) or any(not isinstance(x, dict) or set(x) != sizes for x in found.values()):
        raise ValueError(f"LONGCTX_TUNING names {path}, which is not a table of {', '.join(sorted(sizes))}: tune again")
    return found


@cache
def _architecture(device: torch.device) -> int:
    """Compute capability as one number. The interpreter, on CPU tensors, takes what sm_90 would."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _key(kernel: str, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name} | {kernel} | {padded(key_dim)}x{padded(value_dim)} | {str(dtype).removeprefix('torch.')}"
