"""A run whose directory is lost resumes from the copies of its checkpoints; two runs never share them."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
from fsspec.implementations.local import LocalFileSystem

from longctx.checkpoint.copies import CheckpointCopies
from longctx.train.display import PlainDisplay
from tests.train.runs import checkpoints, losses, metrics, mistake, train, write_workplace

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # checkpoints read by one process

CONSTANT = "schedule.kind=constant"
FOUR, SIX = ("train.steps=4", CONSTANT), ("train.steps=6", CONSTANT)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return write_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="module")
def copied(ranks, workplace) -> Path:
    """A run of 4 steps, whose checkpoints 2 and 4 are in `store` too."""
    ranks.run(train, workplace, workplace / "run", [to(workplace), *FOUR], size=2)
    return workplace


@pytest.fixture
def place(copied, tmp_path) -> Path:
    """A copy of the run and its store, to change."""
    for name in ("run", "store"):
        shutil.copytree(copied / name, tmp_path / name)
    claim = json.loads((copied / "run" / "copies.json").read_text())
    (tmp_path / "run" / "copies.json").write_text(json.dumps(claim | {"url": url(tmp_path)}))
    return tmp_path


def url(folder: Path) -> str:
    return f"file://{folder / 'store'}"


def to(folder: Path) -> str:
    return f"checkpoint.copy_to={url(folder)}"


def copies(folder: Path) -> list[int]:
    return CheckpointCopies(url(folder)).steps()


@contextmanager
def messages_noted() -> Iterator[list[str]]:
    """What rank 0 displays meanwhile."""
    said: list[str] = []
    with patch.object(PlainDisplay, "message", lambda self, text: said.append(text)):
        yield said


@contextmanager
def store_is_full() -> Iterator[list[str]]:
    with patch.object(LocalFileSystem, "put_file", side_effect=OSError(28, "it is full")), messages_noted() as said:
        yield said


def test_in_an_empty_directory_it_resumes_where_the_copies_end(ranks, workplace, place):
    assert copies(place) == [2, 4]
    said, _ = ranks.run(train, workplace, place / "new", [to(place), *SIX], "auto", messages_noted, size=2)
    assert said[0] == f"Downloading {url(place)}/step-00000004."
    assert f"Resumed from {place}/new/checkpoints/step-00000004 after step 4." in said
    assert checkpoints(place / "new") == ["step-00000004", "step-00000006"]
    assert copies(place) == [2, 4, 6]
    whole = [f"checkpoint.copy_to=file://{place / 'other'}", *SIX]
    ranks.run(train, workplace, place / "whole", whole, size=2)
    assert [step.loss for step in metrics(place / "new").steps] == losses(place / "whole")[4:]


def test_a_start_on_other_ranks_with_a_later_copy_than_its_directory_has(ranks, workplace, place):
    shutil.rmtree(place / "run" / "checkpoints" / "step-00000004")
    (said, *_) = ranks.run(
        train, workplace, place / "run", [to(place), *SIX, "parallel.cp=3"], "auto", messages_noted, size=3
    )
    assert said[0] == f"Downloading {url(place)}/step-00000004."
    assert copies(place) == [2, 4, 6]


def test_its_own_directory_goes_on_without_a_download(ranks, workplace, place):
    said, _ = ranks.run(train, workplace, place / "run", [to(place), *SIX], "auto", messages_noted, size=2)
    assert f"Resumed from {place}/run/checkpoints/step-00000004 after step 4." in said
    assert not any("Downloading" in text for text in said)
    assert copies(place) == [2, 4, 6]


def test_going_back_gives_up_the_later_copies_too(ranks, workplace, place):
    earlier = place / "run" / "checkpoints" / "step-00000002"
    ranks.run(train, workplace, place / "run", [to(place), *FOUR, "checkpoint.every=1"], str(earlier), size=2)
    assert copies(place) == [2, 3, 4]
    assert checkpoints(place / "run") == ["step-00000002", "step-00000003", "step-00000004"]


def test_the_copies_of_another_run_are_not_touched(ranks, workplace, place):
    other = place / "other"
    (told, _) = ranks.run(mistake, workplace, other, [to(place), *FOUR], "never", size=2)
    assert "store has copies of an earlier run's checkpoints, the latest step-00000004: resume from it with" in told
    ranks.run(train, workplace, other, list(FOUR), size=2)
    (told, _) = ranks.run(mistake, workplace, other, [to(place), *SIX], size=2)
    assert f"store has copies of another run's checkpoints than that in {other}, the latest step-00000004" in told
    source = str(other / "checkpoints" / "step-00000004")
    (told, _) = ranks.run(mistake, workplace, place / "third", [to(place), *SIX], source, size=2)
    assert "store has copies of another run's checkpoints" in told
    assert copies(place) == [2, 4]


def test_a_run_whose_copies_were_taken_over_trains_on_and_ends_with_an_error(ranks, workplace, place):
    (told, _) = ranks.run(mistake, workplace, place / "run", [to(place), *SIX], "auto", taken_over, size=2)
    assert "step-00000006 was not copied" in told
    assert "has been claimed by another run" in told
    assert checkpoints(place / "run")[-1] == "step-00000006"
    assert copies(place) == [2, 4]


@contextmanager
def taken_over() -> Iterator[None]:
    """Another run claims the copies after the start."""
    owner, calls = CheckpointCopies.owner, 0

    def another(self: CheckpointCopies) -> str | None:
        nonlocal calls
        calls += 1
        return owner(self) if calls <= 2 else "another"

    with patch.object(CheckpointCopies, "owner", another):
        yield


def test_a_store_that_fails_is_reported_and_what_it_lacks_is_copied_by_the_next_start(ranks, workplace, place):
    arguments = workplace, place / "run", [to(place), *SIX]
    (told, _) = ranks.run(mistake, *arguments, "auto", store_is_full, size=2)
    assert f"checkpoint {place}/run/checkpoints/step-00000006 was not copied: rank 0: file://" in told
    assert "it is full" in told
    assert copies(place) == [2, 4]
    said, _ = ranks.run(train, *arguments, "auto", messages_noted, size=2)
    assert "Nothing to do" in said[0]
    assert copies(place) == [2, 4, 6]


def test_a_copy_that_has_changed_is_not_resumed_from(ranks, workplace, place):
    file = place / "store" / "step-00000004" / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    (told, _) = ranks.run(mistake, workplace, place / "new", [to(place), *SIX], size=2)
    assert "step-00000004 is damaged: __1_0.distcp has the checksum" in told


def test_what_is_no_url_is_refused(ranks, workplace, tmp_path):
    (told,) = ranks.run(mistake, workplace, tmp_path / "run", ["checkpoint.copy_to=bucket/mine"], size=1)
    assert "checkpoint.copy_to: expected a URL, such as s3://bucket/runs/mine, not 'bucket/mine'" in told
