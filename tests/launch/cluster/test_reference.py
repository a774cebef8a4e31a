"""The page of cluster profiles."""

from pathlib import Path

from longctx.launch.cluster.profile import PROFILES
from longctx.launch.cluster.reference import profile_reference

PAGE = Path(__file__).resolve().parents[3] / "docs/profiles.md"


def test_the_page_is_that_of_the_code():
    assert PAGE.read_text(encoding="utf-8") == profile_reference(), "make docs"


def test_every_key_is_explained():
    rows = [line for line in profile_reference().splitlines() if line.startswith("| `")]
    assert [row for row in rows if row.endswith("|  |")] == []
    keys = {row.split("`")[1] for row in rows}
    assert {key for kind in PROFILES.values() for key in kind.model_fields} - {"executor"} == keys
