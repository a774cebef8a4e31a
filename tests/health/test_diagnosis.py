"""Diagnosis of a hang: the rank that does not come is named, whoever is healthy is not, and slow is not hung."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from longctx.health.diagnosis import Watcher, name_ranks
from tests.health.test_beat import BEAT


class Job:
    """Four ranks that report every second, and a watcher with a clock of its own."""

    def __init__(self) -> None:
        self.now = 100.0
        self.watcher = Watcher(lambda: self.now)
        self.beats = {rank: replace(BEAT, pid=10 + rank) for rank in range(4)}

    def pass_time(self, seconds: int, silent: Iterable[int] = ()) -> str | None:
        """Let ranks report each second, except for the silent ones; the first diagnosis."""
        for _ in range(seconds):
            self.now += 1
            for rank, beat in self.beats.items():
                if rank not in silent:
                    waited = beat.waited + 1 if beat.collective else 0.0
                    self.beats[rank] = replace(beat, number=beat.number + 1, elapsed=beat.elapsed + 1, waited=waited)
            found = self.watcher.update(self.beats)
            if found is not None:
                return found
        return None

    def wait(self, *ranks: int, collective: str = "layer 3, all_gather of [4] over 4 ranks") -> None:
        for rank in ranks:
            self.beats[rank] = replace(self.beats[rank], collective=collective, elapsed=0.0)


def test_a_healthy_job_does_not_hang() -> None:
    job = Job()
    for step in range(50):
        assert job.pass_time(1) is None
        for rank, beat in job.beats.items():
            job.beats[rank] = replace(beat, phase=f"step {step}", elapsed=0.0)


def test_ranks_that_are_all_busy_are_slow_however_long() -> None:
    assert Job().pass_time(1000) is None


def test_a_silent_rank_is_named_and_those_who_wait_for_it() -> None:
    job = Job()
    job.pass_time(3)
    job.wait(0, 1, 3)
    assert job.pass_time(8, silent=[2]) == (
        "rank 2 (process 12 on node1) has not reported for 6 s: its process is stopped, or its machine does not "
        "answer. Its last report: step 5, at longctx.model.ffn:128 in forward. "
        "ranks 0-1, 3 wait in step 5, layer 3, all_gather of [4] over 4 ranks."
    )
    assert job.watcher.silent == {2}


def test_a_rank_that_is_silent_for_a_while_while_nobody_waits_is_left_alone() -> None:
    job = Job()
    job.beats = {rank: replace(beat, limit=1e9) for rank, beat in job.beats.items()}
    assert job.pass_time(30, silent=[2]) is None
    assert job.pass_time(30) is None


def test_on_gpus_whose_waits_are_not_seen_a_silent_rank_is_named_when_others_are_overdue() -> None:
    job = Job()
    found = job.pass_time(20, silent=[2])
    assert found is not None
    assert found.startswith("rank 2 (process 12 on node1) has not reported for 7 s")
    assert found.endswith("Its last report: step 5, at longctx.model.ffn:128 in forward.")


def test_several_silent_ranks_as_of_a_lost_machine_are_all_named() -> None:
    job = Job()
    job.pass_time(3)
    job.wait(0, 1)
    found = job.pass_time(8, silent=[2, 3])
    assert found is not None
    assert found.count("has not reported for 6 s") == 2
    assert found.endswith("ranks 0-1 wait in step 5, layer 3, all_gather of [4] over 4 ranks.")


def test_if_no_rank_reports_the_last_one_is_named() -> None:
    job = Job()
    job.pass_time(2)
    job.pass_time(2, silent=[0, 2, 3])
    found = job.pass_time(10, silent=range(4))
    assert found is not None
    assert found.startswith("No rank reports any more. The last to report: rank 1 (process 11 on node1) has not")


def test_a_rank_that_reports_but_does_not_arrive_is_named_with_where_it_is() -> None:
    job = Job()
    job.wait(0, 2, 3)
    job.beats[1] = replace(job.beats[1], where="longctx.data.loader:88 in read", limit=1e9)
    assert job.pass_time(10) is None
    assert job.pass_time(1) == (
        "rank 1 (process 11 on node1) did not arrive within 10 s: step 5, at longctx.data.loader:88 in read. "
        "ranks 0, 2-3 wait in step 5, layer 3, all_gather of [4] over 4 ranks."
    )


def test_ranks_that_wait_for_each_other_are_named_with_their_collectives() -> None:
    job = Job()
    job.wait(0, 1)
    job.wait(2, 3, collective="barrier, called at longctx.train.trainer:80 in train")
    assert job.pass_time(20) == (
        "step 5: all ranks have waited for each other, for 11 s: ranks 0-1 in step 5, layer 3, all_gather of [4] over "
        "4 ranks; ranks 2-3 in step 5, barrier, called at longctx.train.trainer:80 in train."
    )


def test_a_rank_that_has_ended_is_neither_silent_nor_late() -> None:
    job = Job()
    job.beats[3] = replace(job.beats[3], phase="")
    assert job.pass_time(30, silent=[3]) is None


def test_a_rank_that_is_not_watched_any_more_is_not_missed() -> None:
    """The launcher knows that it died, and reads only the reports of those that run."""
    job = Job()
    job.pass_time(3)
    del job.beats[2]
    job.wait(0, 1, 3)
    for rank in job.beats:
        job.beats[rank] = replace(job.beats[rank], limit=1e9)
    assert job.pass_time(30) is None


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([0, 1, 2, 3, 6], "ranks 0-3, 6"), ([1, 3, 4], "ranks 1, 3-4")]
)
def test_runs_of_neighbouring_ranks_are_joined(ranks: list[int], text: str) -> None:
    assert name_ranks(ranks) == text
