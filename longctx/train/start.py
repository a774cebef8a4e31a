"""Start of a run: its data, and the checkpoint or the weights that it starts from, checked before anything is built."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from longctx.checkpoint.copies import CheckpointCopies
from longctx.checkpoint.read import check_format, check_same_model, list_checkpoints, read_state, verify_content
from longctx.checkpoint.trainer_state import TrainerState
from longctx.checkpoint.weights import Weights, find_weights, stored_config, with_defaults
from longctx.data.corpus import Corpus
from longctx.data.loader import Sequence as Packed
from longctx.data.loader import SequenceStream, heldout_sequences, train_stream
from longctx.errors import UserError
from longctx.parallel.rank_errors import raise_on_all_ranks
from longctx.recipe import Recipe
from longctx.train.build_engine import CHECKPOINT_FORMATS
from longctx.train.kept_checkpoints import unknown_best_warning
from longctx.train.resume_copy import open_copies


@dataclass(frozen=True)
class Start:
    """What a run starts from: the same on every rank."""

    stream: SequenceStream
    heldout: Sequence[Packed] | None
    """Sequences of evaluation; None without one."""
    heldout_fingerprint: str | None
    vocab_size: int
    """Rows of the vocabulary."""
    model: dict[str, Any]
    """The model's configuration, as checkpoints store it."""
    format: str
    """Format of the checkpoint's tensors."""
    source: Path | None
    """The checkpoint that the run resumes from; None if it does not."""
    state: TrainerState
    """The state of `source`, or that of a fresh run."""
    weights: Weights | None
    """Initial weights of a fresh run; None: it resumes, or they are random."""
    unverified: bool
    """Whether the files of the start were to be compared with their checksums, and have none."""
    copies: CheckpointCopies | None
    """Where checkpoints are copied to; None: nowhere."""


def find_start(recipe: Recipe, out: Path, resume: str, say: Callable[[str], None]) -> Start:
    """Find what a run starts from and check it against the recipe. Collective.

    `resume`: as for `train`. `say` is called on rank 0 before what takes long. Raises UserError, on every rank, if
    data, checkpoint or weights do not fit the recipe, are damaged, or are not the same on all ranks.
    """
    url = recipe.checkpoint.copy_to
    copies = None if url is None else open_copies(url, out, resume, say)
    with raise_on_all_ranks():
        start = local_start(recipe, out, resume)
    _check_same_start(f"{start.stream.fingerprint} {start.heldout_fingerprint}", start.state, start.weights, out)
    return replace(start, unverified=verify_start(recipe, start), copies=copies)


def local_start(recipe: Recipe, out: Path, resume: str) -> Start:
    """Find what a run starts from as this process sees it, and check it against the recipe; writes nothing.

    Neither compared with the other ranks' nor, `unverified`, with checksums, and without copies. Raises UserError if
    data, checkpoint or weights do not fit the recipe.
    """
    stream = train_stream(recipe.data, seed=recipe.seed)
    heldout, heldout_fingerprint = _open_heldout(recipe)
    vocab_size = _vocabulary(recipe, stream)
    model = stored_config(recipe.model, vocab_size)
    fresh = TrainerState(0, 0, 0, stream.fingerprint, model, format=CHECKPOINT_FORMATS[recipe.engine])
    source = _find_checkpoint(out, resume)
    state = fresh if source is None else _read_checked(source, fresh, heldout_fingerprint, recipe.data.path)
    weights = _find_weights(recipe, vocab_size) if source is None else None
    return Start(
        stream=stream,
        heldout=heldout,
        heldout_fingerprint=heldout_fingerprint,
        vocab_size=vocab_size,
        model=model,
        format=fresh.format,
        source=source,
        state=state,
        weights=weights,
        unverified=True,
        copies=None,
    )


def start_warnings(recipe: Recipe) -> list[str]:
    """Return what a recipe's author should know before the first step."""
    kinds = {mixer.name: mixer for mixer in map(recipe.model.mixer, range(len(recipe.model.pattern)))}
    warnings = [mixer.warning(recipe.data.sequence_length) for mixer in kinds.values()]
    return list(filter(None, (*warnings, unknown_best_warning(recipe))))


def _open_heldout(recipe: Recipe) -> tuple[Sequence[Packed] | None, str | None]:
    """Return the sequences of evaluation and the fingerprint of their corpus; None without evaluation."""
    if recipe.evaluation is None:
        return None, None
    corpus = Corpus(recipe.data.path, "heldout")
    return heldout_sequences(corpus, recipe.data.sequence_length, recipe.evaluation.sequences), corpus.fingerprint


def _vocabulary(recipe: Recipe, stream: SequenceStream) -> int:
    tokens = stream.corpus.manifest.tokenizer.vocab_size
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


def _read_checked(path: Path, fresh: TrainerState, heldout: str | None, corpus: str) -> TrainerState:
    """Read the state of a checkpoint and check it against that of a fresh run, and its held-out part."""
    state = read_state(path)
    check_format(path, state, fresh.format, "Resume with that engine, or start another run from its weights")
    check_same_model(path, replace(state, model=with_defaults(state.model)), fresh.model)
    if state.data != fresh.data:
        raise UserError(
            f"checkpoint {path} was trained on other data, or with another seed, shuffle_window or "
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
    return weights


def verify_start(recipe: Recipe, start: Start) -> bool:
    """Compare the files of a start with their checksums; return whether they should have been and have none.

    A collective call if there is a process group. Raises UserError if a file has changed.
    """
    if recipe.checkpoint.verify == "sizes":
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
                f"data.path: rank {rank} sees a different corpus than rank 0; copy the same corpus to every machine"
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
