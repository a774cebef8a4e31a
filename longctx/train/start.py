"""Start of a run: its data, and the checkpoint or the weights that it starts from, checked before anything is built."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from longctx.checkpoint.compare_models import position_changes, tensor_differences
from longctx.checkpoint.copies import CheckpointCopies
from longctx.checkpoint.read import check_format, check_same_model, list_checkpoints, read_state, verify_content
from longctx.checkpoint.trainer_state import TrainerState
from longctx.checkpoint.weights import Weights, find_weights, stored_config, with_defaults
from longctx.data.blend import BlendedStream, heldout_sequences, train_stream
from longctx.data.loader import Sequence as Packed
from longctx.errors import UserError
from longctx.parallel.rank_errors import raise_on_all_ranks
from longctx.recipe import Recipe
from longctx.recipe.schema import Stage
from longctx.train.build_engine import CHECKPOINT_FORMATS
from longctx.train.kept_checkpoints import unknown_best_warning
from longctx.train.resume_copy import open_copies
from longctx.train.stages import find_stage


@dataclass(frozen=True)
class StageData:
    """What a stage is trained and evaluated on."""

    stream: BlendedStream
    heldout: Sequence[Packed] | None
    """Sequences of evaluation; None without one."""
    heldout_fingerprint: str | None
    vocab_size: int
    """Rows of the vocabulary."""


@dataclass(frozen=True)
class Start:
    """What a run starts from: the same on every rank."""

    stage: Stage
    """The stage that is trained."""
    data: StageData
    model: dict[str, Any]
    """The model's configuration, as checkpoints store it."""
    format: str
    """Format of the checkpoint's tensors."""
    source: Path | None
    """The checkpoint that the run resumes from; None if it does not."""
    state: TrainerState
    """The state of `source`, or that of a fresh run or stage."""
    weights: Weights | None
    """Initial weights of a fresh run, or of a stage with new optimizer states; None: it resumes, or they are random."""
    optimizer: Path | None
    """The checkpoint whose weights and optimizer states are loaded; None: optimizer states are new."""
    position_changes: list[str]
    """What differs in positions and masks from the model that the weights are of."""
    unverified: bool
    """Whether the files of the start were to be compared with their checksums, and have none."""
    copies: CheckpointCopies | None
    """Where checkpoints are copied to; None: nowhere."""

    @property
    def begins_stage(self) -> bool:
        """Whether a stage after the first begins with the checkpoint of the one before."""
        return self.source is not None and self.stage.number > 0 and self.state.step == self.state.stage_start


def find_start(
    recipe: Recipe, out: Path, resume: str, say: Callable[[str], None], only_stage: str | None = None
) -> Start:
    """Find what a run starts from and check it against the recipe. Collective.

    `resume` and `only_stage`: as for `train`. `say` is called on rank 0 before what takes long. Raises UserError, on
    every rank, if data, checkpoint or weights do not fit the recipe, are damaged, or are not the same on all ranks.
    """
    url = recipe.checkpoint.copy_to
    copies = None if url is None else open_copies(url, out, resume, say)
    with raise_on_all_ranks():
        start = local_start(recipe, out, resume, only_stage)
        for _ in open_later(recipe, start):
            pass  # opened to be checked
    _check_same_start(
        f"{start.data.stream.fingerprint} {start.data.heldout_fingerprint}", start.state, start.weights, out
    )
    return replace(start, unverified=verify_start(start), copies=copies)


def local_start(whole: Recipe, out: Path, resume: str, only_stage: str | None = None) -> Start:
    """Find what a run starts from as this process sees it, and check it against the recipe; writes nothing.

    Neither compared with the other ranks' nor, `unverified`, with checksums, and without copies. Raises UserError if
    data, checkpoint or weights do not fit the recipe.
    """
    source = _find_checkpoint(out, resume)
    saved = None if source is None else read_state(source)
    stage, begins = find_stage(whole, source, saved, only_stage)
    recipe = stage.recipe
    data = open_data(recipe)
    model = stored_config(recipe.model, data.vocab_size)
    fresh = TrainerState(
        0,
        0,
        0,
        data.stream.fingerprint,
        model,
        format=CHECKPOINT_FORMATS[recipe.engine],
        stages={} if stage.name is None else {stage.name: 0},
    )
    weights, optimizer, changes = None, source, list[str]()
    if source is None or saved is None:
        state, weights = fresh, _find_weights(recipe, data.vocab_size)
        changes = [] if weights is None else position_changes(weights.model, model)
        optimizer = weights.path if weights is not None and recipe.train.init_optimizer else None
    elif begins:
        saved = replace(saved, model=with_defaults(saved.model))
        state, changes = _begun(source, saved, fresh), position_changes(saved.model, model)
        if stage.reset_optimizer:
            weights, optimizer = find_weights(source, "with --resume PATH"), None
    else:
        state = _checked(source, saved, fresh, data.heldout_fingerprint, recipe.data.corpora)
    return Start(
        stage=stage,
        data=data,
        model=model,
        format=fresh.format,
        source=source,
        state=state,
        weights=weights,
        optimizer=optimizer,
        position_changes=changes,
        unverified=True,
        copies=None,
    )


