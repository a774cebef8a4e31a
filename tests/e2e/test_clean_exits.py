"""A job that has trained and saved ends with status 0, each time (docs/checkpoints.md says what could end it else)."""

import pytest

from tests.e2e.jobs import Job
from tests.train.runs import checkpoints, write_workplace


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("entry", "jobs"), [(None, 50), ("lazy_switching", 30)])
def test_every_job_exits_cleanly(tmp_path, entry, jobs):
    write_workplace(tmp_path)
    failed = {}
    for number in range(jobs):
        arguments = ("train.steps=4", "checkpoint.every=1", "checkpoint.keep=2", "logging.tensorboard=true")
        status, _, stderr = Job(tmp_path, *arguments, entry=entry).wait()
        said = stderr + (tmp_path / "out" / "logs" / "rank-1.log").read_text()
        if status != 0 or "terminate called" in said:
            failed[number] = said
        else:
            assert checkpoints(tmp_path / "out") == ["step-00000003", "step-00000004"]
        (tmp_path / "out").rename(tmp_path / f"out-{number}")
    assert not failed, f"{len(failed)} of {jobs} jobs did not exit cleanly"
