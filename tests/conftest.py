"""What all tests share: ranks that are started once, and memory that is poisoned."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton's kernels are defined: without a GPU they run in its interpreter, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from longctx.parallel.local_ranks import LocalRanks
from tests.poison import poison


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> None:
    """Shells start what runs in the background with SIGINT ignored, and the processes that tests send it to inherit
    that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _cores_are_shared() -> None:
    """Among pytest's workers; more threads than cores wait for each other."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))


@pytest.fixture(scope="session")
def ranks() -> Iterator[LocalRanks]:
    """Up to 4 gloo ranks: `ranks.run(function, *arguments, size=2)`. The function lives in a test module."""
    with LocalRanks(4, timeout=60, setup=poison) as pool:
        yield pool


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    poison()
    yield
    torch.use_deterministic_algorithms(False)
