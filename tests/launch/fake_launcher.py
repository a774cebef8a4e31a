"""A process that launches a job of `fake_ranks`: `fake_launcher.py FUNCTION RANKS FOLDER SAVE SETTLE [NODE NODES]`."""

import sys
from pathlib import Path

from longctx.launch.job_environment import Meeting, NodeOfJob
from longctx.launch.local import Limits, run_ranks

if __name__ == "__main__":
    function, ranks, folder, save, settle, *place = sys.argv[1:]
    node = NodeOfJob("a test", *map(int, place), Meeting("localhost", 1)) if place else None
    status = run_ranks(
        f"fake_ranks:{function}",
        {"folder": folder},
        ranks=int(ranks),
        logs=Path(folder, "logs"),
        node=node,
        advice="ADVICE",
        limits=Limits(save=float(save), settle=float(settle)),
    )
    sys.exit(status)
