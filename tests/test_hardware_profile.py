"""The hardware profile: written, read again, and refused where it is none."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from longctx import hardware_profile
from longctx.errors import UserError
from longctx.hardware_profile import (
    CollectiveTimes,
    Disk,
    HardwareProfile,
    Node,
    RankRates,
    Sample,
    load_profile,
    save_profile,
)

SAMPLES = (Sample(bytes=4096, seconds=2e-5), Sample(bytes=2**20, seconds=1e-3))
PROFILE = HardwareProfile(
    created="2026-11-28T06:49:26+00:00",
    versions={"torch": "2.13"},
    device="cuda",
    device_name="H100",
    device_memory=80 * 2**30,
    ranks=2,
    ranks_per_node=1,
    nodes=(
        Node(
            name="a",
            ranks=(0,),
            cores=96,
            memory=2**40,
            device_names=("H100",),
            clock_offset=-0.5,
            clock_uncertainty=1e-4,
        ),
    ),
    matmul={"bfloat16": 6e14},
    copy_rate=2e12,
    rank_rates=(RankRates(rank=0, matmul={"bfloat16": 6e14}, copy_rate=2e12),),
    links=(
        CollectiveTimes(
            collective="all_gather",
            scope="between",
            backend="nccl",
            ranks=2,
            samples=SAMPLES,
            latency=2e-5,
            bandwidth=2e10,
        ),
    ),
    disk=Disk(path="/runs", free=2**40, file_bytes=2**28, write=1e9, read=2e9),
)


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    save_profile(PROFILE, file)
    assert load_profile(file) == PROFILE
    save_profile(PROFILE.model_copy(update={"disk": None, "links": ()}), file)
    assert load_profile(file).disk is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"format": 1', '"format": 2'), "format 1: format: Input should be 1"),
        (('"cores": 96', '"core": 96'), r"nodes\.0\.cores: Field required"),
        (('"seconds": 0.001', '"seconds": 0'), r"links\.0\.samples\.1\.seconds: Input should be greater than 0"),
        (("{", "", 1), "the file: Invalid JSON"),
    ],
)
def test_another_file_is_refused_with_what_is_wrong(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    file = tmp_path / "profile.json"
    file.write_text(PROFILE.model_dump_json(indent=2).replace(*change))
    with pytest.raises(UserError, match=f"not a hardware profile of {message}" if "format" in message else message):
        load_profile(file)


def test_a_missing_file_says_how_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No such file or directory; longctx doctor --json .*none\.json writes"):
        load_profile(tmp_path / "none.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not a hardware profile"):
        load_profile(tmp_path / "binary")


def models() -> list[type[BaseModel]]:
    found = [one for one in vars(hardware_profile).values() if isinstance(one, type) and issubclass(one, BaseModel)]
    return [one for one in found if one.__module__ == hardware_profile.__name__]


def test_docs_have_every_field() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs/doctor.md").read_text()
    named = {name for model in models() for name in model.model_fields}
    assert len(named) > 20
    assert [name for name in sorted(named) if f"`{name}`" not in page] == []
