"""The table of tile sizes, and what takes its place."""

import json

import pytest
import torch

from longctx.kernels.linear import tuning

CPU = torch.device("cpu")
SIZES = {"chunk": 64, "block_k": 16, "block_v": 32, "warps": 2, "stages": 3}


def kernels(decay):
    """The kernels that a kind of decay has."""
    return (tuning.VECTOR_KERNELS if decay == "vector" else tuning.ADDITIVE_KERNELS) + tuning.DELTA_KERNELS


@pytest.mark.parametrize(
    ("decay", "kernel"), [(decay, kernel) for decay in tuning.DECAY_KINDS for kernel in kernels(decay)]
)
@pytest.mark.parametrize("dims", [(1, 1), (16, 512), (24, 100), (128, 128), (256, 257)], ids=str)
def test_blocks_fit_registers_and_kernels(kernel, decay, dims):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for architecture in (80, 90):
            blocks = tuning.default_tiles(f"{kernel}/{decay}", *dims, dtype, architecture)
            assert blocks["block_k"] * blocks["block_v"] <= 128 * 128
            for size in ("chunk", "block_k", "block_v"):
                assert blocks[size] >= 16
                assert blocks[size].bit_count() == 1
            # These read whole rows of K or V in one program.
            assert kernel not in ("apply", "dv", "delta_forward", "delta_backward") or blocks["block_k"] >= dims[0]
            assert kernel not in ("dq", "dk") or blocks["block_v"] >= dims[1]


def test_candidates_begin_with_the_table():
    for name in (f"{kernel}/{decay}" for decay in ("scalar", "vector") for kernel in kernels(decay)):
        tried = tuning.candidates(name, 128, 128, torch.bfloat16, CPU)
        assert tried[0] == tuning.default_tiles(name, 128, 128, torch.bfloat16, 90)
        assert len({tuple(blocks.values()) for blocks in tried}) == len(tried) > 10


def test_unknown_kernels_and_dims_are_refused():
    with pytest.raises(ValueError, match="unknown kernel 'apply/matrix'"):
        tuning.choose_tiles("apply/matrix", 16, 16, torch.bfloat16, CPU)
    with pytest.raises(ValueError, match="513"):
        tuning.choose_tiles("apply/scalar", 513, 16, torch.bfloat16, CPU)


def test_forced_sizes_hold_inside_only():
    usual = tuning.choose_tiles("dq/scalar", 20, 20, torch.float32, CPU)
    with tuning.override_tiles("dq/scalar", SIZES):
        assert tuning.choose_tiles("dq/scalar", 20, 20, torch.float32, CPU) == SIZES
        assert tuning.choose_tiles("dk/scalar", 20, 20, torch.float32, CPU) != SIZES
    assert tuning.choose_tiles("dq/scalar", 20, 20, torch.float32, CPU) == usual


def test_what_was_measured_is_saved_and_read_in_another_process(tmp_path, monkeypatch):
    # A clock on the CPU: the second attempt is the fastest.
    times = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(tuning, "_tuned", {})
    monkeypatch.setattr(tuning, "_seconds", lambda run, best_seconds: next(times))
    pytest.importorskip("triton")
    attempts = [{**SIZES, "warps": warps} for warps in (1, 2, 4)]
    best = tuning.tune("apply/vector", 20, 20, torch.float32, CPU, lambda: None, attempts)
    assert best == SIZES == tuning.choose_tiles("apply/vector", 32, 17, torch.float32, CPU)
    tuning.save(tmp_path / "tuning.json")
    monkeypatch.setattr(tuning, "_tuned", {})
    assert tuning.choose_tiles("apply/vector", 20, 20, torch.float32, CPU) != SIZES
    monkeypatch.setenv("LONGCTX_TUNING", str(tmp_path / "tuning.json"))
    assert tuning.choose_tiles("apply/vector", 20, 20, torch.float32, CPU) == SIZES
    assert tuning.choose_tiles("apply/vector", 64, 20, torch.float32, CPU) != SIZES


def test_candidates_that_do_not_compile_are_skipped_and_reported(monkeypatch):
    errors = pytest.importorskip("triton.errors")
    triton = pytest.importorskip("triton")
    raised = [
        triton.runtime.errors.OutOfResources(300000, 232448, "shared memory"),
        errors.TritonError("at 1:1: parent layout must have at least rank >= 2"),
        RuntimeError("PassManager::run failed"),
    ]
    failing = {2**n: error for n, error in enumerate(raised)}

    def seconds(run, best_seconds):
        warps = tuning.choose_tiles("dq/scalar", 20, 20, torch.float32, CPU)["warps"]
        if warps in failing:
            raise failing[warps]
        return 1.0

    monkeypatch.setattr(tuning, "_tuned", {})
    monkeypatch.setattr(tuning, "_seconds", seconds)
    attempts = [{**SIZES, "warps": warps} for warps in (1, 2, 4, 8)]
    failures = []
    on_failure = lambda sizes, error: failures.append((sizes, error))  # noqa: E731
    best = tuning.tune("dq/scalar", 20, 20, torch.float32, CPU, lambda: None, attempts, on_failure)
    assert best == attempts[3]
    assert failures == list(zip(attempts, raised, strict=False))
    assert tuning.tune("dq/scalar", 20, 20, torch.float32, CPU, lambda: None, attempts[:3]) is None


def test_a_device_that_fails_ends_the_run(monkeypatch):
    pytest.importorskip("triton")

    def seconds(run, best_seconds):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tuning, "_seconds", seconds)
    with pytest.raises(torch.AcceleratorError):
        tuning.tune("dq/scalar", 20, 20, torch.float32, CPU, lambda: None, [SIZES])


@pytest.mark.parametrize("content", [None, "{", "[1]", json.dumps({"a": {"chunk": 16}})], ids=str)
def test_a_file_that_is_no_table_is_an_error(content, tmp_path, monkeypatch):
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("LONGCTX_TUNING", str(path))
    with pytest.raises(ValueError, match=r"LONGCTX_TUNING names .*broken\.json"):
        tuning.choose_tiles("apply/scalar", 16, 16, torch.float32, CPU)
