"""Saves of a checkpoint: how long training waits for one, and until it is complete.

    python -m benchmarks.saves [--megabytes 604] [--saves 4] [--apart SECONDS]

One rank saves a tensor of so many megabytes to a temporary folder (TMPDIR says where), several times: back to back, or
some seconds apart. Printed beside them is the time of a plain copy of the tensor, into memory that has been written to.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from longctx.checkpoint.retention import RetentionPolicy
from longctx.checkpoint.save import Checkpointer
from longctx.checkpoint.trainer_state import TrainerState
from longctx.train.process_group import process_group


def copy_time(tensor: torch.Tensor) -> float:
    """Return the seconds of a copy, the median of five."""
    to, times = torch.zeros_like(tensor), []
    for _ in range(5):
        began = time.perf_counter()
        to.copy_(tensor)
        times.append(time.perf_counter() - began)
    return sorted(times)[2]


def measure(megabytes: int, saves: int, apart: float, folder: Path) -> tuple[list[float], float]:
    """Return the seconds that training waits for each save, and those until the last one is complete."""
    tensor = torch.ones(megabytes * 250_000)
    checkpointer = Checkpointer(folder, RetentionPolicy(2), timeout=600.0)
    stalls, began = [], time.perf_counter()
    for step in range(1, saves + 1):
        began = time.perf_counter()
        checkpointer.save({"tensor": tensor}, TrainerState(step, step, step, "none", {}))
        stalls.append(time.perf_counter() - began)
        if step < saves:
            time.sleep(apart)
    checkpointer.wait()
    complete = time.perf_counter() - began
    checkpointer.close()
    return stalls, complete


def main() -> None:
    """Measure and print, as the module says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saves", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=604)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--apart", type=float, default=0.0)
    arguments = parser.parse_args()
    with process_group("cpu", 600.0), tempfile.TemporaryDirectory() as folder:
        plain = copy_time(torch.ones(arguments.megabytes * 250_000))
        stalls, complete = measure(arguments.megabytes, arguments.saves, arguments.apart, Path(folder))
    waits = ", ".join(f"{stall:.2f}" for stall in stalls)
    sys.stdout.write(f"copy {plain:.2f} s; training waits {waits} s; the last is complete {complete:.1f} s after\n")


if __name__ == "__main__":
    main()
