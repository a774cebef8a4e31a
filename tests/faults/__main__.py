"""The fault campaign: `python -m tests.faults [KIND …] [--trials N] [--seed N]`, or `make faults` for all of it.

Prints each trial that was not survived with the command that repeats it, and a table: survived of tried.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import damage, disks, fuzz, kills, starts, stops
from tests.faults.faults import Kind, Trial, Workplace, train_as_user

KINDS = (*kills.KINDS, *stops.KINDS, *starts.KINDS, *damage.KINDS, *disks.KINDS, *fuzz.KINDS)


def survives(kind: Kind, seed: int, workplace: Workplace) -> str | None:
    """Try a fault once; return what went wrong, None if nothing did."""
    folder = Path(tempfile.mkdtemp(prefix=f"faults-{kind.name}-"))
    try:
        kind.run(Trial(folder, random.Random(f"{kind.name} {seed}"), workplace))
    except AssertionError as error:
        return str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(kind.name for kind in KINDS))
    parser.add_argument("--trials", type=int, help="trials of each kind, in place of its own number")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first trial; the next has the next")
    arguments = parser.parse_args()
    unknown = {*arguments.kinds} - {kind.name for kind in KINDS}
    if unknown:
        parser.error(f"no such kind: {', '.join(sorted(unknown))}")
    rows, failed, began = [], 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-workplace-") as name:
        workplace = Workplace(Path(name), train_as_user)
        for kind in KINDS:
            if arguments.kinds and kind.name not in arguments.kinds:
                continue
            if not kind.is_possible():
                rows.append(f"| `{kind.name}` | {kind.what} | not tried: needs root, iproute2 and mount |")
                continue
            trials = arguments.trials or kind.trials
            survived = 0
            for seed in range(arguments.seed, arguments.seed + trials):
                problem = survives(kind, seed, workplace)
                survived += problem is None
                if problem is not None:
                    _say(
                        f"{kind.name}: {problem}\n  again: python -m tests.faults {kind.name} --trials 1 --seed {seed}"
                    )
            rows.append(f"| `{kind.name}` | {kind.what} | {survived} of {trials} |")
            failed += trials - survived
            _say(f"{time.monotonic() - began:6.0f} s  {kind.name}: {survived} of {trials}")
    _say("\n".join(["", "| kind | fault, and what survival is | survived |", "|---|---|---|", *rows]))
    return int(failed > 0)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
