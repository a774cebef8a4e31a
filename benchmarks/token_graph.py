"""Token-graph routing experiment: trains a small MoE model with the token, similarity-aware and attention-aware
routers, and with the similarity-aware router at a quarter of the temperature.

.venv/bin/python benchmarks/token_graph.py data/stdlib [--steps 300] [--seeds 1 2 3] [--out runs/token_graph]

For each router and seed, `longctx train` trains a byte-level model on one CPU rank, with the same data order and, but
for the similarity-aware router's extra parameters, the same initial weights. The table has the final held-out loss and,
averaged over layers: the routing entropy over the training tokens of the last tenth of the steps (of r~ of
`longctx.moe.token_graph` before top-k, which we take to be the entropy of expert selection in Nguyen et al. 2025); the
fluctuation, the share of held-out tokens routed to other experts than at the previous evaluation, at the last
evaluation and averaged over the second half of the run; and the maximum load over the mean load. Existing runs are
reused.
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
"""Recipe lines of each router."""
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
HEADS = ("router", "held-out loss", "entropy", "fluctuation, last", "second half", "max load")


def train_or_load(folder: Path, router: str, seed: int, steps: int, data: Path) -> Metrics:
    """Train a run unless its folder has one; return its metrics."""
    out = folder / f"{router}-{seed}-{steps}"
    if not (out / "done").exists():
        out.mkdir(parents=True, exist_ok=True)
        recipe = out / "recipe.toml"
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
    """Compute the table values of a run."""
    last = metrics.steps[-max(1, len(metrics.steps) // 10) :]
    routers = [router for step in last for router in step.routers.values()]
    changes = [statistics.fmean(e.fluctuation.values()) for e in metrics.evaluations if e.fluctuation]
    return (
        metrics.evaluations[-1].loss,
        statistics.fmean(router.entropy for router in routers),
        changes[-1],
        statistics.fmean(changes[len(changes) // 2 :]),
        statistics.fmean(router.imbalance for router in routers),
    )


def line(router: str, rows: Sequence[tuple[float, ...]]) -> str:
    """Format a table row: mean over seeds (minimum to maximum)."""
    cells = []
    for values, form in zip(zip(*rows, strict=True), (".4f", ".3f", ".1%", ".1%", ".2f"), strict=True):
        mean, low, high = (format(f(values), form) for f in (statistics.fmean, min, max))
        cells.append(f"{mean} ({low} to {high})" if len(values) > 1 else mean)
    return f"| {router} | {' | '.join(cells)} |"


def main() -> None:
    """Train missing runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="byte-level corpus of `longctx data prepare`")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/token_graph"))
    options = parser.parse_args()
    if options.steps < 4:
        parser.error("--steps: give 4 or more; fluctuation compares consecutive evaluations")
    rows_of: dict[str, list[tuple[float, ...]]] = {router: [] for router in ROUTERS}
    for seed in options.seeds:
        for router in ROUTERS:
            rows_of[router].append(row(train_or_load(options.out, router, seed, options.steps, options.data)))
            print(line(f"{router}, seed {seed}", rows_of[router][-1:]), flush=True)
    print(f"\n{options.steps} steps, {len(options.seeds)} seeds; uniform scores have entropy {math.log(EXPERTS):.3f}\n")
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    for router, rows in rows_of.items():
        print(line(router, rows))


if __name__ == "__main__":
    main()
