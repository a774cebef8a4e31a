"""Engine construction: torch, deepspeed or megatron, as the recipe selects."""

import os

import torch.distributed as dist

from longctx.adapters.versions import UnsupportedVersionError
from longctx.engines.base import Engine
from longctx.engines.reproducible import ReproducibleEngine
from longctx.engines.torch_engine import TorchEngine
from longctx.errors import UserError
from longctx.parallel.mesh import Mesh
from longctx.recipe import Recipe
from longctx.recipe.tables import DeepSpeedConfig

CHECKPOINT_FORMATS = {"torch": "torch", "deepspeed": "torch", "megatron": "megatron"}
"""Checkpoint format (`TrainerState.format`) by engine."""


def build_engine(recipe: Recipe, device_type: str, vocab_size: int) -> Engine:
    """Build, shard and initialise a recipe's model on all ranks of the default process group. Collective.

    Raises UserError if the engine's framework is missing, not of a tested version, or cannot run here.
    """
    try:
        match recipe.engine:
            case "torch":
                options = recipe.model, recipe.train, recipe.optimizer, _mesh(recipe, device_type)
                ranks = recipe.parallel.reproducible
                if ranks == "none":
                    return TorchEngine(*options, vocab_size=vocab_size, seed=recipe.seed)
                return ReproducibleEngine(*options, ranks=ranks, vocab_size=vocab_size, seed=recipe.seed)
            case "deepspeed":
                return _deepspeed(recipe, device_type, vocab_size)
            case "megatron":
                from longctx.adapters.megatron.engine import MegatronEngine

                return MegatronEngine(recipe, device_type, vocab_size)
    except UnsupportedVersionError as error:
        raise UserError(f"engine: {recipe.engine!r}: {error}") from error


def _mesh(recipe: Recipe, device_type: str) -> Mesh:
    parallel = recipe.parallel
    shard = parallel.shard(dist.get_world_size())
    assert shard is not None, "recipe.check was not called"
    return Mesh.build(
        device_type,
        dp_replicate=parallel.dp_replicate,
        dp_shard=shard,
        cp=parallel.cp,
        ulysses=parallel.ulysses,
        ep=parallel.ep,
    )


def _deepspeed(recipe: Recipe, device_type: str, vocab_size: int) -> Engine:
    # DeepSpeed picks its accelerator once, at import, and would take an available GPU.
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    from longctx.adapters.deepspeed.engine import ZeroEngine

    return ZeroEngine(
        recipe.model,
        recipe.train,
        recipe.optimizer,
        recipe.deepspeed or DeepSpeedConfig(),
        _mesh(recipe, device_type),
        vocab_size=vocab_size,
        seed=recipe.seed,
    )
