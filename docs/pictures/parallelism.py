"""Draws the pictures of docs/parallelism.md, from the library's own layouts, byte counts and cost model.

.venv/bin/python docs/pictures/parallelism.py
"""

import random
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from longctx.kernels.attention.masks import CAUSAL_MASK
from longctx.parallel.attention.cost_model import AttentionShape, estimates
from longctx.parallel.attention.visibility import score_elements
from longctx.parallel.layout import Layout
from longctx.parallel.link_speeds import Speeds
from longctx.parallel.mesh import Grid

HERE = Path(__file__).parent
COLOURS = ["#4477aa", "#ee8866", "#44bb99", "#bbcc33", "#aa4499", "#ffaabb", "#99ddff", "#dddddd"]
RANKS = 4
GREY = "#555555"


def packed(tokens: int, seed: int) -> tuple[int, ...]:
    """Documents of log-normal lengths, as in text."""
    chance, bounds = random.Random(seed), [0]
    while bounds[-1] < tokens:
        bounds.append(min(tokens, bounds[-1] + max(1, int(chance.lognormvariate(7.2, 1.4)))))
    return tuple(bounds)


def layouts() -> None:
    """Who holds which tokens, and how much causal work that is."""
    tokens = 16_384
    rows = [(name, (0, tokens), order) for name, order in (("one document", o) for o in ("contiguous", "zigzag"))]
    rows += [("packed", packed(tokens, 3), order) for order in ("contiguous", "zigzag", "balanced")]
    figure, axes = plt.subplots(len(rows), 2, figsize=(11, 4.6), width_ratios=[4, 1], constrained_layout=True)
    for (left, right), (name, bounds, order) in zip(axes, rows, strict=True):
        layout = Layout(bounds, order, RANKS)
        for number, owner in enumerate(layout.owners):
            left.barh(0, layout.piece_length, left=number * layout.piece_length, color=COLOURS[owner], height=1)
            left.text((number + 0.5) * layout.piece_length, 0, str(owner), ha="center", va="center", color="white")
        for bound in bounds[1:-1]:
            left.plot([bound, bound], [-0.5, 0.5], color="black", linewidth=1)
        left.set(xlim=(0, tokens), ylim=(-0.5, 0.5), yticks=[0], yticklabels=[f"{name}\n{order}"], xticks=[])
        work = np.array([score_elements(layout.for_rank(rank)) for rank in range(RANKS)])
        share = work / work.mean()
        right.bar(range(RANKS), share, color=COLOURS[:RANKS])
        right.axhline(1, color="black", linewidth=0.8)
        right.text(1.02, 0.5, f"most: {share.max():.2f}", transform=right.transAxes, va="center", fontsize=9)
        right.set(xticks=range(RANKS), xticklabels=[], ylim=(0, 2), yticks=[])
        for axis in (left, right):
            axis.spines[:].set_visible(False)
    axes[0, 0].set_title("the sequence, and the rank that holds each piece (lines: documents begin)", fontsize=10)
    axes[0, 1].set_title("causal work / mean", fontsize=10)
    axes[-1, 1].set_xticklabels([f"{rank}" for rank in range(RANKS)])
    figure.savefig(HERE / "layouts.png", dpi=110)


def _lane(axis: Axes, rank: int, begin: float, end: float, text: str, colour: str) -> None:
    axis.barh(-rank, end - begin, left=begin, height=0.62, color=colour, edgecolor="white")
    axis.text((begin + end) / 2, -rank, text, ha="center", va="center", fontsize=7.5, color="black")


