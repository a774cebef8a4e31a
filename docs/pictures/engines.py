"""Trains the quickstart on every engine for fifty steps, and draws the picture of docs/engines.md.

PYTHONPATH=. .venv/bin/python docs/pictures/engines.py

from the checkout's root, after `make test-adapters`, which installs the engines, and `make quickstart`, which prepares
the data.

In float32; without a GPU, with the tests' substitutes for the CUDA functions that Megatron-Core calls.
"""

import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from longctx.parallel.local_ranks import LocalRanks
from longctx.train.plot_style import BASELINE, tidy
from tests.adapters.engines import ALONE, OTHERS, Engine, run
from tests.train.runs import losses

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COLOURS = ["#4477aa", "#ee8866", "#44bb99", "#bbcc33", "#aa4499", "#ffaabb"]
OVERRIDES = [
    "train.steps=50", "data.sequence_length=1024", "train.precision=fp32", "schedule.decay=20", "schedule.warmup=5",
    "checkpoint.every=50", "evaluation.every=50", "logging.every=1", f"data.path={ROOT / 'data' / 'stdlib'}",
]  # fmt: skip


def curve(engine: Engine, place: Path) -> list[float]:
    """Return the loss of each step."""
    out = place / str(len(list(place.iterdir())))
    with LocalRanks(engine.ranks, timeout=3000) as ranks:
        ranks.run(run, engine, "quickstart", out, OVERRIDES, size=engine.ranks)
    return losses(out)


def draw(alone: list[float], found: dict[str, list[float]]) -> None:
    """Draw the curves, and each one's relative difference from one rank's."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    steps = range(1, len(alone) + 1)
    left.plot(steps, alone, color=BASELINE, linewidth=4, alpha=0.4, label=ALONE.name)
    for colour, (name, each_step) in zip(COLOURS, found.items(), strict=True):
        left.plot(steps, each_step, color=colour, linewidth=1, label=name)
        apart = [abs(each - one) / one for each, one in zip(each_step, alone, strict=True)]
        right.semilogy(steps, [max(each, 1e-9) for each in apart], color=colour, linewidth=1)
    right.axhline(2.0**-24, color=BASELINE, linewidth=0.8, linestyle="--")
    right.text(1, 2.0**-24 * 1.15, "rounding of float32", color=BASELINE, fontsize=8)
    left.set(xlabel="step", title="Training loss (nats per byte)")
    right.set(xlabel="step", title="Relative difference from one rank of the torch engine")
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        tidy(axes)
    figure.savefig(HERE / "engines.png", dpi=110)


def main() -> None:
    """Train, draw, and print the largest difference of each curve."""
    with tempfile.TemporaryDirectory() as folder:
        alone = curve(ALONE, Path(folder))
        found = {engine.name: curve(engine, Path(folder)) for engine in OTHERS}
    draw(alone, found)
    for name, each_step in found.items():
        most = max(abs(each - one) / one for each, one in zip(each_step, alone, strict=True))
        sys.stdout.write(f"{name}: at most {most:.1e} from one rank, in {len(each_step)} steps\n")


if __name__ == "__main__":
    main()
