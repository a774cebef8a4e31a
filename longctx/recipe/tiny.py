"""Tiny variants: the table `[tiny]` of a recipe, with the keys of a small model of the same structure."""

from longctx.errors import UserError
from longctx.recipe.sources import MergedConfig, merge

TINY = "tiny"


def split_tiny(source: MergedConfig, *, tiny: bool) -> MergedConfig:
    """Return a recipe without its table `[tiny]`, which is merged over the other tables if `tiny`.

    A tiny variant without a name of its own is called `NAME-tiny`. Raises UserError if `tiny` and there is no such
    table.
    """
    data = {key: value for key, value in source.data.items() if key != TINY}
    origins = {key: origin for key, origin in source.origins.items() if key[:1] != (TINY,)}
    rest = MergedConfig(data, origins, source.mistakes)
    if not tiny:
        return rest
    table = source.data.get(TINY)
    if not isinstance(table, dict):
        raise UserError(f"{source.origin(())}: --tiny: the recipe has no table [{TINY}]")
    if "name" not in table and isinstance(data.get("name"), str):
        data["name"] += f"-{TINY}"  # a directory of its own
    own = {key[1:]: origin for key, origin in source.origins.items() if len(key) > 1 and key[0] == TINY}
    return merge(rest, table, own)
