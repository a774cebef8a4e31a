"""Recipe sources: a file, the files that it extends and the command line, merged, with the origin of each key."""

import difflib
import importlib.resources
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from longctx.config import parse_path
from longctx.errors import UserError
from longctx.files import shortened
from longctx.recipe.lines import Key, key_lines

ALTERNATIVES = {"path": "mix", "mix": "path"}
"""Keys of a table, `[data]`, that has only one of them: the one that is set later replaces the other."""
_DEEPEST = 20
_TOO_DEEP = f"tables and arrays are nested more than {_DEEPEST} levels deep, which no key of a recipe is"


@dataclass(frozen=True)
class Origin:
    """Where a key was set: a file and line, or the command line."""

    place: str
    line: int | None = None

    def __str__(self) -> str:
        return self.place if self.line is None else f"{self.place}:{self.line}"


COMMAND_LINE = Origin("command line")


@dataclass(frozen=True)
class Mistake:
    """One mistake in a recipe; `key` is the path of the wrong value."""

    key: Key
    text: str


@dataclass
class MergedConfig:
    """A merged recipe or profile before validation: TOML values, the origin of each key, and malformed overrides."""

    data: dict[str, Any]
    origins: dict[Key, Origin]
    mistakes: list[str] = field(default_factory=list)

    def origin(self, key: Key) -> Origin:
        """Return where `key` was set, or the nearest table around it."""
        while key not in self.origins:
            key = key[:-1]
        return self.origins[key]

    def describe(self, mistake: Mistake) -> str:
        """Return the line `file.toml:12: train.steps: what is wrong`."""
        place = str(self.origin(mistake.key))
        return f"{place}: {dotted(mistake.key)}: {mistake.text}" if mistake.key else f"{place}: {mistake.text}"


