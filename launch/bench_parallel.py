"""`longctx bench parallel`: one layer over several ranks, with and without links between them, as a table."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longctx.bench.layers import METHODS, Task
from longctx.errors import UserError
from longctx.launch.hosts import INTERFACE, address, hosts
from longctx.launch.local import KEEP_MEMORY, threads_per_rank
from longctx.launch.terminal import echo

PORT = 29511
"""Of rank 0, on a host of its own."""
SAY = (
    "One layer with its projections, forward and backward, float32. Seconds are the median of the slowest rank's, the\n"
    "methods of a length taking turns; waited is how long the rank stood still that waited longest, for data or for\n"
    "ranks that had more to do; received are the bytes of the rank that gets most, and least what the schedule's\n"
    "formula says of them."
)


@dataclass(frozen=True)
class Options:
    """What the command was asked for."""

    ranks: int
    lengths: tuple[int, ...]
    methods: tuple[str, ...]
    heads: int
    kv_heads: int
    head_dim: int
    repeats: int
    softmax_tokens: int
    """Softmax layers are measured up to this length."""
    gbit: float | None
    """Speed of each rank's link, each way; None for ranks that share this machine's memory."""
    delay: float
    """Milliseconds that a packet takes to leave its rank."""

    @property
    def kind(self) -> str:
        """`cuda`, with NCCL, where there is a GPU for each rank and links are as they are; else `cpu`, with gloo."""
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return "cuda" if self.gbit is None and gpus >= self.ranks else "cpu"


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """The methods of these names, in the order of the table; all where none is named. Raises UserError."""
    for name in names:
        if name not in METHODS:
            raise UserError(f"--only {name}: there is no such method; there are {', '.join(METHODS)}")
    return tuple(name for name in METHODS if not names or name in names)


def bench_parallel(options: Options, json_file: Path | None) -> int:
    """Measure, print, write; the exit status."""
    if options.heads % options.kv_heads:
        raise UserError(f"--kv-heads {options.kv_heads}: not a divisor of --heads {options.heads}")
    if "ulysses" in options.methods and options.heads % options.ranks:
        raise UserError(f"--heads {options.heads}: Ulysses divides them over {options.ranks} ranks; take a multiple")
    if json_file is not None and not json_file.parent.is_dir():
        raise UserError(f"--json {json_file}: there is no directory {json_file.parent}; make it first")
    shape = (options.heads, options.kv_heads, options.head_dim, options.repeats)
    tasks = [
        Task(method, length, *shape)
        for length in options.lengths
        for method in options.methods
        if not METHODS[method].softmax or length <= options.softmax_tokens
    ]
    if options.kind == "cuda":
        echo(f"{options.ranks} ranks of a GPU each ({torch.cuda.get_device_name()}), NCCL; {len(tasks)} tasks")
    else:
        link = "memory" if options.gbit is None else f"{options.gbit:g} Gbit/s each way"
        each = f"{threads_per_rank(options.ranks)} threads on {os.cpu_count()} processors"
        echo(f"{options.ranks} ranks of {each}, gloo, links: {link}; {len(tasks)} tasks")
    results = _measured(options, tasks)
    console = Console(highlight=False, markup=False, width=132)
    console.print(f"\n{SAY}", soft_wrap=True)
    console.print(_table(results))
    if json_file is not None:
        content = {"options": asdict(options), "results": results}
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


@contextmanager
def _places(options: Options) -> Iterator[tuple[list[list[str]], dict[str, str]]]:
    """How a command begins on each rank's host, and the environment by which ranks find each other."""
    if options.gbit is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        yield [[] for _ in range(options.ranks)], {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return
    with hosts(options.ranks, options.gbit, options.delay) as commands:
        environment = {"MASTER_ADDR": address(0), "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": INTERFACE}
        yield commands, environment


def _measured(options: Options, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Run the ranks to their end; what rank 0 wrote. Raises UserError with a rank's last words where one fails."""
    with tempfile.TemporaryDirectory(prefix="longctx-bench-") as name, _places(options) as (commands, environment):
        folder = Path(name)
        (folder / "tasks.json").write_text(json.dumps([asdict(task) for task in tasks]), encoding="utf-8")
        ranks = []
        for number, command in enumerate(commands):
            files = f"{name}/tasks.json", f"{name}/results.json"
            words = [sys.executable, "-m", "longctx.launch.bench_rank", *files, options.kind]
            with (folder / f"rank-{number}.log").open("wb") as log:
                ranks.append(
                    subprocess.Popen(
                        [*command, *words],
                        stdout=log,
                        stderr=log,
                        env={
                            **KEEP_MEMORY,
                            **os.environ,
                            **environment,
                            "OMP_NUM_THREADS": str(threads_per_rank(options.ranks)),
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
                raise UserError(
                    f"rank {number} ended with status {status}: {lines[-1] if lines else 'it said nothing'}"
                )
        found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return found


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
