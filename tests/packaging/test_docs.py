"""The docs name files, modules and identifiers that exist, and the guided tour follows the code."""

import ast
import importlib
import re
import textwrap
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.packaging.tour import PAGE, ROOT, Question, questions, table

PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
]
FOLDERS = ("kernels", "parallel", "moe", "longctx", "launch", "recipes", "tests", "benchmarks", "docs")
TOUR = questions(PAGE.read_text())


def prose(page: Path) -> str:
    """A page without its indented blocks, which are commands and code."""
    return "\n".join(line for line in page.read_text().splitlines() if not line.startswith("    "))


@cache
def identifiers(file: Path) -> frozenset[str]:
    """Every name that a file defines or uses."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
    return frozenset(names)


@cache
def all_identifiers() -> frozenset[str]:
    files = chain.from_iterable((ROOT / folder).rglob("*.py") for folder in FOLDERS if folder != "tests")
    return frozenset(chain.from_iterable(identifiers(file) for file in files))


def resolves(dotted: str) -> bool:
    """Whether `longctx.a.b.C.d` is a module or a name in one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            if name in getattr(found, "__dataclass_fields__", {}):
                return True
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_a_page_names_exist(page: Path) -> None:
    named = set(re.findall(r"`(longctx(?:\.\w+)+)`", prose(page)))
    skipped = {name for name in named if name.startswith(("longctx.adapters.megatron", "longctx.adapters.deepspeed"))}
    assert [name for name in sorted(named - skipped) if not resolves(name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w/.-]+)`", prose(page))
    links = [link for link in re.findall(r"\]\(([^)#]+)", prose(page)) if "://" not in link]
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_rates_are_per_unit() -> None:
    """`65,552 bytes per layer per pass`, not `a layer and pass`."""
    units, nouns = r"\w*bytes|s|ms|seconds|lines?|tokens|[KMG]iB|calls?", "step|layer|pass|token|rank|node"
    telegraphic = re.compile(rf"\b({units}) an? ({nouns})\b")
    pages = (*PAGES, ROOT / "CHANGELOG.md", ROOT / "benchmarks/README.md", ROOT / "benchmarks/gpu/README.md")
    assert [found[0] for page in pages for found in telegraphic.finditer(page.read_text())] == []


def test_the_kernels_snippet_of_the_readme_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    section = (ROOT / "README.md").read_text().split("## Using the kernels directly\n")[1].split("\nOne function")[0]
    names: dict[str, Any] = {}
    exec(textwrap.dedent(section), names)
    assert capsys.readouterr().out == "torch.Size([1, 4096, 8, 128]) torch.Size([1, 8, 64, 128])\n"
    assert names["o"].shape == (1, 8, 128)
    assert names["o"].isfinite().all()


def test_the_glossary_names_identifiers_of_the_code() -> None:
    rows = re.findall(r"^\| .*$", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)
    columns = [row.split("|")[2] for row in rows if row.count("|") == 4]
    named = [name for column in columns for name in re.findall(r"`([\w.]+)`", column)]
    assert len(named) > 30
    plain = [name for name in named if not name.startswith("longctx.")]
    assert [name for name in plain if not set(name.split(".")) <= all_identifiers()] == []


def test_the_tour_answers_seven_questions() -> None:
    assert len(TOUR) == 7
    assert len(table().splitlines()) == 7


def module_of(file: str) -> str:
    """The name under which a file of the checkout is imported."""
    name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.startswith("longctx.") else f"longctx.{name}"


def imports(file: str) -> set[str]:
    """Modules and packages that a file imports from."""
    nodes = ast.walk(ast.parse((ROOT / file).read_text()))
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("question", TOUR, ids=lambda q: q.text)
def test_the_tour_follows_the_code(question: Question) -> None:
    """Every file holds the names that the page gives, and imports, or is imported by, one that was opened before."""
    assert question.stated == len(question.stops)
    opened: list[str] = []
    for stop in question.stops:
        for name in stop.names:
            assert name.split(".")[-1] in identifiers(ROOT / stop.file), f"{stop.file}: {name}"
        here = {module_of(stop.file), module_of(stop.file).rpartition(".")[0]}
        reached = any(imports(file) & here or module_of(file) in imports(stop.file) for file in opened)
        assert not opened or reached, f"{stop.file} is not reached from {opened}"
        opened.append(stop.file)
