"""TOML output: a configuration as text."""

import json
import re
from collections.abc import Mapping
from typing import Any

from longctx.config import Config

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def dump(config: Config, *, defaults: bool = True) -> str:
    """Return `config` as TOML text that loads back to an equal configuration.

    `defaults`: whether it has the keys that have their default value. None values are omitted, because TOML has none:
    None must be the key's default. Raises TypeError for a value that TOML cannot represent.
    """
    lines: list[str] = []
    _table((), config.model_dump(exclude_defaults=not defaults), lines)
    return "\n".join(lines).strip("\n") + "\n"


def value_text(value: object) -> str:
    """Return a value as TOML text, tables inline. Raises TypeError if TOML cannot represent it."""
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            return repr(value)
        case str():
            return _string(value)
        case list() | tuple():
            return f"[{', '.join(value_text(item) for item in value)}]"
        case Mapping():
            pairs = ", ".join(f"{_key(key)} = {value_text(item)}" for key, item in value.items() if item is not None)
            return f"{{ {pairs} }}" if pairs else "{}"
    raise TypeError(f"a recipe cannot have the value {value!r}, of type {type(value).__name__}")


def _table(path: tuple[str, ...], table: Mapping[str, Any], lines: list[str]) -> None:
    """Append `[path]`, then its content."""
    inner = [value for value in table.values() if value is not None]
    if path and (not inner or not all(isinstance(value, Mapping) or _is_array(value) for value in inner)):
        lines += ["", f"[{_dotted(path)}]"]
    _content(path, table, lines)


def _content(path: tuple[str, ...], table: Mapping[str, Any], lines: list[str]) -> None:
    """Append a table's values, then its sub-tables and arrays of tables: in TOML a value belongs to the header above
    it."""
    below = {key: value for key, value in table.items() if isinstance(value, Mapping) or _is_array(value)}
    values = {key: value for key, value in table.items() if value is not None and key not in below}
    lines += [f"{_key(key)} = {value_text(value)}" for key, value in values.items()]
    for key, value in below.items():
        if isinstance(value, Mapping):
            _table((*path, key), value, lines)
            continue
        for each in value:
            lines += ["", f"[[{_dotted((*path, key))}]]"]
            _content((*path, key), each, lines)


def _is_array(value: object) -> bool:
    """Return whether a value is an array of tables, which have headers of their own."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(each, Mapping) for each in value)


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(_key(part) for part in path)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    # JSON escapes all characters that TOML requires to be escaped, except DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
