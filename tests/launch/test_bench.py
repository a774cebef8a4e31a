"""`longctx bench kernels`: its tables, its file, its errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from longctx.bench import peers, rates
from longctx.bench import run as bench
from longctx.bench.kernels import KERNELS
from longctx.kernels.attention import native as attention
from longctx.kernels.native import library
from longctx.launch import main as commands

SMALL = ("--tokens", "512", "--heads", "2", "--head-dim", "8", "--repeats", "1", "--scaling", "64,128")


def invoke(*arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    result = CliRunner().invoke(commands.app, ["bench", "kernels", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements in this process, quickly: their values do not matter here."""

    def run_isolated(threads: int | None, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    monkeypatch.setattr(bench, "run_isolated", run_isolated)
    monkeypatch.setattr(rates, "SECONDS", 0.01)
    monkeypatch.setattr(rates, "COPIED", 2**20)
    monkeypatch.setattr(rates, "LARGE", (64,))
    monkeypatch.setattr(rates, "IN_CACHE", 2)


@pytest.mark.usefixtures("here")
def test_every_kernel_is_printed_and_written(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    status, out, told = invoke(*SMALL, "--json", str(file))
    assert status == 0, told
    found = json.loads(file.read_text(encoding="utf-8"))
    assert [(row["kernel"], row["backward"]) for row in found["rows"]] == [
        (name, backward) for name in KERNELS for backward in (False, True)
    ]
    for row in found["rows"]:
        assert row["measured"]["seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(512 / row["measured"]["seconds"])
        assert (row["flops"] is None) == (row["kernel"] in ("rms-norm", "swiglu"))
        assert row["of_copy"] > 0
        assert row["shape"] == {"tokens": 512, "heads": 2, "head_dim": 8, "dtype": "float32"}
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["options"]["tokens"] == 512
    assert {row["kernel"] for row in found["peers"]} >= {"attention", "rms-norm", "swiglu"}
    for row in found["peers"]:
        assert row["ratio"] > 0
        assert row["version"]
        assert row["differences"]["o"] < 1e-3
    recurrent = [name for name, kernel in KERNELS.items() if kernel.recurrent]
    assert [row["kernel"] for row in found["scaling"]] == [name for name in recurrent for _ in range(2)]
    assert all(row["tokens"] == [64, 128] and row["heads"] == 2 for row in found["scaling"])

    lines = out.splitlines()
    for name, kernel in KERNELS.items():
        shown = [line.split() for line in lines if line.split()[:1] == [name]]
        passes = [row[1] for row in shown]
        tables = 1 + any(row["kernel"] == name for row in found["peers"]) + kernel.recurrent
        assert passes == ["fwd", "fwd+bwd"] * tables, name
    assert f"torch {torch.__version__}" in lines[0]
    assert "512 tokens, 2 heads of 8." in lines[0]
    assert lines[1] == f"{library.describe()}."
    assert "Limits: matmul " in lines[2]
    assert lines[3].startswith("in cache " if attention.is_built() else "copy ")
    assert "of limit: minimum FLOPs, as a fraction of the highest product rate" in out
    assert "lightning, forward and backward\n" in told


@pytest.mark.usefixtures("here")
def test_without_native_kernels_their_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.SWITCH, "0")
    status, out, _ = invoke(*SMALL, "--only", "swiglu", "--no-peers")
    assert status == 0
    assert "torch operators: LONGCTX_NATIVE=0 turns the C++ kernels off." in out.splitlines()
    assert "in cache" not in out


@pytest.mark.usefixtures("here")
def test_a_peer_that_is_not_installed_gives_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    status, out, _ = invoke(*SMALL, "--only", "lightning")
    assert status == 0
    assert (
        "lightning: HF MiniMax skipped: transformers is not installed; pip install -e '.[compare]'" in out.splitlines()
    )


@pytest.mark.usefixtures("here")
def test_a_disagreement_is_reported_by_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BOUNDS", {"float32": -1.0})
    status, out, _ = invoke(*SMALL, "--only", "rms-norm")
    assert status == 1
    assert "rms-norm: torch rms_norm computes something else and is not measured" in out


@pytest.mark.usefixtures("here")
def test_no_peers_and_no_scaling() -> None:
    status, out, _ = invoke(
        "--tokens", "64", "--heads", "1", "--head-dim", "4", "--no-peers", "--scaling", "none", "--only", "lightning"
    )
    assert status == 0
    assert "Kernels" in out.splitlines()
    assert not {"Peers", "Scaling"} & set(out.splitlines())


@pytest.mark.slow
def test_each_measurement_runs_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is: the machine and two passes of a kernel."""
    threads = 1
    status, out, told = invoke(
        *("--tokens", "256", "--heads", "1", "--head-dim", "4", "--threads", str(threads)),
        *("--only", "swiglu", "--no-peers", "--scaling", "none"),
    )
    assert status == 0, told
    assert " cores, 1 thread; " in out or "1 core, 1 thread; " in out
    assert len([line for line in out.splitlines() if line.split()[:1] == ["swiglu"]]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "mamba"), "error: --only mamba: unknown kernel; the kernels are lightning, simple-gla,"),
        (("--tokens", "many"), "error: --tokens: 'many' is not an integer"),
        (("--tokens", "0"), "error: --tokens 0: expected at least 1"),
        (("--scaling", "64"), "error: --scaling 64: expected two lengths, the shorter first"),
        (("--scaling", "64,32"), "error: --scaling 64,32: expected two lengths, the shorter first"),
        (("--scaling", "1,2,3"), "error: --scaling 1,2,3: expected two lengths"),
        (("--json", "nowhere/out.json"), "error: --json nowhere/out.json: there is no directory nowhere"),
        (("--tokens", "1000Gi"), "error: --tokens 1073741824000: q, k, v and o need"),
        (("--dtype", "float16"), "Invalid value for '--dtype'"),
        (("--repeats", "0"), "Invalid value for '--repeats'"),
    ],
)
def test_a_wrong_option_is_refused(arguments: tuple[str, ...], message: str) -> None:
    status, _, told = invoke(*arguments)
    assert status == 2
    assert message in " ".join(told.replace("│", " ").split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_refused_where_there_is_none() -> None:
    status, _, told = invoke("--device", "cuda")
    assert status == 2
    assert "error: --device cuda: torch finds no CUDA device; use --device cpu" in told
