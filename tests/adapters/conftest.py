"""Ranks for the frameworks' tests: of their own for each module, since what Megatron-Core and DeepSpeed make for the
life of a process, groups and their threads above all, would go on with all tests that follow."""

from collections.abc import Iterator

import pytest

from longctx.parallel.local import LocalRanks
from tests.poison import poison


@pytest.fixture(scope="module")
def ranks() -> Iterator[LocalRanks]:
    """Up to 4 gloo ranks, as in the tests of all else."""
    with LocalRanks(4, timeout=240, setup=poison) as pool:
        yield pool
