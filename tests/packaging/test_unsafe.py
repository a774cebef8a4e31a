"""Nothing that a file holds is run: ruff refuses what would run it, and the exceptions are known."""

import ast
import subprocess
import sys

import pytest

from tests.packaging.internals import ROOT, Source, read_sources

REFUSED = {
    "import pickle; pickle.load(file)": "S301",
    "import pickle; pickle.loads(data)": "S301",
    "import pickle; pickle.Unpickler(file)": "S301",
    "import marshal; marshal.load(file)": "S302",
    "import shelve": "TID251",
    "import dill": "TID251",
    "import joblib": "TID251",
    "import torch; torch.load(file)": "TID251",
    "from torch import load": "TID251",
    "import torch; torch.serialization.load(file)": "TID251",
    "import torch; torch.jit.load(file)": "TID251",
    "import torch; torch.hub.load(name)": "TID251",
    "import torch.distributed.checkpoint as dcp; dcp.load(state, checkpoint_id=path)": "TID251",
    "import torch.distributed.checkpoint as dcp; dcp.FileSystemReader(path)": "TID251",
    "import numpy as np; np.load(file, allow_pickle=True)": "TID251",
    "from numpy.lib import format": "TID251",
    "import yaml; yaml.load(file)": "S506",
    "eval(text)": "S307",
    "exec(text)": "S102",
    "import subprocess; subprocess.run(text, shell=True)": "S602",
}
"""What ruff has to refuse in longctx, and the code under which it does."""
READERS = ("pickle.", "marshal.", "shelve.", "torch.load", "torch.serialization.", "torch.jit.load", "torch.hub.")
READERS += ("numpy.load", "numpy.lib.format")
EXCEPTIONS = {
    "longctx/checkpoint/restricted.py": {
        "pickle.Unpickler": "calls nothing but what `find_class` allows",
        "pickle.UnpicklingError": "an error",
        "torch.load": "with weights_only",
        "torch.serialization.safe_globals": "names what weights_only may call",
    },
    "parallel/rank_errors.py": {
        "pickle.dumps": "writes",
        "pickle.loads": "its own pickle",
    },
}
"""What the code uses of `READERS`, and why that runs nothing that a file names."""


@pytest.mark.parametrize("statement", REFUSED)
@pytest.mark.parametrize("place", ["longctx/data/new.py", "benchmarks/new.py"])
def test_ruff_refuses_it(statement: str, place: str) -> None:
    text = "\n".join(part.strip() for part in statement.split(";")) + "\n"
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", place, "-"]
    result = subprocess.run(command, input=text, cwd=ROOT, capture_output=True, text=True, check=False)
    assert REFUSED[statement] in {line.split()[1] for line in result.stdout.splitlines() if place in line}


def uses(source: Source) -> set[str]:
    """The names of `READERS` that a file imports or reaches."""
    imported = source.imported()
    found = set(imported.values())
    for node in source.nodes:
        if isinstance(node, ast.Attribute):
            top, *rest = ast.unparse(node).split(".")
            found |= {".".join([imported[top], *rest])} if top in imported else set()
    return {name for name in found if name.startswith(READERS)}


def test_the_exceptions_are_these() -> None:
    found = {file: uses(source) for file, source in read_sources().items()}
    assert {file: names for file, names in found.items() if names} == {
        file: set(reasons) for file, reasons in EXCEPTIONS.items()
    }


def test_torch_loads_with_restrictions() -> None:
    """weights_only is given, since an environment variable changes what it is by default."""
    calls = [
        node
        for source in read_sources().values()
        for node in source.nodes
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert calls
    for call in calls:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("weights_only") == "True", ast.unparse(call)


def test_uses_are_found() -> None:
    text = "import pickle as p\nimport torch\nfrom marshal import loads\np.load(f)\ntorch.load(f)\ntorch.zeros(1)"
    assert uses(Source(ast.parse(text))) == {"pickle.load", "torch.load", "marshal.loads"}