def dotted(key: Key) -> str:
    """Format a key: `('a', 'b', 0)` becomes `a.b[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def shipped_folder() -> Path:
    """Return the folder of the recipes that ship with longctx."""
    return Path(str(importlib.resources.files("longctx.recipes")))


def shipped_recipe(name: str) -> Path:
    """Return the file of a recipe that ships with longctx. Raises UserError if there is none of that name."""
    return _shipped(name, "")


def read_merged(source: str | os.PathLike[str]) -> MergedConfig:
    """Read and merge the recipes that `source` extends and `source` itself (a path ending in `.toml`, or the name of a
    shipped recipe); later ones win, key by key.

    Raises UserError if a file is missing, unreadable or not TOML, or if `extends` is circular.
    """
    return _read_chain(_locate(os.fspath(source), Path(), ""), ())


def _locate(name: str, folder: Path, origin: str) -> Path:
    """Return the file of recipe `name`; paths are relative to `folder`. `origin` is the prefix of error messages."""
    try:
        parse_path(name)
    except ValueError as error:
        raise UserError(f"{origin}recipe {error}") from None
    if name.endswith(".toml"):
        path = folder / os.path.expanduser(name)
        if path.is_file():
            return path
        raise UserError(f"{origin}{_displayed(path)}: no such file")
    return _shipped(name, origin)


def _shipped(name: str, origin: str) -> Path:
    path = shipped_folder() / f"{name}.toml"
    shipped = sorted(file.stem for file in shipped_folder().glob("*.toml"))
    if name in shipped:
        return path
    near = difflib.get_close_matches(name, shipped, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f" (available: {', '.join(shipped) or 'none'})."
    raise UserError(f"{origin}longctx ships no recipe {name!r}{hint} The path of a recipe file must end in .toml")


def _displayed(path: Path) -> str:
    """Return `path` as a user would type it: relative if it is below the working directory."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _read_chain(path: Path, children: tuple[Path, ...]) -> MergedConfig:
    """Read `path` and the recipes that it extends; `children` are the files that extend it."""
    place = _displayed(path)
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"{place}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: is not UTF-8 text (byte {error.start})") from None
    try:
        data = _parse(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(_syntax(place, text, str(error))) from None
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None
    origins = {key: Origin(place, line) for key, line in key_lines(text).items()}
    origins[()] = Origin(place)
    if "extends" not in data:
        return MergedConfig(data, origins)

    name = data.pop("extends")
    origin = f"{origins.pop(('extends',))}: extends: "
    if not isinstance(name, str):
        raise UserError(f"{origin}should be the path of a recipe or the name of a shipped one, not {name!r}")
    parent = _locate(name, path.parent, origin)
    chain = (*children, path)
    if any(parent.samefile(child) for child in chain):
        circle = " → ".join(_displayed(file) for file in (*chain, parent))
        raise UserError(f"{origin}recipes extend each other in a cycle: {circle}")
    return merge(_read_chain(parent, chain), data, origins)


def merge(base: MergedConfig, data: dict[str, Any], origins: Mapping[Key, Origin]) -> MergedConfig:
    """Return `data`, whose keys have these origins, merged over `base`."""
    moved = {_merged_key(base.data, data, key): origin for key, origin in origins.items()}
    return MergedConfig(merge_tables(base.data, data), base.origins | moved, base.mistakes)


def _syntax(place: str, text: str, message: str) -> str:
    """Reformat the parser's `what (at line 3, column 5)` as `file.toml:3: what (column 5)`."""
    match = re.fullmatch(r"(.*) \(at line (\d+), (column \d+)\)", message, re.DOTALL)
    if match:
        what, line, column = match.groups()
        return f"{place}:{line}: not valid TOML: {what} ({column})"
    last = len(text.splitlines())
    return f"{place}:{max(last, 1)}: not valid TOML: {message}"


def merge_tables(base: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """Merge tables key by key, and arrays of tables with names by name; other values of `child` replace those of `base`
    and their alternatives."""
    merged = {key: value for key, value in base.items() if not child.get(ALTERNATIVES.get(key, ""))}
    for key, value in child.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge_tables(merged[key], value)
        elif has_names(value) and has_names(merged.get(key)):
            by_name = {table["name"]: table for table in merged[key]}
            for table in value:
                by_name[table["name"]] = merge_tables(by_name.get(table["name"], {}), table)
            merged[key] = list(by_name.values())
        else:
            merged[key] = value
    return merged


def has_names(value: object) -> TypeGuard[list[dict[str, Any]]]:
    """Return whether `value` is an array of tables that are told apart by their `name`."""
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        return False
    names = [each.get("name") for each in value]
    return all(isinstance(name, str) for name in names) and len(set(names)) == len(names)


def _merged_key(base: object, child: object, key: Key) -> Key:
    """Return where `merge_tables` puts the value at `key` of `child`."""
    merged: Key = ()
    for part in key:
        if isinstance(part, int) and has_names(base) and has_names(child):
            names = list(dict.fromkeys(table["name"] for table in (*base, *child)))
            place = names.index(child[part]["name"])
            base, child = base[place] if place < len(base) else None, child[part]
            merged = (*merged, place)
        else:
            base, child = _item(base, part), _item(child, part)
            merged = (*merged, part)
    return merged


def _item(value: object, part: str | int) -> object:
    if isinstance(value, dict):
        return value.get(part)
    return value[part] if isinstance(value, list) and isinstance(part, int) and part < len(value) else None


@dataclass(frozen=True)
class Override:
    """`key.sub=value` on the command line."""

    path: tuple[str, ...]
    value: Any
    inner_keys: list[Key]
    """The paths of all values in `value`; `()` is its own."""


def override(source: MergedConfig, assignment: str) -> None:
    """Merge `key.sub=value` into `source`, or add it to the mistakes if it is malformed."""
    found = read_override(source, assignment)
    if found is not None:
        apply_override(source, found)


def read_override(source: MergedConfig, assignment: str) -> Override | None:
    """Parse `key.sub=value`; if it is malformed, add it to the mistakes and return None."""
    name, equals, text = assignment.partition("=")
    try:
        path = _path_of(tomllib.loads(f"{name} = 0"))
    except tomllib.TOMLDecodeError:
        path = ()
    if not equals or not path:
        source.mistakes.append(f"command line: {shortened(assignment)!r} should be key=value, such as train.steps=100")
        return None
    try:
        value, inner_keys = _override_value(text)
        if len(path) > _DEEPEST:
            raise ValueError(_TOO_DEEP)
    except ValueError as error:
        source.mistakes.append(f"command line: {shortened(assignment)!r}: {error}")
        return None
    return Override(path, value, inner_keys)


def apply_override(source: MergedConfig, found: Override) -> None:
    """Merge an override into `source`."""
    table: Any = source.data
    for depth, part in enumerate(found.path[:-1], start=1):
        table = table.get(part) if isinstance(table, dict) else None
        if not isinstance(table, dict):  # this override creates the table
            source.origins[found.path[:depth]] = COMMAND_LINE
    source.origins |= {found.path + key: COMMAND_LINE for key in found.inner_keys}
    source.data = merge_tables(source.data, nested(found.path, found.value))


def nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    """Return tables in which `value` is at `path`."""
    for part in reversed(path):
        value = {part: value}
    return dict(value)


def _parse(text: str) -> dict[str, Any]:
    """Parse TOML. Raises TOMLDecodeError if it is not valid, another ValueError if it is and no recipe can have it."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except ValueError:
        raise ValueError("a number has too many digits") from None
    level: list[Any] = [data]
    for _ in range(_DEEPEST + 1):
        values = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for inner in values for each in inner if isinstance(each, dict | list)]
    if level:
        raise ValueError(_TOO_DEEP)
    return data


def _path_of(table: dict[str, Any]) -> tuple[str, ...]:
    """Return the path of the single leaf of `table`; `()` if it has several."""
    path: tuple[str, ...] = ()
    inner: Any = table
    while isinstance(inner, dict):
        if len(inner) != 1:
            return ()
        (name, inner), *_ = inner.items()
        path = (*path, name)
    return path


def _override_value(text: str) -> tuple[Any, list[Key]]:
    """Parse `text` as a TOML value and return it with the paths of all values in it. Text that is not TOML is a string,
    so that words need no quotes on the command line."""
    line = f"value = {text}"
    try:
        table = _parse(line)
    except tomllib.TOMLDecodeError:
        return text, [()]
    if table.keys() != {"value"}:
        return text, [()]
    return table["value"], [key[1:] for key in key_lines(line)]
