"""What ranks run in place of `longctx.launch.train:run_rank`: the same, with what is rare made usual."""

import sys
import time
from typing import Any
from unittest.mock import patch

from torch.distributed.checkpoint import FileSystemWriter

from longctx.launch.train import run_rank


def lazy_switching(**arguments: Any) -> None:
    """A thread that asks for the interpreter waits a second for it: what is a race elsewhere happens at each exit."""
    sys.setswitchinterval(1.0)
    run_rank(**arguments)


def slow_writing(**arguments: Any) -> None:
    """From the second checkpoint on, a rank's tensors take four seconds to write."""
    writes = 0
    write_data = FileSystemWriter.write_data

    def slowly(writer: FileSystemWriter, *parts: Any) -> Any:
        nonlocal writes
        writes += 1
        written = write_data(writer, *parts)
        if writes > 1:
            time.sleep(4)
        return written

    with patch.object(FileSystemWriter, "write_data", slowly):
        run_rank(**arguments)
