"""A rank of `longctx bench parallel`: reads the tasks, measures them with the others, and rank 0 writes the results.

python -m longctx.launch.bench_rank TASKS RESULTS cpu|cuda
"""

import json
import os
import sys
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist

from longctx.bench.layers import Task, measure
from longctx.launch.rank import leave
from longctx.parallel.mesh import Mesh
from longctx.train.process_group import process_group

TIMEOUT = 600
"""Seconds that a rank waits for another one."""


def main(tasks: Path, results: Path, kind: str) -> None:
    """Measure the tasks, those of one length in turns, and after each length write what there is."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with process_group(kind, TIMEOUT):
        mesh = Mesh.build(kind, cp=dist.get_world_size())
        found = []
        todo = [Task(**task) for task in json.loads(tasks.read_text(encoding="utf-8"))]
        for _, group in groupby(todo, lambda task: task.tokens):
            found += [asdict(result) for result in measure(list(group), mesh)]
            if dist.get_rank() == 0:
                written = results.with_suffix(".part")
                written.write_text(json.dumps(found), encoding="utf-8")
                written.rename(results)
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    leave(0)
