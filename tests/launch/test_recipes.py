"""`longctx recipes`: what ships, in a line each, and the text of one."""

from longctx.launch.recipes import description
from longctx.model.decoder import count_parameters
from longctx.recipe import load
from longctx.recipe.sources import shipped_folder
from tests.launch.test_main import run


def test_every_shipped_recipe_is_listed_with_its_size_and_a_sentence():
    status, text = run("recipes")
    assert status == 0
    *entries, _, note, advice = text.splitlines()
    assert [line.split()[0] for line in entries[::2]] == sorted(file.stem for file in shipped_folder().glob("*.toml"))
    assert all(line.strip().endswith((".", "?")) for line in entries[1::2])
    million = next(line for line in entries if line.startswith("million "))
    assert million.removeprefix("million").strip() == "960k parameters, sequences of 1Mi tokens, 2 ranks"
    assert 959_500 < count_parameters(load("million").model, 320) < 960_500
    assert note.startswith("Parameters are those with the vocabulary of bytes")
    assert "longctx recipes NAME" in advice


def test_the_text_of_one_is_its_file():
    assert run("recipes", "routed") == (0, (shipped_folder() / "routed.toml").read_text())


def test_a_name_that_is_none_is_answered_with_the_nearest():
    for name in ("rooted", "../recipes/routed"):
        status, told = run("recipes", name)
        assert (status, told.startswith(f"error: longctx ships no recipe '{name}'")) == (2, True)
    assert "did you mean 'routed'?" in run("recipes", "rooted")[1]


def test_the_description_is_the_first_sentence_of_the_head():
    text = "# One model\n# of 2.5 GB. Another sentence.\n#\n# More.\nname = 'a'\n"
    assert description(text) == "One model of 2.5 GB."
    assert description("name = 'a'\n# Not at the head.\n") == ""
