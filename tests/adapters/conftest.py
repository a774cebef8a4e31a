"""Ranks for the frameworks' tests: of their own for each module, since what Megatron-Core and DeepSpeed make for the
life of a process, groups and their threads above all, would go on with all tests that follow."""

from collections.abc import Iterator
from importlib import import_module

import pytest

from longctx.parallel.local_ranks import LocalRanks
from tests.compare.peers import without_kernels
from tests.poison import poison


@pytest.fixture(scope="module")
def ranks() -> Iterator[LocalRanks]:
    """Up to 4 gloo ranks, as in the tests of all else."""
    with LocalRanks(4, timeout=240, setup=poison) as pool:
        yield pool


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of transformers compute without kernels of other packages."""
    for kind in ("mamba2", "qwen3_next"):
        without_kernels(monkeypatch, import_module(f"transformers.models.{kind}.modeling_{kind}"))
