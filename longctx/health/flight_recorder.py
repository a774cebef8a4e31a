"""NCCL's flight recorder: which collectives each rank has started and finished, written among a run's logs.

On GPUs the host does not wait in collectives, so heartbeats do not show which rank does not come. torch records each
rank's last collectives and writes them when one times out; `torchfrtrace` compares the files of all ranks.
"""

import os
from pathlib import Path

FOLDER = "nccl-trace"
"""The folder, among the logs, of one file per rank, `rank-N`."""
SIZE = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
FILE = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
DUMP = ("TORCH_NCCL_DUMP_ON_TIMEOUT",)
"""Environment variables of torch, by their names since torch 2.11, which are set, and earlier: both are respected."""


def record_collectives(logs: Path) -> None:
    """Have each rank's last 2000 collectives written at a timeout, unless the environment says otherwise.

    To be called before the process group is made. `FOLDER` in `logs` has to exist by the time of a timeout.
    """
    for names, value in ((SIZE, "2000"), (DUMP, "1"), (FILE, str(logs.absolute() / FOLDER / "rank-"))):
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value
