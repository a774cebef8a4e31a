"""Weights on the disk, dense and routed."""

from pathlib import Path

import torch

from longctx.checkpoint.lazy_tensors import LazyTensor
from longctx.checkpoint.weights import Weights, find_weights, stored_config, write_weights
from longctx.model.config import ModelConfig
from longctx.model.decoder import Decoder
from longctx.model.initialise import initialise
from longctx.model.moe import MoeConfig
from longctx.recipe import Recipe
from tests.model.cases import VOCABULARY, hybrid

HOW = "as SOURCE"


def save(path: Path, seed: int = 0, config: ModelConfig | None = None) -> Path:
    """A model of chance, as `longctx convert` would write it; no norm is 1."""
    config = config or hybrid()
    rows = config.vocab_size or VOCABULARY
    model = Decoder(config, rows)
    initialise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in model.state_dict().items():
        value = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        tensors[name] = LazyTensor(value.shape, lambda begin, end, value=value: value[begin:end])
    path.mkdir(parents=True)
    write_weights(path, tensors, stored_config(config, rows), {"seed": seed})
    return path


def values(weights: Weights) -> dict[str, torch.Tensor]:
    """All of them."""
    return {name: weights.read(name) for name in weights.shapes}


def model_of(path: Path, config: ModelConfig, dtype: torch.dtype = torch.float64) -> Decoder:
    """The model with the weights in `path`."""
    model = Decoder(config, VOCABULARY)
    initialise(model, seed=99)
    weights = find_weights(path, HOW)
    weights.check(config, VOCABULARY)
    model.load_state_dict(values(weights))
    return model.to(dtype)


def routed(**changes: object) -> ModelConfig:
    """`hybrid` with experts in the place of its first and third feed-forwards."""
    moe = MoeConfig(**({"experts": 4, "active": 2, "hidden": 10, "bias_rate": 0.1} | changes))
    return hybrid(ffn=("moe", "swiglu"), moe=moe)


def recipe(model: ModelConfig, seed: int = 5) -> Recipe:
    """A recipe that trains a model."""
    tables = {"data": {"path": "nowhere", "sequence_length": 16}, "train": {"steps": 1}, "checkpoint": {"every": 1}}
    return Recipe.model_validate({"name": "routed", "seed": seed, "model": model, **tables})
