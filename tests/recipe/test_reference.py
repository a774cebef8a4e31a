"""The page about recipes says what the code does."""

from pathlib import Path

from longctx.recipe.reference import keys, reference

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "recipes.md"


def test_the_page_is_what_the_code_makes():
    assert PAGE.read_text(encoding="utf-8") == reference(), "make docs"


def test_the_keys_that_shells_complete_are_those_of_the_code():
    assert (ROOT / "recipes" / "keys.txt").read_text(encoding="utf-8") == keys(), "make docs"
    lines = [line.split("\t") for line in keys().splitlines()]
    # Keys of an array of tables have the name of an element in them, which shells do not know.
    sections = [section for section in reference().split("\n## ") if not section.startswith("`[[")]
    assert len(lines) == len([line for line in "\n".join(sections).splitlines() if line.startswith("| `")])
    assert {len(line) for line in lines} == {2}
    assert dict(lines)["train.steps"] == "Optimizer steps."


def test_every_key_is_explained():
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    assert [row for row in rows if row.endswith("|  |")] == []
