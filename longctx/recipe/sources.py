"""Where a recipe comes from: a file, the files that it extends, and the command line, merged; each key's origin."""

import difflib
import importlib.resources
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longctx.errors import UserError
from longctx.recipe.lines import Key, key_lines


@dataclass(frozen=True)
class Origin:
    """The place that a key was written: a file with a line, or `command line` without one."""

    place: str
    line: int | None = None

    def __str__(self) -> str:
        return self.place if self.line is None else f"{self.place}:{self.line}"


COMMAND_LINE = Origin("command line")


@dataclass(frozen=True)
class Mistake:
    """One thing wrong with a recipe; `key` is the path of the value that it concerns."""

    key: Key
    text: str


@dataclass
class Source:
    """A merged recipe before validation: plain TOML values, each key's origin, what is wrong already."""

    data: dict[str, Any]
    origins: dict[Key, Origin]
    mistakes: list[str] = field(default_factory=list)

    def origin(self, key: Key) -> Origin:
        """Where `key` was written, or the nearest table around it."""
        while key not in self.origins:
            key = key[:-1]
        return self.origins[key]

    def describe(self, mistake: Mistake) -> str:
        """`file.toml:12: train.steps: what is wrong`."""
        place = str(self.origin(mistake.key))
        return f"{place}: {dotted(mistake.key)}: {mistake.text}" if mistake.key else f"{place}: {mistake.text}"


def dotted(key: Key) -> str:
    """`('a', 'b', 0)` as `a.b[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def shipped_folder() -> Path:
    """The folder of the recipes that come with longctx."""
    return Path(str(importlib.resources.files("longctx.recipes")))


def read(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Source:
    """Read the recipe `source` (a path that ends in `.toml`, or the name of a shipped recipe), all that it extends,
    and the `key=value` overrides; what comes later in that order wins, table by table.

    Raises UserError where a file is missing, unreadable or no TOML, or where `extends` goes in a circle; a malformed
    override is noted in `mistakes` instead, so that it is reported with the others.
    """
    merged = _read_chain(_locate(os.fspath(source), Path(), ""), ())
    for override in overrides:
        _override(merged, override)
    return merged


def _locate(name: str, folder: Path, asker: str) -> Path:
    """The file of recipe `name`; a relative path starts at `folder`. `asker` is the origin named in an error."""
    if name.endswith(".toml"):
        path = folder / Path(name).expanduser()
        if path.is_file():
            return path
        raise UserError(f"{asker}{_shown(path)}: there is no such file")
    path = shipped_folder() / f"{name}.toml"
    shipped = sorted(file.stem for file in shipped_folder().glob("*.toml"))
    if name in shipped:
        return path
    near = difflib.get_close_matches(name, shipped, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f" (there are: {', '.join(shipped) or 'none'})."
    raise UserError(
        f"{asker}no recipe {name!r} comes with longctx{hint} A recipe file is given by a path ending in .toml"
    )


def _shown(path: Path) -> str:
    """`path` as a user would type it: relative where it lies below the working directory."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _read_chain(path: Path, children: tuple[Path, ...]) -> Source:
    """Read `path` over all that it extends; `children` are the files that led here."""
    place = _shown(path)
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"{place}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: is not UTF-8 text (byte {error.start})") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(_syntax(place, text, str(error))) from None
    origins = {key: Origin(place, line) for key, line in key_lines(text).items()}
    origins[()] = Origin(place)
    if "extends" not in data:
        return Source(data, origins)

    name = data.pop("extends")
    here = f"{origins.pop(('extends',))}: extends: "
    if not isinstance(name, str):
        raise UserError(f"{here}should be the path of a recipe or the name of a shipped one, not {name!r}")
    parent = _locate(name, path.parent, here)
    chain = (*children, path)
    if any(parent.samefile(child) for child in chain):
        circle = " → ".join(_shown(file) for file in (*chain, parent))
        raise UserError(f"{here}recipes extend each other in a circle: {circle}")
    base = _read_chain(parent, chain)
    return Source(_merge(base.data, data), base.origins | origins)


def _syntax(place: str, text: str, message: str) -> str:
    """The parser's `what (at line 3, column 5)` as `file.toml:3: what (column 5)`."""
    found = re.fullmatch(r"(.*) \(at line (\d+), (column \d+)\)", message, re.DOTALL)
    if found:
        what, line, column = found.groups()
        return f"{place}:{line}: not valid TOML: {what} ({column})"
    last = len(text.splitlines())
    return f"{place}:{max(last, 1)}: not valid TOML: {message}"


def _merge(base: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """Tables are merged key by key; anything else of `child` replaces what `base` has."""
    merged = dict(base)
    for key, value in child.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged


def _override(source: Source, override: str) -> None:
    """Merge `key.sub=value` into `source`, or note what is wrong with it."""
    name, equals, text = override.partition("=")
    try:
        path = _path_of(tomllib.loads(f"{name} = 0"))
    except tomllib.TOMLDecodeError:
        path = ()
    if not equals or not path:
        source.mistakes.append(f"command line: {override!r} should be key=value, such as train.steps=100")
        return
    value, inner_keys = _override_value(text)
    table: Any = source.data
    for depth, part in enumerate(path[:-1], start=1):
        table = table.get(part) if isinstance(table, dict) else None
        if not isinstance(table, dict):  # this override makes it one
            source.origins[path[:depth]] = COMMAND_LINE
    source.origins |= {path + key: COMMAND_LINE for key in inner_keys}
    for part in reversed(path):
        value = {part: value}
    source.data = _merge(source.data, value)


def _path_of(table: dict[str, Any]) -> tuple[str, ...]:
    """The path of the single leaf of `table`; `()` where it has more than one."""
    path: tuple[str, ...] = ()
    inner: Any = table
    while isinstance(inner, dict):
        if len(inner) != 1:
            return ()
        (name, inner), *_ = inner.items()
        path = (*path, name)
    return path


def _override_value(text: str) -> tuple[Any, list[Key]]:
    """`text` as a TOML value, and the paths of all that lies in it; where it is no TOML it is a string, so that words
    need no quotes on the command line."""
    line = f"value = {text}"
    try:
        table = tomllib.loads(line)
    except tomllib.TOMLDecodeError:
        return text, [()]
    if table.keys() != {"value"}:
        return text, [()]
    return table["value"], [key[1:] for key in key_lines(line)]
