"""A slice of the fault campaign (`make faults`): many trials of what starts no ranks, one of each other kind."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.combinations import mostly_slow_rows
from tests.faults.__main__ import KINDS, survives
from tests.faults.faults import Kind, TrialError, Workplace, expect_plain, expect_same_run
from tests.train.runs import losses, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # checkpoints read by one process

QUICK = {"recipe": 100, "command-line": 50, "flip-verify": 20}
"""Trials of the kinds that start no ranks."""


@pytest.fixture(scope="module")
def workplace(ranks, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    def train_on_pool(folder: Path, overrides: Sequence[str]) -> None:
        ranks.run(train, folder, folder / "whole", list(overrides), size=2)

    return Workplace(tmp_path_factory.mktemp("faults"), train_on_pool)


@pytest.mark.parametrize(
    ("name", "kind"), mostly_slow_rows([(kind.name, kind) for kind in KINDS], lambda name, kind: name in QUICK)
)
def test_faults_are_survived(workplace: Workplace, name: str, kind: Kind) -> None:
    if not kind.is_possible():
        pytest.skip("takes root, iproute2 and mount")
    for seed in range(QUICK.get(name, 1)):
        assert survives(kind, seed, workplace) is None


def test_what_is_not_survived_is_told(workplace: Workplace) -> None:
    def fail(trial: object) -> None:
        raise TrialError("it broke")

    assert survives(Kind("broken", "", 1, fail), 0, workplace) == "it broke"
    with pytest.raises(TrialError, match="Traceback"):
        expect_plain(2, "error: a\nTraceback (most recent call last)")
    with pytest.raises(TrialError, match="status 0"):
        expect_plain(0, "error: a")


def test_a_run_that_differs_in_one_bit_is_told(workplace: Workplace, tmp_path) -> None:
    same = workplace.copy(tmp_path / "same", run=True)
    expect_same_run(same / "out", workplace.whole)
    metrics = same / "out" / "metrics.jsonl"
    loss = f'"loss": {losses(workplace.whole)[7]}'
    metrics.write_text(metrics.read_text().replace(loss, '"loss": 2.5'))
    with pytest.raises(TrialError, match="losses"):
        expect_same_run(same / "out", workplace.whole)
