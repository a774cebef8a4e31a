"""One name, one thing: a public class has one definition, and names that stood for two things are gone."""

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    file for folder in ("kernels", "parallel", "moe", "longctx", "launch") for file in (ROOT / folder).rglob("*.py")
]
TWICE = {
    "Mamba2": "the mixer, and the Hugging Face family of that name",
    "AttentionExperts": "the mixer, and how upcycling makes it",
    "Groups": "the process groups that Megatron and DeepSpeed each hand over",
}
"""Classes that two files define under one name, and why."""
RETIRED = (
    "Begun",
    "begun",
    "Exchange",
    "Heads",
    "Holder",
    "Holders",
    "Problem",
    "making",
    "Reach",
    "Memory",
    "to_heads",
    "from_heads",
    "to_rows",
    "divided",
    "explain",
    "choose",
    "across",
    "whole",
    "said",
)


@cache
def trees() -> dict[Path, ast.Module]:
    return {file: ast.parse(file.read_text()) for file in FILES}


def classes() -> dict[str, list[str]]:
    found = defaultdict(list)
    for file, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(str(file.relative_to(ROOT)))
    return found


def test_a_public_class_has_one_definition() -> None:
    twice = {name: files for name, files in classes().items() if len(files) > 1}
    assert twice.keys() == TWICE.keys(), twice


def test_retired_names_are_gone() -> None:
    """No class, function or import has one; a local variable may."""
    found = []
    for file, tree in trees().items():
        for node in ast.walk(tree):
            match node:
                case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.alias(name=name):
                    found += [f"{file.relative_to(ROOT)}:{node.lineno} {name}"] if name in RETIRED else []
    assert not found


def test_every_module_says_what_it_is_in_its_first_line() -> None:
    """A docstring whose first line fits in a list (`head -1` of each file) and does not begin with a pronoun."""
    for file, tree in trees().items():
        text = ast.get_docstring(tree)
        if text is None:
            assert not file.read_text().strip(), f"{file.relative_to(ROOT)} has no docstring"
            continue
        assert not re.match(r"(What|How|Where|That|It|This|Those|These)\b", text), (
            f"{file.relative_to(ROOT)}: {text[:60]}"
        )
