"""`import longctx` offers packages and names, and imports them when they are used."""

import subprocess
import sys
from pathlib import Path

import pytest

import longctx
from longctx import kernels
from longctx.adapters.versions import UnsupportedVersionError
from longctx.kernels.linear import linear_attention
from tests.packaging.test_docs import ROOT


def test_what_is_offered_is_there() -> None:
    offered = [name for name in dir(longctx) if not name.startswith("_")]
    assert {"linear_attention", "state_scan", "softmax_attention", "kernels", "generate"} <= set(offered)
    for name in offered:
        try:
            found = getattr(longctx, name)
        except UnsupportedVersionError:
            assert name == "parallelize", "transformers is an extra"
            continue
        path = getattr(found, "__file__", None)
        assert path is None or Path(path).is_relative_to(ROOT)


def test_a_name_is_that_of_its_module() -> None:
    assert longctx.linear_attention is linear_attention
    assert longctx.kernels is kernels
    assert vars(longctx)["linear_attention"] is linear_attention, "imported once"


def test_packages_that_hold_other_programs_code_are_not_offered() -> None:
    """tests and benchmarks lie beside the packages in a checkout."""
    with pytest.raises(AttributeError, match="module 'longctx' has no attribute 'benchmarks'"):
        _ = longctx.benchmarks
    assert "tests" not in dir(longctx)


def test_the_import_is_light() -> None:
    code = (
        "import sys, longctx\n"
        "assert 'linear_attention' in dir(longctx) and not hasattr(longctx, 'nothing')\n"
        "assert not {'torch', 'numpy', 'pydantic'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reading_a_recipe_imports_neither_torchs_compiler_nor_its_sharded_tensors() -> None:
    """They take a process two seconds, and most commands read a recipe without training."""
    code = (
        "import sys, longctx.recipe\n"
        "found = {'torch._dynamo', 'torch.distributed.tensor'} & sys.modules.keys()\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