def start_warnings(recipe: Recipe, begin: int = 0) -> list[str]:
    """Return what a recipe's author should know before the first step, the one after `begin`."""
    kinds = {mixer.name: mixer for mixer in map(recipe.model.mixer, range(len(recipe.model.pattern)))}
    warnings = [mixer.warning(recipe.data.sequence_length) for mixer in kinds.values()]
    return list(filter(None, (*warnings, unknown_best_warning(recipe, begin))))


def start_messages(start: Start) -> list[str]:
    """Return what a run says of its start."""
    messages = []
    step = start.state.step
    if start.begins_stage:
        states = " and new optimizer states" if start.optimizer is None else ""
        messages.append(f"After step {step}, {start.stage} begins with {start.source}{states}.")
    elif start.source is not None:
        messages.append(f"Resumed from {start.source} after step {step}.")
    elif start.weights is not None:
        states = "" if start.optimizer is None else " and the optimizer states"
        messages.append(f"Initialised from the weights{states} in {start.weights.path}.")
    messages += [f"Changed: {change}" for change in start.position_changes]
    if start.unverified:
        messages.append("Its files have no checksums: an earlier version of longctx wrote them.")
    return messages


def nothing_text(start: Start, only_stage: str | None) -> str:
    """Return why a run has nothing to do."""
    if only_stage not in (None, start.stage.name):
        return f"stage {only_stage} is complete; {start.source} is at step {start.state.step}"
    steps, of = start.stage.recipe.train.steps, "" if start.stage.name is None else f" of {start.stage}"
    done = start.state.step - start.state.stage_start
    return f"{start.source} is at step {done}{of}, train.steps is {steps}"


def open_data(recipe: Recipe) -> StageData:
    """Open the data of a recipe without stages. Raises UserError if they do not fit the recipe."""
    stream = train_stream(recipe.data, seed=recipe.seed)
    heldout, fingerprint = _open_heldout(recipe)
    return StageData(stream, heldout, fingerprint, _vocabulary(recipe, stream))


def open_later(whole: Recipe, start: Start) -> Iterator[tuple[Stage, StageData]]:
    """Open the data of the stages after that of a start, one after the other.

    Raises UserError if those of a stage are missing or of another vocabulary: now, not weeks later.
    """
    for stage in whole.stages[start.stage.number + 1 :]:
        try:
            data = open_data(stage.recipe)
        except UserError as error:
            raise UserError(f"{stage}: {error}") from error
        if data.vocab_size != start.data.vocab_size:
            raise UserError(
                f"{stage}: {stage.recipe.data.corpora} has a vocabulary of {data.vocab_size} rows, and the stage "
                f"before one of {start.data.vocab_size}: prepare all corpora of a curriculum with one tokenizer"
            )
        yield stage, data


def is_complete(start: Start, only_stage: str | None) -> bool:
    """Return whether there is nothing left to train, of the run or of the one stage that is to be trained."""
    done = start.state.step - start.state.stage_start
    return done >= start.stage.recipe.train.steps or only_stage not in (None, start.stage.name)


def _open_heldout(recipe: Recipe) -> tuple[Sequence[Packed] | None, str | None]:
    """Return the sequences of evaluation and the fingerprint of their corpora; None without evaluation."""
    if recipe.evaluation is None:
        return None, None
    heldout = heldout_sequences(recipe.data, recipe.evaluation.sequences)
    return heldout, heldout.fingerprint


def _vocabulary(recipe: Recipe, stream: BlendedStream) -> int:
    tokens = stream.tokenizer.vocab_size
    rows = recipe.model.vocabulary_rows(tokens)
    if rows < tokens:
        raise UserError(f"model.vocab_size: {rows} is less than the {tokens} tokens of the corpus's tokenizer")
    return rows


