"""A configuration as TOML text."""

import json
import re
from collections.abc import Mapping
from typing import Any

from longctx.config import Config

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def dump(config: Config) -> str:
    """Every value of `config` as TOML that loads back to an equal configuration.

    A value of None is left out, as TOML has none: it must be its key's default. Raises TypeError for a value that a
    recipe cannot hold.
    """
    lines: list[str] = []
    _table((), config.model_dump(), lines)
    return "\n".join(lines).strip("\n") + "\n"


def value_text(value: object) -> str:
    """One value as it is written in TOML; tables inline. Raises TypeError where TOML has no such value."""
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
    raise TypeError(f"a recipe cannot hold {value!r}, a {type(value).__name__}")


def _table(path: tuple[str, ...], table: Mapping[str, Any], lines: list[str]) -> None:
    """Append `[path]`, its values, then its sub-tables: in TOML values belong to the header above them."""
    tables = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    values = {key: value for key, value in table.items() if value is not None and key not in tables}
    if path and (values or not tables):
        lines += ["", f"[{'.'.join(_key(part) for part in path)}]"]
    lines += [f"{_key(key)} = {value_text(value)}" for key, value in values.items()]
    for key, value in tables.items():
        _table((*path, key), value, lines)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    # JSON escapes all that TOML wants escaped, but for DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
