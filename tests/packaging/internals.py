"""The internals of other packages that longctx uses, found in its code: names that no documentation promises.

An internal is a name with an underscore before it, anywhere in the path of an import or of an attribute, or any name
from a module of `UNDOCUMENTED`. Of an object that no import names, as in `module._parameters`, only the attribute is
known: `_parameters`.
"""

import ast
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "parallel", "moe", "longctx", "launch")
UNDOCUMENTED = (
    "torch.distributed.checkpoint.",
    "torch.distributed.elastic.",
    "torch.utils.flop_counter.",
    "triton.errors.",
    "triton.knobs.",
    "megatron.",
    "deepspeed.",
    "transformers.",
    "fla.",
    "flash_attn.",
)
"""Modules of which any name counts. The frameworks document few of theirs, and change the others in any release."""
PUBLIC = {"_replace"}
"""Documented in spite of the underscore: of named tuples."""
MODULE = frozenset([*dir(nn.Module), *vars(nn.Module())])
"""The attributes of torch's modules: they are torch's on all objects but `self`, whatever else has such a name."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith(("__", "_longctx"))


@dataclass(frozen=True)
class Source:
    """The imports, definitions and private names of a file."""

    tree: ast.Module

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    def imported(self) -> dict[str, str]:
        """What each name that an import binds stands for; functions' own imports count for the whole file."""
        names = {}
        for node in self.nodes:
            match node:
                case ast.Import(aliases):
                    for alias in aliases:
                        top = alias.name.partition(".")[0]
                        names[alias.asname or top] = alias.name if alias.asname else top
                case ast.ImportFrom(module=str(module), names=aliases):
                    names |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in aliases}
        return names

    def defined(self) -> Iterator[str]:
        """The private names that the file gives to things of its own."""
        for node in self.nodes:
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    yield name
                case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                    yield name
                case ast.Attribute(value=ast.Name("self" | "cls"), attr=name, ctx=ast.Store()):
                    yield name

    def uses(self, own: frozenset[str]) -> Iterator[str]:
        """The internals that the file uses; `own` are the names that files of longctx define."""
        imported = self.imported()
        for name in imported.values():
            if _is_internal(name):
                yield name
        for node in self.nodes:
            match node:
                case ast.Attribute(value=ast.Call(func=ast.Name("super")), attr=name) if is_private(name):
                    yield name
                case ast.Attribute(attr=name):
                    yield from self._attribute(node, imported, own)
                case ast.Call(func=ast.Name("getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(str(name)), *_]):
                    if is_private(name) and name not in own:
                        yield name

    def _attribute(self, node: ast.Attribute, imported: dict[str, str], own: frozenset[str]) -> Iterator[str]:
        path = ast.unparse(node).split(".")
        if path[0] in imported and all(part.isidentifier() for part in path):
            full = ".".join([imported[path[0]], *path[1:]])
            if _is_internal(full):
                yield full
        elif is_private(node.attr) and node.attr not in PUBLIC:
            of_torch = node.attr in MODULE and path[0] != "self"
            yield from [node.attr] if of_torch or node.attr not in own else []


def _is_internal(name: str) -> bool:
    """Whether a path from an import is an internal of another package."""
    top = name.partition(".")[0]
    if top == "longctx" or top in sys.stdlib_module_names:
        return False
    return name.startswith(UNDOCUMENTED) or any(map(is_private, name.split(".")))


@cache
def read_sources(root: Path = ROOT) -> dict[str, Source]:
    """The files of longctx, by path from the root."""
    files = [file for folder in FOLDERS for file in sorted((root / folder).rglob("*.py"))]
    return {str(file.relative_to(root)): Source(ast.parse(file.read_text())) for file in files}


def find_uses(sources: dict[str, Source]) -> dict[str, list[str]]:
    """The files that use each internal."""
    own = frozenset(name for source in sources.values() for name in source.defined())
    found: dict[str, list[str]] = defaultdict(list)
    for file, source in sources.items():
        for name in sorted(set(source.uses(own))):
            found[name].append(file)
    return found


@dataclass(frozen=True)
class Canary:
    """What longctx uses an internal for, and the check of what it relies on."""

    use: str
    check: Callable[[Any], None]
    """Called with the internal; raises AssertionError if it is not as longctx needs it."""
    of_objects: bool = False
    """The last part of the name is an attribute of objects: the check is called with their class."""

    def run(self, name: str, files: Iterable[str]) -> None:
        """Fail, naming the internal, the files that use it and what for, if it is not there or has changed."""
        try:
            self.check(resolve(name.rpartition(".")[0] if self.of_objects else name))
        except Exception as error:  # noqa: BLE001 - an internal may fail in any way
            pytest.fail(f"{name} is not what {', '.join(files)} needs to {self.use}: {error!r}")


def resolve(name: str) -> Any:
    """Return what a path names: a module, or an attribute of one, which goes before a module of the same name."""
    top, *rest = name.split(".")
    found = import_module(top)
    path = top
    for part in rest:
        path = f"{path}.{part}"
        try:
            found = getattr(found, part)
        except AttributeError:
            if not inspect.ismodule(found):
                raise
            found = import_module(path)
    return found


def covers(canary: str, use: str) -> bool:
    """Whether a canary is that of a use: by its full path or, on an object, by its last part. The canary of a class
    covers what the class has, and that of a name the modules on the way to it."""
    if "." not in use:
        return canary.rpartition(".")[2] == use
    of_class = canary.rpartition(".")[2].lstrip("_")[:1].isupper()
    return canary == use or canary.startswith(f"{use}.") or (of_class and use.startswith(f"{canary}."))


def files_of(canary: str, uses: dict[str, list[str]]) -> list[str]:
    """The files that use the internal of a canary."""
    return sorted({file for use, files in uses.items() if covers(canary, use) for file in files})


def exists(found: Any) -> None:
    """It is imported, and no more is relied on."""


def takes(*names: str) -> Callable[[Any], None]:
    """It is called with these parameters by name."""

    def check(found: Any) -> None:
        missing = set(names) - inspect.signature(found).parameters.keys()
        assert not missing, f"no parameters {', '.join(sorted(missing))}"

    return check


def begins(*names: str) -> Callable[[Any], None]:
    """It is called, or overridden, with these parameters by position."""

    def check(found: Any) -> None:
        actual = [name for name in inspect.signature(found).parameters if name != "self"]
        assert actual[: len(names)] == list(names), f"the parameters are {', '.join(actual)}"

    return check


def has(*names: str) -> Callable[[Any], None]:
    """It has these attributes."""

    def check(found: Any) -> None:
        missing = [name for name in names if not hasattr(found, name)]
        assert not missing, f"no attributes {', '.join(missing)}"

    return check


def holds(*names: str) -> Callable[[Any], None]:
    """It is a dataclass with these fields."""

    def check(found: Any) -> None:
        missing = set(names) - {each.name for each in fields(found)}
        assert not missing, f"no fields {', '.join(sorted(missing))}"

    return check


def needs_nothing(found: Any) -> None:
    """It is called without arguments."""
    parameters = [each for name, each in inspect.signature(found).parameters.items() if name != "self"]
    needed = [each.name for each in parameters if each.default is each.empty and each.kind < each.VAR_POSITIONAL]
    assert not needed, f"it needs {', '.join(needed)}"


def sets(name: str) -> Callable[[Any], None]:
    """Its objects have this attribute, which their class gives them."""

    def check(found: Any) -> None:
        assert re.search(rf"\bself\.{name}\b", inspect.getsource(found)), f"no object has an attribute {name}"

    return check


def each(*checks: Callable[[Any], None]) -> Callable[[Any], None]:
    """All of these."""

    def check(found: Any) -> None:
        for one in checks:
            one(found)

    return check
