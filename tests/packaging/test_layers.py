"""Which folder may import which: the contracts of pyproject.toml hold, and notice a broken arrow."""

import ast
import json
import shutil
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    options = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", "--no-logo"]
    return subprocess.run(
        [sys.executable, "-c", command, *options], cwd=tree, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout as it installs, in links."""
    path = tmp_path_factory.mktemp("tree")
    subprocess.run([sys.executable, str(ROOT / ".ci/tree.py"), str(path)], check=True)
    return path


@pytest.fixture
def copy(tree: Path, tmp_path: Path) -> Path:
    """The same in files of its own, to be spoilt."""
    shutil.copytree(tree / "longctx", tmp_path / "longctx", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_layers_hold(tree: Path) -> None:
    result = lint_imports(tree)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_tree_follows_the_checkout(tree: Path) -> None:
    assert (tree / "longctx/kernels").resolve() == ROOT / "kernels"
    assert (tree / "longctx/config.py").resolve() == ROOT / "longctx/config.py"
    assert not (tree / "longctx/tests").exists()


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("kernels/__init__.py", "import longctx.parallel"),
        pytest.param("kernels/__init__.py", "from longctx import errors", marks=pytest.mark.slow),
        pytest.param("kernels/__init__.py", "import longctx.recipes", marks=pytest.mark.slow),
        pytest.param("parallel/__init__.py", "from longctx.config import Config", marks=pytest.mark.slow),
        pytest.param("parallel/__init__.py", "import longctx.data", marks=pytest.mark.slow),
        pytest.param("config.py", "import longctx.launch", marks=pytest.mark.slow),
        ("data/__init__.py", "def late() -> None:\n    import longctx.launch"),
        pytest.param("recipes/__init__.py", "import longctx.kernels", marks=pytest.mark.slow),
        pytest.param("train/__init__.py", "import transformers", marks=pytest.mark.slow),
        pytest.param("bench/run.py", "import fla", marks=pytest.mark.slow),
        ("parallel/__init__.py", "from megatron.core import parallel_state"),
        ("nowhere.py", "import longctx.kernels"),
    ],
)
def test_a_broken_arrow_is_noticed(copy: Path, module: str, statement: str) -> None:
    with (copy / "longctx" / module).open("a") as file:
        file.write(f"\n{statement}\n")
    result = lint_imports(copy)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "BROKEN" in result.stdout
    assert f"longctx.{module.split('/')[0].removesuffix('.py')}" in result.stdout


def test_the_order_is_total_and_every_package_is_in_it() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract for contract in contracts if contract["type"] == "layers")
    assert not [line for line in layers["layers"] if set(line) & set(":|")], "a line is one package"
    assert layers["exhaustive"]
    assert not {"ignore_imports", "exhaustive_ignores"} & layers.keys()


def import_graph(tree: Path) -> dict[str, list[str]]:
    """The modules that each file imports, at its top, in a function or for its types."""
    code = """
import json, sys
import grimp
sys.path.insert(0, "")
graph = grimp.build_graph("longctx", cache_dir=None)
print(json.dumps({module: sorted(graph.find_modules_directly_imported_by(module)) for module in graph.modules}))
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_no_file_imports_itself_by_way_of_others(tree: Path) -> None:
    graph = import_graph(tree)
    assert len(graph) > 200
    TopologicalSorter(graph).prepare()


def test_an_import_in_a_function_does_not_hide_a_cycle(copy: Path) -> None:
    with (copy / "longctx/errors.py").open("a") as file:
        file.write("\n\ndef late() -> None:\n    import longctx.files\n")
    with (copy / "longctx/files.py").open("a") as file:
        file.write("\nimport longctx.errors\n")
    with pytest.raises(CycleError, match=r"longctx\.files"):
        TopologicalSorter(import_graph(copy)).prepare()


def test_only_an_adapter_imports_another_framework(copy: Path) -> None:
    adapter = copy / "longctx/adapters/megatron"
    adapter.mkdir(parents=True, exist_ok=True)
    (adapter.parent / "__init__.py").touch()
    (adapter / "__init__.py").write_text("from megatron.core import parallel_state\nimport longctx.parallel\n")
    result = lint_imports(copy)
    assert result.returncode == 0, result.stdout + result.stderr


def distributed_uses(source: str) -> list[int]:
    """Lines that reach `torch.distributed`. import-linter sees no further into another project than its first name."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                found = any(f"{alias.name}.".startswith("torch.distributed.") for alias in names)
            case ast.ImportFrom(module=str(module), names=names):
                found = any(f"{module}.{alias.name}.".startswith("torch.distributed.") for alias in names)
            case ast.Attribute(value=ast.Name("torch"), attr="distributed"):
                found = True
            case _:
                found = False
        if found:
            lines.append(node.lineno)
    return lines


def test_kernels_know_no_process_group() -> None:
    uses = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / "kernels").rglob("*.py"))
        for line in distributed_uses(path.read_text())
    ]
    assert not uses


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import torch.distributed as dist", [1]),
        ("import torch\nfrom torch import distributed", [2]),
        ("from torch.distributed.tensor import DTensor", [1]),
        ("import torch\ntorch.distributed.barrier()", [2]),
        ("import torch\nfrom torch.distributions import Normal", []),
    ],
)
def test_each_way_to_a_process_group_is_seen(source: str, lines: list[int]) -> None:
    assert distributed_uses(source) == lines


def test_recipes_hold_data_alone() -> None:
    assert {path.name for path in (ROOT / "recipes").rglob("*.py")} == {"__init__.py"}
    body = ast.parse((ROOT / "recipes/__init__.py").read_text()).body
    assert all(isinstance(statement, ast.Expr) for statement in body), "recipes/__init__.py is a docstring at most"
