"""Commands of schedulers, run with errors that a user can act on, and YAML as a person would write it."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import yaml

from longctx.errors import UserError


def run_tool(command: Sequence[str]) -> str:
    """Run a scheduler's command; return its output. Raises UserError, with what it says, if it fails or is missing."""
    if shutil.which(command[0]) is None:
        raise UserError(
            f"{command[0]}: there is no such command here; run longctx launch where the cluster's commands are, such "
            "as a login node"
        )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{shlex.join(command)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # published without types
    """Writes texts of several lines as literal blocks, and no references to what occurs twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def to_yaml(value: dict[str, Any]) -> str:
    """Return `value` as YAML in the order of its keys; those whose value is None or empty are left out."""
    return yaml.dump(without_empty(value), Dumper=_Dumper, sort_keys=False, width=120)


def without_empty(value: Any) -> Any:
    """Return `value` without the keys, at any depth, whose value is None or an empty table or list."""
    if isinstance(value, dict):
        inner = {key: without_empty(item) for key, item in value.items()}
        return {key: item for key, item in inner.items() if item is not None and item not in ({}, [])}
    return [without_empty(item) for item in value] if isinstance(value, list) else value
