"""`longctx verify`: table of the differences between one rank, the equations and every parallel configuration."""

from collections.abc import Sequence
from itertools import chain

from rich.console import Console
from rich.table import Table

from longctx.data.manifest import Manifest
from longctx.errors import UserError
from longctx.parallel.local_ranks import LocalRanks
from longctx.recipe import Recipe, load
from longctx.verify import Row, shrink, subject_of, verify, verify_bits, verify_training
from longctx.verify.equations.step import Equations

NOT_LOOKED_AT = "Not looked at: the recipe's own corpus and tokenizer, more than two steps, GPUs."
BYTE_VOCABULARY = 257
"""Vocabulary size without a corpus: that of the byte tokenizer."""


def run(
    source: str,
    overrides: Sequence[str],
    *,
    tiny: bool = False,
    stage_name: str | None = None,
    shrunk: bool,
    ranks: int,
    timeout: float,
) -> int:
    """Verify the recipe `source`, or its tiny variant, on up to `ranks` local ranks; return the exit status, 1 if out
    of bounds. `stage_name`: the stage of a curriculum; None: the last one."""
    console = Console(highlight=False)
    stage = load(source, overrides, tiny=tiny).find_stage(stage_name)
    recipe = stage.recipe
    subject = subject_of(recipe, _vocabulary(recipe))
    if shrunk:
        subject = shrink(subject)
    name = ", ".join(filter(None, (recipe.name, str(stage) if stage.name else "", "shrunk" if shrunk else "")))
    console.print(
        f"{name}: {subject.model.pattern}, dim {subject.model.dim}, {subject.length} tokens, "
        f"vocabulary {subject.vocab_size}; gloo on the CPU, up to {ranks} ranks.\n"
        "Relative differences from one rank in float64. Bounds: 1e-10 in float64; in the recipe's precision\n"
        "what one rank's rounding in several draws exceeds once in a million times, at least 1e-5; 0 between\n"
        "virtual ranks on several processes and on one. 'The equations' are those of the model, in plain torch.\n"
        "'From a corpus' and 'resumed': through the loader, the second step after a checkpoint.",
        soft_wrap=True,
    )
    if recipe.engine != "torch":
        console.print(
            f"The model runs on the engine 'torch'; see docs/engines.md for its comparison with {recipe.engine!r}.",
            soft_wrap=True,
        )
    rows = []
    columns = f"{'precision':9}  {'configuration':58}  {'loss':>8}  {'logits':>8}  {'nearest':>8}"
    console.print(f"[bold]{columns}[/bold]  tensor nearest its bound", soft_wrap=True)
    with LocalRanks(ranks, timeout=timeout) as pool:
        for row in chain(verify(subject, pool), verify_training(subject, pool), verify_bits(subject, pool)):
            rows.append(row)
            worst = row.nearest
            values = [row.differences.get(name) for name in ("loss", "logits", worst)]
            verdict = "[red]OUT OF BOUNDS[/red]" if row.failures else "[green]ok[/green]"
            numbers = "  ".join(f"{'-':>8}" if value is None else f"{value:8.1e}" for value in values)
            console.print(f"{row.precision:9}  {row.case!s:58}  {numbers}  {worst}  {verdict}", soft_wrap=True)
    console.print(_parameters(rows))
    failed = [row for row in rows if row.failures]
    for row in failed:
        names = ", ".join(
            f"{name} {row.differences[name]:.1e} (bound {row.bounds[name]:.0e})" for name in row.failures[:4]
        )
        more = f" and {len(row.failures) - 4} more" if len(row.failures) > 4 else ""
        console.print(f"[red]{row.precision}, {row.case}[/red]: {names}{more}", soft_wrap=True)
    if failed:
        anywhere = any(isinstance(row.case, Equations) for row in failed)
        advice = "do not train this recipe" + ("" if anywhere else " on several ranks")
        console.print(f"{len(failed)} of {len(rows)} rows are out of bounds: {advice}.")
        return 1
    own = [case for case in subject.own if case.ranks > ranks]
    if own:
        console.print(f"Not run: the recipe's own layout, {own[0]}: it takes --ranks {own[0].ranks}.", soft_wrap=True)
    console.print(NOT_LOOKED_AT, soft_wrap=True)
    console.print(f"All {len(rows)} rows are within bounds.")
    return 0


def _vocabulary(recipe: Recipe) -> int:
    try:
        tokens = Manifest.load(recipe.data.sources[0].path).tokenizer.vocab_size
    except UserError:
        tokens = BYTE_VOCABULARY
    return recipe.model.vocabulary_rows(tokens)


def _parameters(rows: Sequence[Row]) -> Table:
    """Tabulate each parameter's largest gradient difference over the configurations, by precision."""
    rows = [row for row in rows if "logits" in row.differences]
    table = Table(title="Largest gradient difference over all configurations", title_justify="left", box=None)
    table.add_column("parameter")
    precisions = list(dict.fromkeys(row.precision for row in rows))
    for precision in precisions:
        table.add_column(precision, justify="right")
    for name in rows[-1].differences:  # not of the first rows: the equations update nothing
        if f"updated {name}" in rows[-1].differences:
            worst = [max(row.differences[name] for row in rows if row.precision == p) for p in precisions]
            table.add_row(name, *(f"{value:.1e}" for value in worst))
    return table
