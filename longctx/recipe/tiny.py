"""Tiny variants: the table `[tiny]` of a recipe, with the keys of a small model of the same structure."""

from longctx.errors import UserError
from longctx.recipe.sources import MergedConfig, has_names, merge

TINY = "tiny"


def split_tiny(source: MergedConfig, *, tiny: bool) -> MergedConfig:
    """Return a recipe without its table `[tiny]`, which is merged over the other tables if `tiny`.

    A tiny variant without a name of its own is called `NAME-tiny`. Raises UserError if `tiny` and there is no such
    table, or if it has a stage that the recipe has not.
    """
    data = {key: value for key, value in source.data.items() if key != TINY}
    origins = {key: origin for key, origin in source.origins.items() if key[:1] != (TINY,)}
    rest = MergedConfig(data, origins, source.mistakes)
    if not tiny:
        return rest
    table = source.data.get(TINY)
    if not isinstance(table, dict):
        raise UserError(f"{source.origin(())}: --tiny: the recipe has no table [{TINY}]")
    _check_stages(source, data.get("stage"), table.get("stage"))
    if "name" not in table and isinstance(data.get("name"), str):
        data["name"] += f"-{TINY}"  # a directory of its own
    own = {key[1:]: origin for key, origin in source.origins.items() if len(key) > 1 and key[0] == TINY}
    return merge(rest, table, own)


def _check_stages(source: MergedConfig, stages: object, tiny_stages: object) -> None:
    """Raise UserError for a stage of the tiny variant only, which would be trained after all others."""
    names = {stage["name"] for stage in stages} if has_names(stages) else set()
    for number, stage in enumerate(tiny_stages if has_names(tiny_stages) else ()):
        if stage["name"] not in names:
            raise UserError(
                f"{source.origin((TINY, 'stage', number))}: {TINY}.stage: the recipe has no stage {stage['name']!r}; "
                "remove it there too"
            )
