"""The Triton kernels of block attention: that they skip what nobody sees, and that they compile for GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install -e '.[triton]'")

from longctx.kernels.attention import triton as attention_triton
from longctx.kernels.attention.masks import IntervalMask, query_bounds, sliding_window, visible_tiles
from longctx.kernels.attention.triton import BACKWARD, FORWARD, SMALL, TileConfig, tile_config
from tests.combinations import mostly_slow
from tests.kernels.attention.cases import draw, gathered, masks

TILE = TileConfig(16, 16, 4, 1)
CASES = {
    "window": sliding_window(48, 48, IntervalMask(window=9)),
    "zigzag halves, window": masks()["zigzag halves, window"],
    "zigzag halves, documents, window": masks()["zigzag halves, documents, window"],
    "gathered, window": gathered(24, 60, IntervalMask(window=4), batch=1, heads=2),
}
each_case = pytest.mark.parametrize("name", mostly_slow(CASES, "zigzag halves, documents, window", "gathered, window"))
in_interpreter = pytest.mark.skipif(
    not attention_triton.INTERPRETED, reason="needs Triton's interpreter: TRITON_INTERPRET=1"
)


def without(x, kept):
    """x with NaN in the rows that are not kept."""
    hidden = torch.full_like(x, float("nan"))
    hidden[:, kept] = x[:, kept]
    return hidden


@in_interpreter
@each_case
def test_a_query_tile_reads_no_key_tile_that_it_does_not_see(name):
    mask = CASES[name]
    queries, keys = mask.query.shape[-1], len(mask.key)
    q, k, v, do = draw(queries, keys, 2, 1, 16, 16, batch=1, dtype=torch.float32)
    out, lse = attention_triton.forward(q, k, v, mask, 0.3, TILE)
    dq, _, _ = attention_triton.backward(do, q, k, v, out, lse, mask, 0.3, TILE)
    begin, end = (x[0, 1] if x.dim() == 3 else x for x in mask.bounds)
    skipped = 0
    for tile in range(-(-queries // 16)):
        seen = [j for i, run in visible_tiles(begin, end, 16, 16) for j in run if i == tile]
        kept = torch.isin(torch.arange(keys) // 16, torch.tensor(seen, dtype=torch.int64))
        skipped += int((~kept).sum())
        rows = slice(tile * 16, tile * 16 + 16)
        hidden = without(k, kept), without(v, kept)
        got, got_lse = attention_triton.forward(q, *hidden, mask, 0.3, TILE)
        got_dq, _, _ = attention_triton.backward(do, q, *hidden, out, lse, mask, 0.3, TILE)
        # NaN times a weight of 0 is NaN: it shows wherever a tile is computed.
        assert torch.equal(got[0, rows, 1], out[0, rows, 1])
        assert torch.equal(got_lse[0, 1, rows], lse[0, 1, rows])
        assert torch.equal(got_dq[0, rows, 1], dq[0, rows, 1])
    assert skipped > 0


@in_interpreter
@each_case
def test_a_key_tile_reads_no_query_tile_that_does_not_see_it(name):
    mask = CASES[name]
    queries, keys = mask.query.shape[-1], len(mask.key)
    q, k, v, do = draw(queries, keys, 2, 2, 16, 16, batch=1, dtype=torch.float32)
    out, lse = attention_triton.forward(q, k, v, mask, 0.3, TILE)
    _, dk, dv = attention_triton.backward(do, q, k, v, out, lse, mask, 0.3, TILE)
    first, last = query_bounds(*mask.bounds, keys, 16)
    skipped = 0
    for tile in range(-(-keys // 16)):
        top, bottom = (int(x[0, 1, tile] if x.dim() == 3 else x[tile]) for x in (first, last))
        row = torch.arange(queries)
        kept = (row >= top) & (row < bottom)
        skipped += int((~kept).sum())
        hidden = without(do, kept), without(q, kept)
        _, got_dk, got_dv = attention_triton.backward(*hidden, k, v, without(out, kept), lse, mask, 0.3, TILE)
        rows = slice(tile * 16, tile * 16 + 16)
        assert torch.equal(got_dk[0, rows, 1], dk[0, rows, 1])
        assert torch.equal(got_dv[0, rows, 1], dv[0, rows, 1])
    assert skipped > 0


def test_the_table_gives_a_tile_for_every_head_dim():
    assert tile_config(FORWARD, 1, torch.bfloat16, (9, 0)) == FORWARD[64]
    assert tile_config(FORWARD, 65, torch.bfloat16, (9, 0)) == FORWARD[128]
    assert tile_config(BACKWARD, 256, torch.float16, (8, 0)) == BACKWARD[256]
    assert tile_config(BACKWARD, 128, torch.float32, (9, 0)) == SMALL[128]
    assert tile_config(FORWARD, 128, torch.bfloat16, (8, 9)) == SMALL[128]


@pytest.mark.parametrize(
    ("capability", "head_dims", "dtypes"),
    [
        ((9, 0), "80", "bf16"),
        pytest.param((8, 0), "64 128 256", "bf16 fp32", marks=pytest.mark.slow),
        pytest.param((9, 0), "64 128 256", "bf16 fp32", marks=pytest.mark.slow),
        pytest.param((10, 0), "64 128 256", "bf16 fp32", marks=pytest.mark.slow),
        pytest.param((8, 9), "64 128 256", "bf16 fp32", marks=pytest.mark.slow),
        pytest.param((12, 0), "64 128 256", "bf16 fp32", marks=pytest.mark.slow),
    ],
)
def test_the_kernels_compile_without_a_gpu_and_fit_into_shared_memory(capability, head_dims, dtypes):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    arguments = [f"{capability[0]}.{capability[1]}", head_dims, dtypes]
    root = Path(__file__).parents[3]
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.attention.compile_triton", *arguments],
        capture_output=True, text=True, cwd=root, env=environment, timeout=280, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 3 * len(head_dims.split()) * len(dtypes.split())
    limit = (160 if capability in attention_triton.ROOMY else 99) * 1024
    for kernel, shared in lines:
        assert int(shared) <= limit, f"{kernel} wants {shared} bytes of shared memory"
