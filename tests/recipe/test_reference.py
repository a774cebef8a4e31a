"""The page about recipes says what the code does."""

from pathlib import Path

from longctx.recipe.reference import reference

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_the_page_is_what_the_code_makes():
    assert PAGE.read_text(encoding="utf-8") == reference(), "make docs"


def test_every_key_is_explained():
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    assert [row for row in rows if row.endswith("|  |")] == []
