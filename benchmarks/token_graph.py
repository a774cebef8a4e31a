"""What routing along a graph of tokens does to a small model: the three routers, trained alike, and similarity with a
quarter of the temperature.

.venv/bin/python benchmarks/token_graph.py data/stdlib [--steps 300] [--seeds 1 2 3] [--out runs/token_graph]

Of each router and seed a model of bytes is trained by `longctx train` on one CPU rank, with the same data in the same
order and, but for what the similarity-aware router has in addition, the same initial weights. Then are shown, as
means over layers: the held-out loss at the end; the entropy of the scores that the choice is made of, over the
training tokens of the last tenth of the steps (r~ of `longctx.moe.token_graph` before the largest are taken: what we
take the entropy of expert selection in Nguyen et al. 2025 to be of); the fluctuation, the share of held-out tokens
whose experts are others than at the evaluation before, at the last one and as the mean over those of the second half;
and how uneven the load was. Runs that are there are not run again.
"""

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from longctx.engines.metrics import FILE_NAME, Metrics, read_metrics

ROUTERS = {
    "token": 'router = "token"',
    "similarity": 'router = "similarity"',
    "similarity-cold": 'router = "similarity"\ntemperature = 0.25',
    "attention": 'router = "attention"',
}
"""By name, their lines of the recipe."""
EXPERTS, ACTIVE = 16, 2
EVALUATIONS = 10
RECIPE = """\
name = "token-graph"
seed = {seed}

[model]
layers = "S"
depth = 3
dim = 64
ffn = "moe"

[model.softmax]
heads = 2

[model.moe]
experts = {experts}
active = {active}
hidden = 32
{router}

[data]
path = "{data}"
sequence_length = 512

[train]
steps = {steps}
sequences_per_step = 4
device = "cpu"
precision = "fp32"

[optimizer]
lr = 2e-3

[schedule]
kind = "wsd"
warmup = {warmup}
decay = {decay}
final = 0.02

[evaluation]
every = {every}
sequences = 16

[checkpoint]
every = {steps}

[logging]
every = 1
"""
HEADS = ("router", "held-out loss", "entropy", "fluctuation, last", "second half", "largest load")


def trained(folder: Path, router: str, seed: int, steps: int, data: Path) -> Metrics:
    """The metrics of one run, from its folder where it is done."""
    out = folder / f"{router}-{seed}-{steps}"
    if not (out / "done").exists():
        out.mkdir(parents=True, exist_ok=True)
        recipe = out / "given.toml"
        text = RECIPE.format(
            seed=seed,
            experts=EXPERTS,
            active=ACTIVE,
            router=ROUTERS[router],
            data=data.resolve(),
            steps=steps,
            warmup=steps // 20,
            decay=steps // 2,
            every=max(1, steps // EVALUATIONS),
        )
        recipe.write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "longctx", "train", str(recipe), "--out", str(out / "run"), "--nproc", "1"]
        with (out / "log").open("w", encoding="utf-8") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
        (out / "done").touch()
    return read_metrics(out / "run" / FILE_NAME)


def row(metrics: Metrics) -> tuple[float, ...]:
    """What is shown of a run, as numbers."""
    last = metrics.steps[-max(1, len(metrics.steps) // 10) :]
    routers = [each for step in last for each in step.routers.values()]
    changes = [statistics.fmean(each.fluctuation.values()) for each in metrics.evaluations if each.fluctuation]
    return (
        metrics.evaluations[-1].loss,
        statistics.fmean(each.entropy for each in routers),
        changes[-1],
        statistics.fmean(changes[len(changes) // 2 :]),
        statistics.fmean(each.imbalance for each in routers),
    )


def line(router: str, rows: Sequence[tuple[float, ...]]) -> str:
    """A line of the table: the mean over seeds, and the least and the most."""
    cells = []
    for values, form in zip(zip(*rows, strict=True), (".4f", ".3f", ".1%", ".1%", ".2f"), strict=True):
        mean, low, high = (format(f(values), form) for f in (statistics.fmean, min, max))
        cells.append(f"{mean} ({low} to {high})" if len(values) > 1 else mean)
    return f"| {router} | {' | '.join(cells)} |"


def main() -> None:
    """Train what is missing, and show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a corpus of bytes, of `longctx data prepare`")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/token_graph"))
    options = parser.parse_args()
    if options.steps < 4:
        parser.error("--steps: fluctuation compares evaluations; give 4 steps or more")
    found: dict[str, list[tuple[float, ...]]] = {router: [] for router in ROUTERS}
    for seed in options.seeds:
        for router in ROUTERS:
            found[router].append(row(trained(options.out, router, seed, options.steps, options.data)))
            print(line(f"{router}, seed {seed}", found[router][-1:]), flush=True)
    print(f"\n{options.steps} steps, {len(options.seeds)} seeds; even scores have entropy {math.log(EXPERTS):.3f}\n")
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    for router, rows in found.items():
        print(line(router, rows))


if __name__ == "__main__":
    main()
