"""Collectives of the GPU benchmark over all GPUs of a machine, as sequence parallelism calls them (gloo on a CPU)."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from longctx.bench.isolated import report

REPEATS = 10


def collectives(work: str, ranks: int, device: str, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Time the collectives on `ranks` processes of this machine, for tensors of `sizes` bytes a rank."""
    from longctx.launch.local import run_ranks

    file = Path(work, "collectives.json")
    arguments = {"file": str(file), "device": device, "sizes": list(sizes)}
    status = run_ranks("benchmarks.gpu_ranks:rank", arguments, ranks=ranks, logs=Path(work, "logs"))
    if file.exists():
        report({"ranks": ranks, "collectives": json.loads(file.read_text())})
    if status:
        raise RuntimeError(f"the ranks ended with status {status}: see the log")
    return {}


def rank(file: str, device: str, sizes: list[int]) -> None:
    """Time the collectives on this rank; rank 0 writes them to `file` as they come."""
    import torch
    import torch.distributed as dist

    from benchmarks.gpu_timing import synchronize
    from longctx.parallel.mesh import Mesh
    from longctx.train.process_group import process_group

    with process_group(device, 60):
        place = torch.device(device, dist.get_rank()) if device == "cuda" else torch.device(device)
        count = dist.get_world_size()
        Mesh.build(device, cp=count)
        rows: list[dict[str, Any]] = []
        for size in sizes:
            x = torch.ones(size // 4, device=place)
            whole = torch.empty(count * x.numel(), device=place)
            parts = torch.empty(-(-x.numel() // count) * count, device=place)
            after, before = (dist.get_rank() + 1) % count, (dist.get_rank() - 1) % count

            def ring(x: torch.Tensor = x, after: int = after, before: int = before) -> None:
                if after == before == dist.get_rank():
                    return
                received = torch.empty_like(x)
                sends = [dist.P2POp(dist.isend, x, after), dist.P2POp(dist.irecv, received, before)]
                for work in dist.batch_isend_irecv(sends):
                    work.wait()

            calls: dict[str, Callable[[], object]] = {
                "all-reduce": partial(dist.all_reduce, x),
                "all-gather": partial(dist.all_gather_into_tensor, whole, x),
                "all-to-all": partial(dist.all_to_all_single, torch.empty_like(parts), parts),
                "ring": ring,
            }
            for name, call in calls.items():
                for _ in range(2):
                    call()
                synchronize(place)
                dist.barrier()
                began = time.perf_counter()
                for _ in range(REPEATS):
                    call()
                synchronize(place)
                seconds = (time.perf_counter() - began) / REPEATS
                rows.append({"collective": name, "bytes": size, "us": round(1e6 * seconds, 1)})
                if dist.get_rank() == 0:
                    Path(file).write_text(json.dumps(rows))
        dist.barrier()
