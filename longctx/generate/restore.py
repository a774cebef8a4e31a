"""The model that a run has trained, on one device, with the tokenizer of its corpus."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from longctx.checkpoint.save import (
    TrainerState,
    check_format,
    check_same_model,
    list_checkpoints,
    load_tensors,
    read_state,
)
from longctx.checkpoint.weights import described, with_defaults
from longctx.data.loader import train_fingerprint
from longctx.data.manifest import Manifest
from longctx.data.tokenizer import Tokenizer
from longctx.errors import UserError
from longctx.model.decoder import Decoder
from longctx.recipe import Recipe, load
from longctx.train.process_group import device_type

_OPTION = "--checkpoint"
_HOW = f"with {_OPTION} PATH"
_KEYS = ("data.path", "train.device", "train.precision")
"""What of a run's recipe may be another here; all else was decided when it was trained, or has no part in it."""


@dataclass(frozen=True)
class Restored:
    """A trained model, and how its tokens are read."""

    decoder: Decoder
    tokenizer: Tokenizer
    checkpoint: Path
    state: TrainerState
    same_corpus: bool
    """Whether the corpus that gave the tokenizer is the one that the model was trained on, as the recipe reads it."""


def restore(run: Path, overrides: Sequence[str] = (), checkpoint: Path | None = None) -> Restored:
    """The model in the directory `run`, of the newest of its checkpoints or of the one given.

    In one process, without a process group. `overrides` change the run's recipe, as for training: `data.path`,
    `train.device` and `train.precision`. In bf16 what training keeps in float32 stays so. Of the corpus only the
    manifest and the tokenizer's file are read.

    Raises UserError where the run has no checkpoint, the checkpoint is of another model or damaged, the corpus's
    tokenizer is not there, or another key is overridden.
    """
    recipe = _recipe(run, overrides)
    path = checkpoint or _newest(run)
    state = read_state(path, _HOW)
    check_format(
        path,
        state,
        "torch",
        "Text is generated with those of the built-in model: longctx convert from-megatron makes weights of it, with "
        "which a run of engine = 'torch' begins (train.init)",
    )
    try:
        manifest = Manifest.read(recipe.data.path)
        tokenizer = manifest.open_tokenizer(recipe.data.path)
    except UserError as error:
        raise UserError(
            f"the tokenizer of {run} is with its corpus: {error}. Where the corpus is elsewhere now, add data.path=DIR"
        ) from None
    rows = recipe.model.vocabulary_rows(tokenizer.vocab_size)
    model = described(recipe.model, rows)
    advice = f"Give a checkpoint of this run with {_OPTION}, or the run that this one belongs to"
    check_same_model(path, replace(state, model=with_defaults(state.model)), model, advice)
    decoder = _load(recipe, rows, path)
    same = state.data == train_fingerprint(manifest, recipe.data, seed=recipe.seed)
    return Restored(decoder, tokenizer, path, state, same)


def _recipe(run: Path, overrides: Sequence[str]) -> Recipe:
    file = run / "recipe.toml"
    if not file.is_file():
        lacks = "it has no recipe.toml" if run.is_dir() else "there is no such directory"
        runs = sorted(str(found.parent) for found in Path("runs").glob("*/recipe.toml"))
        there = f" There: {', '.join(runs)}" if runs else ""
        raise UserError(f"{run} is no run: {lacks}. Give the directory that longctx train wrote, runs/<name>.{there}")
    for override in overrides:
        if override.partition("=")[0].strip() not in _KEYS:
            raise UserError(f"{override}: of a run's recipe only {', '.join(_KEYS)} may be another in generation")
    return load(file, overrides)


def _newest(run: Path) -> Path:
    there = list_checkpoints(run / "checkpoints")
    if not there:
        raise UserError(
            f"{run} has no checkpoint yet: train until the first (checkpoint.every steps), or name one of another "
            f"directory with {_OPTION} PATH"
        )
    return there[-1]


def _load(recipe: Recipe, rows: int, path: Path) -> Decoder:
    device = device_type(recipe.train)
    with torch.device("meta"):
        decoder = Decoder(recipe.model, rows)
    decoder.to_empty(device=device)
    for module in decoder.modules():
        reset = getattr(module, "reset_buffers", None)
        if reset is not None:
            reset()
    load_tensors(path, {"model": decoder.state_dict()}, _HOW)
    if recipe.train.precision == "bf16":
        _round(decoder)
    return decoder.requires_grad_(False).eval()


def _round(module: nn.Module) -> None:
    """Parameters to bf16, but for those whose layers need them exact, and for buffers: as in training."""
    if getattr(module, "full_precision", False):
        return
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.bfloat16()
    for child in module.children():
        _round(child)
