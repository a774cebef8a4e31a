"""`longctx train --check`: checks a recipe, its data and its start, prints what would run, and writes nothing.

What only the ranks can find stays to them: whether all of them see the same files, whether the engine's framework is
installed there, memory.
"""

import os
from pathlib import Path

from rich.console import Console
from rich.text import Text

from longctx.checkpoint.copies import CheckpointCopies
from longctx.checkpoint.read import name_of
from longctx.data.blend import BlendSource, repetition_warnings
from longctx.errors import UserError
from longctx.launch.job_environment import counted
from longctx.model.decoder import count_parameters
from longctx.printable import printable
from longctx.recipe import Recipe, check
from longctx.recipe.schema import Stage
from longctx.train.display import human_count, human_position
from longctx.train.resume_copy import find_copy
from longctx.train.run_lock import RunLock
from longctx.train.start import (
    StageData,
    Start,
    is_complete,
    local_start,
    nothing_text,
    open_later,
    start_warnings,
    verify_start,
)


def check_run(
    recipe: Recipe, out: Path, resume: str, ranks: int, only_stage: str | None = None, *, shown: bool = True
) -> int:
    """Check a run of `recipe` on `ranks` ranks and, if `shown`, print what would run; return the exit status, 0.

    `out`, `resume` and `only_stage` as for `longctx.launch.train.train`. Raises UserError if the run could not start.
    """
    check(recipe, ranks)
    _check_writable(out)
    RunLock(out).check_free()
    copy = _find_copy(recipe, out, resume)
    start = local_start(recipe, out, resume, only_stage)
    unverified = verify_start(start)
    stages = [(start.stage, start.data), *open_later(recipe, start)]
    if only_stage is not None:
        del stages[1:]
    if not shown:
        return 0
    console = Console(highlight=False)
    rows = _run_rows(recipe, out, ranks, start, copy, only_stage)
    for stage, data in stages:
        rows += _stage_rows(stage, ranks, data)
    for name, text in rows:
        console.print(Text(f"{name:10}", style="bold").append(printable(text), style="not bold"), soft_wrap=True)
    notes, begin = [], start.state.stage_start
    for stage, data in stages:
        repetitions = repetition_warnings(data.stream, stage.recipe.train.sequences)
        warnings = [*start_warnings(stage.recipe, begin), *repetitions]
        notes += [f"{stage}: {note}" if stage.name else note for note in warnings]
        begin += stage.recipe.train.steps
    if unverified:
        notes.append("The files of its start have no checksums: an earlier version of longctx wrote them.")
    for note in notes:
        console.print(printable(note), markup=False, soft_wrap=True)
    console.print("Recipe, data and start are in order; nothing was started.", soft_wrap=True)
    return 0


def _check_writable(out: Path) -> None:
    """Raise UserError if the run's directory is none, or cannot be written or created."""
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not place.is_dir():
        raise UserError(f"{place} is not a directory; choose another --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{place} cannot be written; choose another --out")


def _find_copy(recipe: Recipe, out: Path, resume: str) -> str | None:
    """Return the URL of the checkpoint that the run would download and resume from; None if there is none."""
    if recipe.checkpoint.copy_to is None:
        return None
    copies = CheckpointCopies(recipe.checkpoint.copy_to)
    step, _ = find_copy(copies, out, resume)
    return None if step is None else f"{copies.url}/{name_of(step)}"


def _run_rows(
    recipe: Recipe, out: Path, ranks: int, start: Start, copy: str | None, only_stage: str | None
) -> list[tuple[str, str]]:
    model, precision = start.stage.recipe.model, start.stage.recipe.train.precision
    parameters = count_parameters(model, start.data.vocab_size)
    return [
        ("run", f"{recipe.name}, in {out}"),
        ("start", _start_text(recipe, start, copy, only_stage)),
        (
            "model",
            f"{human_count(parameters)} parameters ({parameters:,}), {model.pattern}, dim {model.dim}, vocabulary "
            f"{start.data.vocab_size:,}, {precision}",
        ),
        # Those of stages differ.
        ("ranks", f"{counted(ranks, 'rank')}{'' if recipe.stage else _axes(recipe, ranks)}, engine {recipe.engine}"),
    ]


