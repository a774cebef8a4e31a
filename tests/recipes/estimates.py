"""What the heads of the recipes say of memory and FLOPs, computed from the recipes.

`python -m tests.recipes.estimates` writes these lines into the heads.
"""

import re

import torch

from longctx.launch.recipes import parameters
from longctx.model.decoder import Decoder
from longctx.parallel.layout import Layout
from longctx.recipe import Recipe, load
from longctx.recipe.sources import shipped_folder

CLUSTER = sorted(
    path.stem
    for path in shipped_folder().glob("*.toml")
    if path.stem not in ("curriculum", "million", "quickstart", "routed")
)
"""Recipes of published models, for GPUs; the others are for two CPU ranks."""
ADAMW_BYTES = 16
"""Per parameter: itself, its gradient and two moments, in float32."""
PASSES = 3
"""A forward pass, and a backward pass of twice its operations."""
PEAK, UTILISATION = 989e12, 0.4
"""Dense bf16 operations per second of an H100 (its data sheet), and the share that the heads assume."""


def state_bytes(recipe: Recipe) -> float:
    """Bytes per GPU of parameters, gradients and moments, which are sharded over all GPUs."""
    return ADAMW_BYTES * parameters(recipe) / recipe.fewest_ranks


def block_input_bytes(recipe: Recipe) -> int:
    """Bytes per GPU of what activation checkpointing keeps, in bf16, in the stage where it is most."""
    tokens = max(stage.recipe.data.sequence_length // stage.recipe.parallel.cp for stage in recipe.stages)
    return 2 * tokens * recipe.model.depth * recipe.model.dim


def training_flops(recipe: Recipe) -> float:
    """Operations of the whole run, without recomputation, each sequence one document."""
    with torch.device("meta"):
        decoder = Decoder(recipe.model, recipe.model.vocabulary_rows(257))
    return sum(
        PASSES
        * decoder.flops(Layout((0, stage.recipe.data.sequence_length)))
        * stage.recipe.train.sequences_per_step
        * stage.recipe.train.steps
        for stage in recipe.stages
    )


def memory_line(recipe: Recipe) -> str:
    """The head's line on memory."""
    state, inputs = state_bytes(recipe) / 2**30, block_input_bytes(recipe) / 2**30
    return (
        f"# Memory per GPU: {state:.1f} GiB of float32 parameters, gradients and AdamW moments, "
        f"{inputs:.1f} GiB of block inputs."
    )


def flops_line(recipe: Recipe) -> str:
    """The head's line on operations and time."""
    flops, gpus = training_flops(recipe), recipe.fewest_ranks
    days = flops / (gpus * PEAK * UTILISATION * 86400)
    return (
        f"# FLOPs: {flops:.1e}, {days:.1f} days on {gpus} H100 at an assumed {100 * UTILISATION:.0f} % of "
        f"{PEAK / 1e12:.0f} TFLOP/s."
    )


def with_estimates(text: str, recipe: Recipe) -> str:
    """The text of a recipe with both lines as they should be."""
    for begin, line in (("# Memory per GPU:", memory_line(recipe)), ("# FLOPs:", flops_line(recipe))):
        text = re.sub(rf"^{begin}.*$", line, text, flags=re.MULTILINE)
    return text


if __name__ == "__main__":
    for name in CLUSTER:
        path = shipped_folder() / f"{name}.toml"
        path.write_text(with_estimates(path.read_text(encoding="utf-8"), load(name)), encoding="utf-8")
