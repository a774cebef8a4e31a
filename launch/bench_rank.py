"""One rank of `longctx bench parallel`: measures the tasks with the other ranks; rank 0 writes the results.

python -m longctx.launch.bench_rank TASKS RESULTS cpu|cuda PARENT

PARENT is the pid of the benchmark; the rank dies with it.
"""

import json
import os
import sys
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist

from longctx.bench.layers import LayerTask, measure
from longctx.launch.rank import die_with, exit_rank
from longctx.parallel.mesh import Mesh
from longctx.train.process_group import process_group

TIMEOUT = 600
"""Timeout of a collective in seconds."""


def main(tasks: Path, results: Path, kind: str) -> None:
    """Measure the tasks, interleaving those of one length; write the results so far after each length."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with process_group(kind, TIMEOUT):
        mesh = Mesh.build(kind, cp=dist.get_world_size())
        measured = []
        todo = [LayerTask(**task) for task in json.loads(tasks.read_text(encoding="utf-8"))]
        for _, group in groupby(todo, lambda task: task.tokens):
            measured += [asdict(result) for result in measure(list(group), mesh)]
            if dist.get_rank() == 0:
                partial = results.with_suffix(".part")
                partial.write_text(json.dumps(measured), encoding="utf-8")
                partial.rename(results)
        dist.barrier()


if __name__ == "__main__":
    die_with(int(sys.argv[4]))
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    exit_rank(0)
