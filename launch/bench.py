"""`longctx bench kernels`: tables of the kernels, their peers and the machine's limits."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from longctx.bench.kernels import KERNELS
from longctx.bench.measure import Measurement
from longctx.bench.run import ROW_SECONDS, Benchmark, KernelOptions, KernelRow, Report, ScalingRow, gib
from longctx.errors import UserError
from longctx.launch.arguments import check_json_file, write_json
from longctx.launch.terminal import echo

WIDTH = 132
"""Columns of the tables, whatever the width of the terminal: a truncated table is unreadable."""
KERNELS_CAPTION = (
    "of limit: minimum FLOPs, as a fraction of the highest {products} rate; of copy: minimum bytes, as a\n"
    "fraction of the copy rate."
)
PEERS_CAPTION = (
    "Same inputs. ratio: their time / our time; share: our memory / their memory; difference: largest relative\n"
    "difference of output and gradients."
)
SCALING_CAPTION = "Tokens per second on a short and a long sequence, with as many heads as fit into memory for both."


def bench_kernels(options: KernelOptions, json_file: Path | None) -> int:
    """Run the benchmark, print tables, write the JSON file; return the exit status, 1 if a peer's results differ."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device; use --device cpu")
    check_json_file(json_file)
    report = Benchmark(options, echo).run()
    console = Console(highlight=False, markup=False, width=WIDTH)
    console.print(_header(report), soft_wrap=True)
    _print(console, "Kernels", _kernels_caption(report), _kernels(report.rows))
    if report.peers:
        versions = ", ".join(sorted({f"{row.distribution} {row.version}" for row in report.peers}))
        _print(console, "Peers", f"{PEERS_CAPTION} {versions}.", _peers(report))
    if report.scaling:
        _print(console, "Scaling", SCALING_CAPTION, _scaling(report.scaling))
    for line in report.notes:
        console.print(line, soft_wrap=True)
    for line in report.disagreements:
        console.print(line, style="red", soft_wrap=True)
    write_json(json_file, asdict(report))
    return 1 if report.disagreements else 0


def _print(console: Console, title: str, text: str, table: Table) -> None:
    console.print(f"\n{title}", style="bold")
    console.print(text, soft_wrap=True)
    console.print(table)


def select_kernels(names: Sequence[str]) -> tuple[str, ...]:
    """Return the kernels of these names in table order; all if none is given. Raises UserError for an unknown name."""
    unknown = [name for name in names if name not in KERNELS]
    if unknown:
        raise UserError(f"--only {unknown[0]}: unknown kernel; the kernels are {', '.join(KERNELS)}")
    return tuple(name for name in KERNELS if not names or name in names)


def _kernels_caption(report: Report) -> str:
    # On a GPU a large matmul has no counterpart in a chunkwise kernel; on a CPU it is the cores' own rate.
    return KERNELS_CAPTION.format(products="batched matmul" if report.machine.device == "cuda" else "product")


def _header(report: Report) -> str:
    machine, options = report.machine, report.options
    batched = ", ".join(f"{shape} {rate / 1e9:.1f}" for shape, rate in machine.batched.items())
    native = f"{machine.native}.\n" if machine.native else ""
    in_cache = "" if machine.in_cache is None else f"in cache {machine.in_cache / 1e9:.1f} GFLOP/s; "
    return (
        f"{machine.name}, {_count(machine.cores, 'core')}, {_count(machine.threads, 'thread')}; "
        f"torch {machine.torch}, Python {machine.python}; "
        f"{machine.dtype}; {options.tokens:,} tokens, {options.heads} heads of {options.head_dim}.\n"
        f"{native}"
        f"Limits: matmul {machine.matmul / 1e9:.1f} GFLOP/s; batched {batched} GFLOP/s;\n"
        f"{in_cache}copy {machine.copy / 1e9:.1f} GB/s, reads plus writes.\n"
        f"Each measurement runs in a fresh process: the median of up to {options.repeats} runs after a warm-up run, "
        f"as many as fit\ninto {ROW_SECONDS:g} s, at least one. Memory is the peak of the first run beyond the "
        "inputs, including results."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _passes(backward: bool) -> str:
    return "fwd+bwd" if backward else "fwd"


def _table(left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(box=None)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _memory(measured: Measurement) -> str:
    if measured.memory is None:
        return "-"
    return gib(measured.memory) if measured.memory >= 2**30 else f"{measured.memory / 2**20:.1f} MiB"


def _kernels(rows: Sequence[KernelRow]) -> Table:
    table = _table(
        ("kernel", "pass"),
        ("runs", "seconds", "tokens/s", "GFLOP/s", "of limit", "of copy", "memory"),
    )
    for row in rows:
        table.add_row(
            row.kernel,
            _passes(row.backward),
            str(len(row.measured.times)),
            f"{row.measured.seconds:.4g}",
            f"{row.tokens_per_second:,.0f}",
            "-" if row.flops_per_second is None else f"{row.flops_per_second / 1e9:.1f}",
            _share(row.of_limit),
            _share(row.of_copy),
            _memory(row.measured),
        )
    return table


def _peers(report: Report) -> Table:
    table = _table(
        ("kernel", "pass", "peer"),
        ("runs", "ours s", "theirs s", "ratio", "ours", "theirs", "share", "difference"),
    )
    ours = {(row.kernel, row.backward): row.measured for row in report.rows}
    for row in report.peers:
        mine = ours[row.kernel, row.backward]
        table.add_row(
            row.kernel,
            _passes(row.backward),
            row.peer,
            str(len(row.measured.times)),
            f"{mine.seconds:.4g}",
            f"{row.measured.seconds:.4g}",
            f"{row.ratio:.2f}",
            _memory(mine),
            _memory(row.measured),
            _share(row.of_memory),
            f"{max(row.differences.values()):.1e}",
        )
    return table


def _scaling(rows: Sequence[ScalingRow]) -> Table:
    short, long = rows[0].tokens
    table = _table(
        ("kernel", "pass"),
        ("heads", f"at {short:,}", f"at {long:,}", "ratio", f"memory at {long:,}"),
    )
    for row in rows:
        table.add_row(
            row.kernel,
            _passes(row.backward),
            str(row.heads),
            *(f"{rate:,.0f}" for rate in row.tokens_per_second),
            f"{row.ratio:.3f}",
            _memory(row.measured[1]),
        )
    return table
