"""Fixtures of the rehearsals over hosts and on Slurm."""

from pathlib import Path

import pytest

from tests.e2e.two_hosts import STEPS
from tests.train.runs import train, write_workplace


@pytest.fixture(scope="module")
def whole(ranks, tmp_path_factory) -> Path:
    """The run that two ranks of this machine compute, which nothing interrupts."""
    workplace = write_workplace(tmp_path_factory.mktemp("whole"))
    ranks.run(train, workplace, workplace / "out", list(STEPS), size=2)
    return workplace / "out"


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    return write_workplace(tmp_path)