def _axes(recipe: Recipe, ranks: int) -> str:
    """Return the sizes of the axes above 1, in brackets."""
    parallel, shard = recipe.parallel, recipe.parallel.shard(ranks)
    assert shard is not None  # checked
    sizes = {name: getattr(parallel, name) for name in ("dp_replicate", "cp", "ep", "tp", "pp")} | {"dp_shard": shard}
    text = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return f" ({text})" if text else ""


def _stage_rows(stage: Stage, ranks: int, data: StageData) -> list[tuple[str, str]]:
    recipe = stage.recipe
    train, parallel, length = recipe.train, recipe.parallel, recipe.data.sequence_length
    total = human_count(train.steps * recipe.tokens_per_step)
    shard = parallel.shard(ranks)
    assert shard is not None  # checked
    split = f", {human_position(-(-length // parallel.cp))} per rank ({parallel.layout})" if parallel.cp > 1 else ""
    sequences, replicas = train.sequences_per_step, parallel.dp_replicate * shard
    title = f"{stage.name}, {stage.number + 1} of {stage.count}{_axes(recipe, ranks)}"
    return [
        *([] if stage.name is None else [("stage", title)]),
        ("sequence", f"{human_position(length)} tokens{split}"),
        (
            "step",
            f"{human_position(recipe.tokens_per_step)} tokens: {counted(sequences, 'sequence')}"
            + (f", {sequences // replicas} per data-parallel rank" if replicas > 1 else ""),
        ),
        ("steps", f"{train.steps:,}: {total} tokens{'' if recipe.data.mix else f', {_epochs(recipe, data)[0]}'}"),
        *_corpus_rows(recipe, data),
    ]


def _epochs(recipe: Recipe, data: StageData) -> list[str]:
    """Return how often the run or stage reads each source."""
    found = data.stream.epochs(recipe.train.sequences)
    return [f"{epochs:,.{2 if epochs < 100 else 0}f} epochs" for epochs in found]


def _corpus_rows(recipe: Recipe, data: StageData) -> list[tuple[str, str]]:
    """Return the row of the corpus, or of a mix a row per source and one of the held-out sequences."""
    sources = data.stream.sources
    heldout = [] if data.heldout is None else [counted(len(data.heldout), "held-out sequence")]
    if not recipe.data.mix:
        return [("corpus", "; ".join([f"{sources[0]}: {_size(sources[0])}", *heldout]))]
    rows = [
        f"{source.share:.1%} of tokens, {epochs}: {source}, {_size(source)}"
        for source, epochs in zip(sources, _epochs(recipe, data), strict=True)
    ]
    rows += [f"{text} in the same shares" for text in heldout]
    return [("" if number else "corpora", text) for number, text in enumerate(rows)]


def _size(source: BlendSource) -> str:
    documents = source.stream.documents
    return f"{human_count(documents.tokens)} tokens in {len(documents):,} documents"


def _start_text(recipe: Recipe, start: Start, copy: str | None, only_stage: str | None) -> str:
    step, began = start.state.step, start.state.stage_start
    of = "" if start.stage.name is None else f" of stage {start.stage.name}"
    if copy is not None:
        return f"resumes from {copy}, which is downloaded and checked then"
    if is_complete(start, only_stage):
        return f"nothing to do: {nothing_text(start, only_stage)}"
    changes = f"; {', '.join(start.position_changes)}" if start.position_changes else ""
    if start.begins_stage:
        return f"begins stage {start.stage.name} with {start.source}{changes}"
    if start.source is not None:
        return f"resumes from {start.source}, after step {step - began} of {start.stage.recipe.train.steps}{of}"
    if start.weights is not None:
        states = " and optimizer states" if start.optimizer is not None else ""
        return f"step 0{of}, with the weights{states} of {start.weights.path}{changes}"
    return f"step 0{of}, random parameters of seed {recipe.seed}"