def _arrow(axis: Axes, begin: tuple[float, int], end: tuple[float, int]) -> None:
    style = {"arrowstyle": "-|>", "color": GREY, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", xy=(end[0], -end[1]), xytext=(begin[0], -begin[1]), arrowprops=style)


def schedules() -> None:
    """What each rank computes and what travels meanwhile, forward: drawn, not measured."""
    figure, axes = plt.subplots(3, 2, figsize=(12, 8), constrained_layout=True)
    first, second, third = COLOURS[:3]
    axis = axes[0, 0]
    axis.set_title("LASP-2: one all-gather of states, behind the work that needs none")
    for rank in range(RANKS):
        _lane(axis, rank, 0, 2, "k, v: own state", first)
        _lane(axis, rank, 2, 3.4, "q, output gate", third)
        _lane(axis, rank, 3.4, 5.8, "outputs, with the state before", second)
        for other in range(RANKS):
            if other != rank:
                _arrow(axis, (2, rank), (3.35, other))
    axis = axes[0, 1]
    axis.set_title("LASP-1: the state goes from rank to rank")
    for rank in range(RANKS):
        _lane(axis, rank, 0, 2, "k, v: own state", first)
        _lane(axis, rank, 2, 3.4, "q, output gate", third)
        at = 3.4 + 0.7 * rank
        _lane(axis, rank, at, at + 2.4, "outputs", second)
        if rank + 1 < RANKS:
            _arrow(axis, (at, rank), (at + 0.65, rank + 1))
    axis = axes[1, 0]
    axis.set_title("ring, contiguous: who comes first in the sequence has nothing to do")
    for rank in range(RANKS):
        for step in range(RANKS):
            if step <= rank:
                text = "own keys" if step == 0 else f"keys of {rank - step}"
                begin = 0 if step == 0 else 0.8 + 1.5 * (step - 1)
                _lane(axis, rank, begin, begin + (0.8 if step == 0 else 1.5), text, COLOURS[(rank - step) % RANKS])
    axis = axes[1, 1]
    axis.set_title("ring, zigzag: half of each block is seen, by all at the same time")
    for rank in range(RANKS):
        for step in range(RANKS):
            source = (rank - step) % RANKS
            begin = 0 if step == 0 else 0.8 + 0.75 * (step - 1)
            end = begin + (0.8 if step == 0 else 0.75)
            _lane(axis, rank, begin, end, "own" if step == 0 else f"of {source}", COLOURS[source])
            if step + 1 < RANKS:
                _arrow(axis, (begin + 0.05, rank), (end - 0.02, (rank + 1) % RANKS))
    axis = axes[2, 0]
    axis.set_title("all-gather of keys by slices of heads: one travels while one is computed with")
    for rank in range(RANKS):
        _lane(axis, rank, 0, 0.5, "wait", COLOURS[7])
        for part in range(4):
            _lane(axis, rank, 0.5 + 1.1 * part, 1.6 + 1.1 * part, f"heads {part}", COLOURS[part])
    for part in range(3):
        for rank in range(RANKS):
            _arrow(axis, (0.6 + 1.1 * part, rank), (1.55 + 1.1 * part, (rank + 1) % RANKS))
    axis = axes[2, 1]
    axis.set_title("Ulysses: all tokens of some heads, and back")
    for rank in range(RANKS):
        _lane(axis, rank, 0, 0.9, "wait", COLOURS[7])
        _lane(axis, rank, 0.9, 4.4, f"heads {rank} of all tokens", COLOURS[rank])
        _lane(axis, rank, 4.4, 5.2, "wait", COLOURS[7])
        for other in range(RANKS):
            if other != rank:
                _arrow(axis, (0, rank), (0.88, other))
                _arrow(axis, (4.4, rank), (5.18, other))
    for axis in axes.flat:
        axis.set(yticks=[-rank for rank in range(RANKS)], yticklabels=[f"rank {rank}" for rank in range(RANKS)])
        axis.set(xticks=[], xlabel="time", xlim=(-0.05, 8.1 if axis in axes[0] else 6.1), ylim=(-RANKS + 0.4, 0.6))
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    figure.savefig(HERE / "schedules.png", dpi=110)


HEADS, KV_HEADS, HEAD_DIM, NUMBER, CP, INNER = 32, 8, 128, 2, 8, 4
LENGTHS = [2**n for n in range(13, 24)]


def _estimates(tokens: int, kv_heads: int, speeds: Speeds) -> dict[str, float]:
    layout = Layout((0, tokens), "zigzag", CP, grid=Grid(INNER, None, None), speeds=speeds)
    shape = AttentionShape(HEADS, kv_heads, HEAD_DIM, HEAD_DIM, NUMBER, CAUSAL_MASK)
    return {each.schedule: each for each in estimates(layout, shape)}


SPEEDS = Speeds(bandwidth=25e9, latency=20e-6, flops=400e12)
NAMES = ["ring", "all-gather", "ulysses", "ulysses-ring", "ulysses-all-gather"]


def bytes_received() -> None:
    """Bytes of a layer, forward and backward, by the length of the sequence."""
    figure, axis = plt.subplots(figsize=(8, 4.6), constrained_layout=True)
    for name, colour in zip(NAMES, COLOURS, strict=False):
        received = [_estimates(tokens, KV_HEADS, SPEEDS)[name].received for tokens in LENGTHS]
        axis.plot(LENGTHS, received, color=colour, marker="o", markersize=3, label=f"softmax, {name}")
    state = HEADS * HEAD_DIM**2 * 4
    for pieces, style, order in ((1, "-", "contiguous"), (2, "--", "zigzag")):
        total = 2 * (CP - 1) * pieces * (state + 4 * HEADS)
        axis.plot(LENGTHS, [total] * len(LENGTHS), color="black", linestyle=style, label=f"lightning, LASP-2, {order}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set(xlabel="tokens of the sequence", ylabel="bytes that a rank receives")
    axis.set_xticks(LENGTHS[1::3], [f"{n >> 10}Ki" if n < 2**20 else f"{n >> 20}Mi" for n in LENGTHS[1::3]])
    axis.set_title(
        f"one layer, forward and backward: {HEADS} heads of {HEAD_DIM}, {KV_HEADS} key/value heads, bf16, {CP} ranks",
        fontsize=10,
    )
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(HERE / "bytes.png", dpi=110)


def chosen() -> None:
    """What `auto` takes, by length and bandwidth."""
    bandwidths = np.geomspace(1e9, 400e9, 40)
    lengths = np.geomspace(2**13, 2**23, 41).astype(int) // CP * CP
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), constrained_layout=True, sharey=True)
    for axis, kv_heads in zip(axes, (KV_HEADS, HEADS), strict=True):
        best = np.zeros((len(bandwidths), len(lengths)))
        for row, bandwidth in enumerate(bandwidths):
            speeds = replace(SPEEDS, bandwidth=float(bandwidth))
            for column, tokens in enumerate(lengths):
                found = _estimates(int(tokens), kv_heads, speeds)
                best[row, column] = NAMES.index(min(found.values(), key=lambda each: each.seconds).schedule)
        axis.pcolormesh(
            lengths, bandwidths / 1e9, best, cmap=ListedColormap(COLOURS[: len(NAMES)]), vmin=-0.5,
            vmax=len(NAMES) - 0.5, shading="nearest",
        )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        ticks = LENGTHS[::2]
        axis.set_xticks(ticks, [f"{n >> 10}Ki" if n < 2**20 else f"{n >> 20}Mi" for n in ticks], fontsize=8)
        axis.set(xlabel="tokens of the sequence (one document)")
        axis.set_title(f"{HEADS} query heads, {kv_heads} key/value heads", fontsize=10)
    axes[0].set_ylabel("GB/s that a rank receives")
    patches = [Patch(color=colour, label=name) for name, colour in zip(NAMES, COLOURS, strict=False)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(NAMES), fontsize=9)
    figure.savefig(HERE / "chosen.png", dpi=110)


if __name__ == "__main__":
    layouts()
    schedules()
    bytes_received()
    chosen()
