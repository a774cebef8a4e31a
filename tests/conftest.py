"""Fixtures of all tests: a pool of ranks that is started once, and poisoned memory; progress of a long run."""

import gc
import importlib.util
import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton's kernels are defined: without a GPU they run in its interpreter, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from longctx.parallel import local_ranks
from longctx.parallel.local_ranks import LocalRanks
from tests.poison import poison
from tests.progress import Progress

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from tests.interpreter import compute_types_once, multiply_bfloat16, patch_once_per_kernel

    patch_once_per_kernel()
    compute_types_once()
    multiply_bfloat16()

# Most tests' functions need these on a rank; torch's compiler, every optimizer and FSDP.
local_ranks.PRELOADED += ["pytest", "hypothesis", "longctx.train.trainer", "torch._dynamo"]

# No deadlines: on a busy machine they fail tests that hold.
hypothesis.settings.register_profile("longctx", deadline=None, max_examples=50)
hypothesis.settings.load_profile("longctx")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--progress", action="store_true", help="lines of progress in place of dots")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--progress") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Progress(config), "progress")


def pytest_collection_finish() -> None:
    # What the test modules have imported stays: collections need not visit it again.
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session")
def eight_ranks() -> Iterator[LocalRanks]:
    """8 of them, for slow tests."""
    with LocalRanks(8, setup=poison) as pool:
        yield pool


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    poison()
    yield
    torch.use_deterministic_algorithms(False)
