"""The engine that a recipe names."""

import torch.distributed as dist

from longctx.parallel.mesh import Mesh
from longctx.recipe import Recipe
from longctx.train.engine import Engine, TorchEngine

FORMATS = {"torch": "torch", "megatron": "megatron"}
"""The format of the checkpoints that an engine writes and reads (`TrainerState.format`)."""


def build_engine(recipe: Recipe, device_type: str, vocab_size: int) -> Engine:
    """Build, shard and initialise the model of a recipe on the ranks of the default process group; each calls it.

    Raises UserError where the framework of the engine is missing, of another version than was tested, or cannot run
    here.
    """
    match recipe.engine:
        case "torch":
            return _torch(recipe, device_type, vocab_size)
        case "megatron":
            from longctx.adapters.megatron.engine import MegatronEngine

            return MegatronEngine(recipe, vocab_size)


def _torch(recipe: Recipe, device_type: str, vocab_size: int) -> TorchEngine:
    parallel = recipe.parallel
    shard = parallel.shard(dist.get_world_size())
    assert shard is not None, "judged before"
    mesh = Mesh.build(
        device_type,
        dp_replicate=parallel.dp_replicate,
        dp_shard=shard,
        cp=parallel.cp,
        ulysses=parallel.ulysses,
        ep=parallel.ep,
    )
    return TorchEngine(recipe.model, recipe.train, recipe.optimizer, mesh, vocab_size=vocab_size, seed=recipe.seed)
