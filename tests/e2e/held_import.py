"""`longctx` as a rank of Slurm's that waits while it imports torch, as on a busy file system: `python -m
tests.e2e.held_import train …`.

It leaves the file `importing-RANK`, and waits for the file `go`; with a file `fail`, rank 1 fails there.
"""

import os
import sys
import time
from importlib.abc import MetaPathFinder
from pathlib import Path

from longctx.launch.main import main


class _Held(MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torch":
            rank = os.environ["SLURM_PROCID"]
            Path(f"importing-{rank}").touch()
            while not Path("go").exists():
                time.sleep(0.01)
            if rank == "1" and Path("fail").exists():
                sys.exit(3)


if __name__ == "__main__":
    sys.meta_path.insert(0, _Held())
    main()
