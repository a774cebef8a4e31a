"""Restoring a trained model for inference: the decoder on one device and the tokenizer of its corpus."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from longctx.checkpoint.read import (
    check_format,
    check_same_model,
    list_checkpoints,
    load_tensors,
    read_state,
    verify_content,
)
from longctx.checkpoint.trainer_state import TrainerState
from longctx.checkpoint.weights import stored_config, with_defaults
from longctx.data.blend import train_fingerprint
from longctx.data.manifest import Manifest
from longctx.data.tokenizer import Tokenizer
from longctx.errors import UserError
from longctx.model.decoder import Decoder
from longctx.recipe import Recipe, load
from longctx.train.process_group import device_type

_OPTION = "--checkpoint"
_HOW = f"with {_OPTION} PATH"
_OVERRIDABLE = ("checkpoint.verify", "data.path", "train.device", "train.precision")
"""Recipe keys that may change for inference; all others were fixed by training, or do not apply."""


@dataclass(frozen=True)
class Restored:
    """A trained model and its tokenizer."""

    decoder: Decoder
    tokenizer: Tokenizer
    checkpoint: Path
    state: TrainerState
    same_corpus: bool
    """Whether the tokenizer's corpus, as the recipe reads it, is the one that the model was trained on."""


def restore(run: Path, overrides: Sequence[str] = (), checkpoint: Path | None = None) -> Restored:
    """Restore the model of the directory `run` from its latest checkpoint, or from `checkpoint`.

    Runs in one process, without a process group. `overrides` change the run's recipe, as for training: `data.path`
    (which replaces a mix), `train.device`, `train.precision` and `checkpoint.verify`. In bf16, parameters that training
    keeps in float32 stay float32. Only the manifests of the corpora and the tokenizer file of the first are read.

    Raises UserError if the run has no checkpoint, the checkpoint is damaged or of another model, the tokenizer is
    missing, or another key is overridden.
    """
    whole = _recipe(run, overrides)
    path = checkpoint or _latest_checkpoint(run)
    state = read_state(path, _HOW)
    recipe = _of_stage(whole, path, state)
    check_format(
        path,
        state,
        "torch",
        "Generation needs a checkpoint of the built-in model: convert it with longctx convert from-megatron, and start "
        "a run of engine = 'torch' from the result (train.init)",
    )
    try:
        manifests = [Manifest.read(source.path) for source in recipe.data.sources]
        tokenizer = manifests[0].open_tokenizer(recipe.data.sources[0].path)
    except UserError as error:
        raise UserError(
            f"the tokenizer of {run} is stored with its corpus: {error}. If the corpus has moved, add data.path=DIR"
        ) from None
    rows = recipe.model.vocabulary_rows(tokenizer.vocab_size)
    model = stored_config(recipe.model, rows)
    advice = f"Give a checkpoint of this run with {_OPTION}, or the run that the checkpoint belongs to"
    check_same_model(path, replace(state, model=with_defaults(state.model)), model, advice)
    if recipe.checkpoint.verify == "full":
        verify_content(path, _HOW)
    decoder = _load_decoder(recipe, rows, path)
    same_corpus = state.data == train_fingerprint(recipe.data, manifests, seed=recipe.seed)
    return Restored(decoder, tokenizer, path, state, same_corpus)


def _recipe(run: Path, overrides: Sequence[str]) -> Recipe:
    file = run / "recipe.toml"
    if not file.is_file():
        reason = "it has no recipe.toml" if run.is_dir() else "there is no such directory"
        runs = sorted(str(recipe.parent) for recipe in Path("runs").glob("*/recipe.toml"))
        existing = f" Existing runs: {', '.join(runs)}" if runs else ""
        raise UserError(f"{run} is not a run: {reason}. Give a directory of longctx train, runs/<name>.{existing}")
    for override in overrides:
        if override.partition("=")[0].strip() not in _OVERRIDABLE:
            raise UserError(f"{override}: generation can override only {', '.join(_OVERRIDABLE)} of a run's recipe")
    return load(file, overrides)


def _of_stage(recipe: Recipe, path: Path, state: TrainerState) -> Recipe:
    """Return what a run trained in the stage of a checkpoint: its positions are those of the stage."""
    found = next((stage.recipe for stage in recipe.stages if stage.name == state.stage), None)
    if found is None:
        stage = f"the stage {state.stage!r}" if state.stage is not None else "a run without stages"
        raise UserError(
            f"checkpoint {path} is of {stage}, which is not in the run's recipe.toml. Give a checkpoint of this run "
            f"with {_OPTION}, or the run that the checkpoint belongs to"
        )
    return found


def _latest_checkpoint(run: Path) -> Path:
    checkpoints = list_checkpoints(run / "checkpoints")
    if not checkpoints:
        raise UserError(
            f"{run} has no checkpoint yet: train until the first one (checkpoint.every steps), or give one from "
            f"elsewhere with {_OPTION} PATH"
        )
    return checkpoints[-1]


def _load_decoder(recipe: Recipe, rows: int, path: Path) -> Decoder:
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
        _cast_to_bf16(decoder)
    return decoder.requires_grad_(False).eval()


def _cast_to_bf16(module: nn.Module) -> None:
    """Cast parameters to bf16, except those of full-precision modules, and no buffers: as in training."""
    if getattr(module, "full_precision", False):
        return
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.bfloat16()
    for child in module.children():
        _cast_to_bf16(child)
