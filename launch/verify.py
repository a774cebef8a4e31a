"""`longctx verify`: table of the differences between one rank and every parallel configuration."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from longctx.data.manifest import Manifest
from longctx.errors import UserError
from longctx.parallel.local_ranks import LocalRanks
from longctx.recipe import Recipe, load
from longctx.verify import Row, shrink, subject_of, verify

BYTE_VOCABULARY = 257
"""Vocabulary size without a corpus: that of the byte tokenizer."""


def run(source: str, overrides: Sequence[str], *, shrunk: bool, ranks: int, timeout: float) -> int:
    """Verify the recipe `source` on up to `ranks` local ranks; return the exit status, 1 if out of bounds."""
    console = Console(highlight=False)
    recipe = load(source, overrides)
    subject = subject_of(recipe, _vocabulary(recipe))
    if shrunk:
        subject = shrink(subject)
    console.print(
        f"{recipe.name}{', shrunk' if shrunk else ''}: {subject.model.pattern}, dim {subject.model.dim}, "
        f"{subject.length} tokens, vocabulary {subject.vocab_size}; gloo on the CPU, up to {ranks} ranks.\n"
        "Relative differences from one rank in float64. Bounds: 1e-10 in float64; in the recipe's precision\n"
        "three times the difference of one rank, at least 1e-5.",
        soft_wrap=True,
    )
    if recipe.engine != "torch":
        console.print(
            f"The model runs on the engine 'torch'; see docs/engines.md for its comparison with {recipe.engine!r}.",
            soft_wrap=True,
        )
    rows = []
    columns = f"{'precision':9}  {'configuration':54}  {'loss':>8}  {'logits':>8}  {'gradient':>8}"
    console.print(f"[bold]{columns}[/bold]  parameter nearest its bound", soft_wrap=True)
    with LocalRanks(ranks, timeout=timeout) as pool:
        for row in verify(subject, pool):
            rows.append(row)
            worst = row.worst_gradient
            values = [row.differences[name] for name in ("loss", "logits", worst)]
            verdict = "[red]OUT OF BOUNDS[/red]" if row.failures else "[green]ok[/green]"
            numbers = "  ".join(f"{value:8.1e}" for value in values)
            console.print(f"{row.precision:9}  {row.case!s:54}  {numbers}  {worst}  {verdict}", soft_wrap=True)
    console.print(_parameters(rows))
    failed = [row for row in rows if row.failures]
    for row in failed:
        names = ", ".join(
            f"{name} {row.differences[name]:.1e} (bound {row.bounds[name]:.0e})" for name in row.failures[:4]
        )
        more = f" and {len(row.failures) - 4} more" if len(row.failures) > 4 else ""
        console.print(f"[red]{row.precision}, {row.case}[/red]: {names}{more}", soft_wrap=True)
    if failed:
        console.print(
            f"{len(failed)} of {len(rows)} rows are out of bounds: do not train this recipe on several ranks."
        )
        return 1
    console.print(f"All {len(rows)} rows are within bounds.")
    return 0


def _vocabulary(recipe: Recipe) -> int:
    try:
        tokens = Manifest.load(recipe.data.path).tokenizer.vocab_size
    except UserError:
        tokens = BYTE_VOCABULARY
    return recipe.model.vocabulary_rows(tokens)


def _parameters(rows: Sequence[Row]) -> Table:
    """Tabulate each parameter's largest gradient difference over the configurations, by precision."""
    table = Table(title="Largest gradient difference over all configurations", title_justify="left", box=None)
    table.add_column("parameter")
    precisions = list(dict.fromkeys(row.precision for row in rows))
    for precision in precisions:
        table.add_column(precision, justify="right")
    for name in rows[0].differences:
        if name not in ("loss", "logits"):
            worst = [max(row.differences[name] for row in rows if row.precision == p) for p in precisions]
            table.add_row(name, *(f"{value:.1e}" for value in worst))
    return table
