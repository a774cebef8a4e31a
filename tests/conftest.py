"""What all tests share: ranks that are started once, and memory that is poisoned."""

from collections.abc import Iterator

import pytest
import torch

from longctx.parallel.local import LocalRanks


@pytest.fixture(scope="session")
def ranks() -> Iterator[LocalRanks]:
    """Up to 4 gloo ranks: `ranks.run(function, *arguments, size=2)`. The function lives in a test module."""
    with LocalRanks(4, timeout=60) as pool:
        yield pool


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fresh allocations hold NaN, so that reading what nobody wrote shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
