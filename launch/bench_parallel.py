"""`longctx bench parallel`: table of one layer over several ranks, on an emulated network or without."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longctx.bench.layers import METHODS, LayerTask
from longctx.errors import UserError
from longctx.files import temporary_folder
from longctx.launch.arguments import check_json_file, write_json
from longctx.launch.hosts import INTERFACE, hosts
from longctx.launch.rank_settings import rank_settings, threads_per_rank
from longctx.launch.terminal import echo
from longctx.parallel.one_machine import LOOPBACK, STORE

CAPTION = (
    "One layer with its projections, forward and backward, float32; methods of one length are interleaved.\n"
    "seconds: median time of the slowest rank; waited: longest time that a rank was blocked, on data or on slower\n"
    "ranks; received: bytes received, maximum over ranks; least: the same by the schedule's formula."
)


@dataclass(frozen=True)
class ParallelOptions:
    """Options of `longctx bench parallel`."""

    ranks: int
    lengths: tuple[int, ...]
    methods: tuple[str, ...]
    heads: int
    kv_heads: int
    head_dim: int
    repeats: int
    softmax_tokens: int
    """Maximum sequence length for softmax layers."""
    gbit: float | None
    """Link speed per rank and direction; None for ranks without an emulated network."""
    delay: float
    """One-way link latency in milliseconds."""

    @property
    def kind(self) -> str:
        """Device type: `cuda` (NCCL) with a GPU per rank and no emulated network, else `cpu` (gloo)."""
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return "cuda" if self.gbit is None and gpus >= self.ranks else "cpu"


def select_methods(names: Sequence[str]) -> tuple[str, ...]:
    """Return the methods of these names in table order; all if none is given. Raises UserError for an unknown name."""
    for name in names:
        if name not in METHODS:
            raise UserError(f"--only {name}: unknown method; the methods are {', '.join(METHODS)}")
    return tuple(name for name in METHODS if not names or name in names)


def bench_parallel(options: ParallelOptions, json_file: Path | None) -> int:
    """Run the benchmark, print the table, write the JSON file; return the exit status."""
    if options.heads % options.kv_heads:
        raise UserError(f"--kv-heads {options.kv_heads}: must divide --heads {options.heads}")
    if "ulysses" in options.methods and options.heads % options.ranks:
        raise UserError(f"--heads {options.heads}: must be a multiple of --ranks {options.ranks} for ulysses")
    check_json_file(json_file)
    shape = (options.heads, options.kv_heads, options.head_dim, options.repeats)
    tasks = [
        LayerTask(method, length, *shape)
        for length in options.lengths
        for method in options.methods
        if not METHODS[method].softmax or length <= options.softmax_tokens
    ]
    if options.kind == "cuda":
        echo(f"{options.ranks} ranks with one GPU each ({torch.cuda.get_device_name()}), NCCL; {len(tasks)} tasks")
    else:
        link = "shared memory" if options.gbit is None else f"links of {options.gbit:g} Gbit/s per direction"
        threads = f"{threads_per_rank(options.ranks)} threads per rank on {os.cpu_count()} CPUs"
        echo(f"{options.ranks} ranks, {threads}, gloo, {link}; {len(tasks)} tasks")
    results = _measure(options, tasks)
    console = Console(highlight=False, markup=False, width=132)
    console.print(f"\n{CAPTION}", soft_wrap=True)
    console.print(_table(results))
    write_json(json_file, {"options": asdict(options), "results": results})
    return 0


@contextmanager
def _rank_environment(options: ParallelOptions) -> Iterator[tuple[list[list[str]], dict[str, str]]]:
    """Yield each rank's command prefix (to run on its host) and the environment variables of its network."""
    if options.gbit is None:
        yield [[] for _ in range(options.ranks)], LOOPBACK | os.environ
        return
    with hosts(options.ranks, options.gbit, options.delay) as commands:
        yield commands, os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE}


def _measure(options: ParallelOptions, tasks: Sequence[LayerTask]) -> list[dict[str, Any]]:
    """Run the ranks; return rank 0's results. Raises UserError with the last log line of a rank that fails."""
    with (
        temporary_folder("bench") as folder,
        _rank_environment(options) as (commands, environment),
    ):
        (folder / "tasks.json").write_text(json.dumps([asdict(task) for task in tasks]), encoding="utf-8")
        ranks = []
        for number, command in enumerate(commands):
            files = f"{folder}/tasks.json", f"{folder}/results.json"
            arguments = [
                sys.executable,
                "-P",
                "-m",
                "longctx.launch.bench_rank",
                *files,
                options.kind,
                str(os.getpid()),
            ]
            with (folder / f"rank-{number}.log").open("wb") as log:
                ranks.append(
                    subprocess.Popen(
                        [*command, *arguments],
                        stdout=log,
                        stderr=log,
                        env={
                            **environment,
                            **rank_settings(options.ranks),
                            STORE: str(folder / "store"),
                            "RANK": str(number),
                            "LOCAL_RANK": str(number),
                            "WORLD_SIZE": str(options.ranks),
                        },
                    )
                )
        try:
            statuses = [rank.wait() for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        for number, status in enumerate(statuses):
            if status:
                lines = (folder / f"rank-{number}.log").read_text(encoding="utf-8", errors="replace").splitlines()
                raise UserError(f"rank {number} ended with status {status}: {lines[-1] if lines else 'no output'}")
        results: list[dict[str, Any]] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return results


def _table(results: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None)
    for name in ("tokens", "method"):
        table.add_column(name, no_wrap=True)
    for name in ("seconds", "waited", "received", "least", "calls of rank 0"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        task = result["task"]
        table.add_row(
            f"{task['tokens']:,}",
            METHODS[task["method"]].title,
            f"{result['seconds']:.4g}",
            "-" if result["waited"] is None else f"{result['waited']:.4g}",
            _bytes(result["received"]),
            _bytes(result["least"]),
            ", ".join(f"{count} {name}" for name, count in result["calls"].items()),
        )
    return table


def _bytes(number: int) -> str:
    return f"{number / 2**20:,.2f} MiB"
