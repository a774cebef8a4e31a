"""A process that launches a job of `fake_ranks`: `fake_launcher.py FUNCTION RANKS FOLDER SAVE SETTLE`."""

import sys
from pathlib import Path

from longctx.launch.local import Limits, run_ranks

if __name__ == "__main__":
    function, ranks, folder, save, settle = sys.argv[1:]
    status = run_ranks(
        f"fake_ranks:{function}",
        {"folder": folder},
        ranks=int(ranks),
        logs=Path(folder, "logs"),
        advice="ADVICE",
        limits=Limits(save=float(save), settle=float(settle)),
    )
    sys.exit(status)