def _find_checkpoint(out: Path, resume: str) -> Path | None:
    """Find the checkpoint to resume from, if any."""
    existing = list_checkpoints(out / "checkpoints")
    if resume == "never":
        if existing:
            raise UserError(
                f"{out} contains checkpoints of an earlier run, the latest {existing[-1]}: resume from it "
                "with --resume auto, or choose another directory with --out"
            )
        return None
    if resume == "auto":
        return existing[-1] if existing else None
    path = Path(resume)
    if existing and path.resolve().parent != existing[-1].resolve().parent:
        raise UserError(
            f"{out} contains checkpoints of its own, the latest {existing[-1]}: resume from it with "
            f"--resume auto, or choose another directory with --out to start from {path}"
        )
    return path


_ANOTHER_ENGINE = "Resume with that engine, or start another run from its weights"


def _begun(path: Path, saved: TrainerState, fresh: TrainerState) -> TrainerState:
    """Return the state of a stage that begins with the checkpoint `path`, of the stage before."""
    check_format(path, saved, fresh.format, _ANOTHER_ENGINE)
    found = tensor_differences(saved.model, fresh.model)
    if found:
        raise UserError(f"checkpoint {path} is of another model: {'; '.join(found)}. Start a new run (--out)")
    stages = saved.stages | dict.fromkeys(fresh.stages, saved.step)
    return replace(fresh, step=saved.step, tokens=saved.tokens, speeds=saved.speeds, stages=stages)


def _checked(path: Path, state: TrainerState, fresh: TrainerState, heldout: str | None, corpus: str) -> TrainerState:
    """Return the state of a checkpoint, checked against that of a fresh run and the held-out part."""
    check_format(path, state, fresh.format, _ANOTHER_ENGINE)
    check_same_model(path, replace(state, model=with_defaults(state.model)), fresh.model)
    if state.data != fresh.data:
        raise UserError(
            f"checkpoint {path} was trained on other data, or with another mix, seed, shuffle_window or "
            f"sequence_length: its data cursor is not valid for {corpus}. Restore these settings, "
            "or start a new run (--out)"
        )
    if None not in (state.heldout, heldout) and state.heldout != heldout:
        raise UserError(
            f"checkpoint {path}: the run was evaluated on another held-out part than that of "
            f"{corpus}: its held-out losses could not be compared. The training tokens are the "
            "same. Restore the held-out part, or start a new run (--out)"
        )
    return state


def _find_weights(recipe: Recipe, vocab_size: int) -> Weights | None:
    """Find the initial weights of a fresh run and check them against its model; None for random initialisation."""
    if recipe.train.init is None:
        return None
    weights = find_weights(Path(recipe.train.init), "with train.init=DIR")
    weights.check(recipe.model, vocab_size)
    if recipe.train.init_optimizer and weights.step is None:
        raise UserError(
            f"train.init_optimizer: {weights.path} has weights and no optimizer states: give a checkpoint of a run"
        )
    return weights


def verify_start(start: Start) -> bool:
    """Compare the files of a start with their checksums; return whether they should have been and have none.

    A collective call if there is a process group. Raises UserError if a file has changed.
    """
    if start.stage.recipe.checkpoint.verify == "sizes":
        return False
    if start.source is not None:
        return not verify_content(start.source)
    if start.weights is not None:
        start.weights.verify_content()
        return not start.weights.checksums
    return False


def _check_same_start(corpus: str, state: TrainerState, weights: Weights | None, out: Path) -> None:
    """Raise UserError on every rank if ranks see different data, checkpoints or initial weights."""
    starts: list[tuple[str, int, str]] = [("", 0, "")] * dist.get_world_size()
    dist.all_gather_object(starts, (corpus, state.step, weights.digest if weights else ""))
    for rank, (data, step, digest) in enumerate(starts):
        if data != starts[0][0]:
            raise UserError(
                f"data: rank {rank} sees a different corpus than rank 0; copy the same corpora to every machine"
            )
        if step != starts[0][1]:
            raise UserError(
                f"rank 0 would resume from step {starts[0][1]} and rank {rank} from step {step}, by the "
                f"checkpoints that each sees: {out} must be on a file system shared by all machines"
            )
        if digest != starts[0][2]:
            raise UserError(
                f"train.init: rank {rank} sees different weights than rank 0; copy the same weights to every machine"
            )
