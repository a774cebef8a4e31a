"""Arguments of `longctx bench`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from longctx.launch.arguments import at_least, link_speed, two_lengths

app = typer.Typer(no_args_is_help=True, help="Benchmark kernels and sequence-parallel layers.")


@app.command("kernels")
def _kernels(
    tokens: Annotated[str, typer.Option(metavar="N", help="Sequence length in tokens.")] = "64Ki",
    heads: Annotated[int, typer.Option(min=1, metavar="N", help="Number of heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, metavar="N", help="Head dimension.")] = 128,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Dtype of the inputs.")] = "float32",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Device.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", show_default="torch's default", help="CPU threads.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Maximum timed runs; the median is reported.")] = 5,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Measure only this kernel, e.g. lightning. Repeatable.")
    ] = None,
    peers: Annotated[bool, typer.Option(help="Also measure peer libraries, on the same inputs.")] = True,
    peer_seconds: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Skip a peer whose run takes longer than this.")
    ] = 180.0,
    scaling: Annotated[
        str, typer.Option(metavar="N,N|none", help="Compare throughput at these two sequence lengths.")
    ] = "16Ki,1Mi",
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all results as JSON.")] = None,
) -> None:
    """Benchmark kernels against peer libraries and the machine's limits.

    Reports time, tokens per second, FLOP/s and peak memory, forward and forward+backward. Takes minutes per kernel at
    the default size. Exit status 1 if a peer's results differ.
    """
    from longctx.bench.run import KernelOptions
    from longctx.launch.bench import bench_kernels, select_kernels

    options = KernelOptions(
        tokens=at_least(1, "--tokens", tokens),
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        threads=threads,
        repeats=repeats,
        kernels=select_kernels(only or ()),
        peers=peers,
        peer_seconds=peer_seconds,
        scaling=two_lengths("--scaling", scaling),
    )
    raise typer.Exit(bench_kernels(options, json))


@app.command("parallel")
def _parallel(
    ranks: Annotated[int, typer.Option(min=2, metavar="N", help="Number of ranks, on this machine.")] = 4,
    lengths: Annotated[str, typer.Option(metavar="N,...", help="Sequence lengths in tokens.")] = "4Ki,16Ki,64Ki",
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Measure only this method, e.g. lasp2. Repeatable.")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, metavar="N", help="Query heads.")] = 4,
    kv_heads: Annotated[int, typer.Option(min=1, metavar="N", help="Key/value heads of softmax layers.")] = 4,
    head_dim: Annotated[int, typer.Option(min=1, metavar="N", help="Head dimension.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Timed runs; the median is reported.")] = 3,
    softmax_tokens: Annotated[
        str, typer.Option(metavar="N", help="Maximum sequence length for softmax layers.")
    ] = "64Ki",
    gbit: Annotated[
        str, typer.Option(metavar="X|none", help="Emulate a network with links of X Gbit/s (Linux, root).")
    ] = "1",
    delay: Annotated[float, typer.Option(min=0, metavar="MS", help="One-way latency of the emulated links.")] = 0.0,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all results as JSON.")] = None,
) -> None:
    """Benchmark a sequence-parallel layer: time, communication wait, bytes received.

    By default each rank runs in its own network namespace, joined by a bridge, which emulates a network of hosts. With
    --gbit none, ranks communicate through shared memory, or through NCCL if there is a GPU for each.
    """
    from longctx.launch.bench_parallel import ParallelOptions, bench_parallel, select_methods

    options = ParallelOptions(
        ranks=ranks,
        lengths=tuple(at_least(1, "--lengths", part) for part in lengths.split(",")),
        methods=select_methods(only or ()),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        repeats=repeats,
        softmax_tokens=at_least(0, "--softmax-tokens", softmax_tokens),
        gbit=link_speed(gbit),
        delay=delay,
    )
    raise typer.Exit(bench_parallel(options, json))
