"""The engine that a recipe names."""

import torch.distributed as dist

from longctx.parallel.mesh import Mesh
from longctx.recipe import Recipe
from longctx.train.engine import Engine, TorchEngine


def build_engine(recipe: Recipe, device_type: str, vocab_size: int) -> Engine:
    """Build, shard and initialise the model of a recipe on the ranks of the default process group; each calls it."""
    match recipe.engine:
        case "torch":
            return _torch(recipe, device_type, vocab_size)


def _torch(recipe: Recipe, device_type: str, vocab_size: int) -> TorchEngine:
    parallel, ranks = recipe.parallel, dist.get_world_size()
    shard = ranks // (parallel.dp_replicate * parallel.cp) if parallel.dp_shard == "rest" else parallel.dp_shard
    mesh = Mesh.build(
        device_type,
        dp_replicate=parallel.dp_replicate,
        dp_shard=shard,
        cp=parallel.cp,
        ulysses=parallel.ulysses,
        ep=parallel.ep,
    )
    return TorchEngine(recipe.model, recipe.train, recipe.optimizer, mesh, vocab_size=vocab_size, seed=recipe.seed)
