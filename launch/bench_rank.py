"""A rank of `longctx bench parallel`: reads the tasks, measures them with the others, and rank 0 writes the results.

python -m longctx.launch.bench_rank TASKS RESULTS
"""

import json
import os
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from longctx.bench.layers import Task, measure
from longctx.launch.rank import leave
from longctx.parallel.mesh import Mesh

TIMEOUT = 600
"""Seconds that a rank waits for another one."""


def main(tasks: Path, results: Path) -> None:
    """Measure every task, and after each write what there is."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    mesh = Mesh.build("cpu", cp=dist.get_world_size())
    found = []
    for task in json.loads(tasks.read_text(encoding="utf-8")):
        found.append(asdict(measure(Task(**task), mesh)))
        if dist.get_rank() == 0:
            written = results.with_suffix(".part")
            written.write_text(json.dumps(found), encoding="utf-8")
            written.rename(results)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave(0)
