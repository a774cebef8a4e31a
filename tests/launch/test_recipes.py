"""`longctx recipes`: what ships, in two lines each, what a recipe resolves to, and a copy to edit."""

import pytest

from longctx.launch.recipes import description
from longctx.model.decoder import count_parameters
from longctx.recipe import load
from longctx.recipe.sources import shipped_folder
from tests.launch.test_main import run


def entries() -> dict[str, tuple[str, str]]:
    """What is listed, by name: the numbers and the sentence."""
    lines = run("recipes")[1].split("\n\n")[0].splitlines()
    names = [line.split()[0] for line in lines[::2]]
    numbers = [line.removeprefix(name).strip() for name, line in zip(names, lines[::2], strict=True)]
    return dict(zip(names, zip(numbers, map(str.strip, lines[1::2]), strict=True), strict=True))


def test_every_shipped_recipe_is_listed_with_its_size_and_a_sentence():
    listed = entries()
    assert list(listed) == sorted(file.stem for file in shipped_folder().glob("*.toml"))
    assert all(sentence.endswith((".", "?")) for _, sentence in listed.values())
    assert listed["million"][0] == "960k parameters, sequences of 1Mi tokens, 2 ranks"
    assert 959_500 < count_parameters(load("million").model, 320) < 960_500
    assert listed["minimax-01-shape"] == (
        "456G parameters, sequences of 4Ki, 32Ki, 128Ki and 1Mi tokens, 256 ranks",
        "MiniMax-Text-01's shape: seven lightning layers to one of softmax, 32 experts in each, grown to 1Mi tokens.",
    )


def test_the_list_ends_with_what_to_do_next():
    status, text = run("recipes")
    assert status == 0
    for command in ("longctx train NAME --tiny", "longctx recipes show NAME", "longctx recipes copy NAME"):
        assert command in text.split("\n\n")[1]
    for name, (numbers, _) in entries().items():
        if not numbers.endswith(", 2 ranks"):
            load(name, tiny=True)


@pytest.mark.parametrize("arguments", [(), ("--tiny",), ("optimizer.lr=1e-5",)])
def test_what_is_shown_is_the_recipe(tmp_path, arguments):
    status, text = run("recipes", "show", "linear-llama3-1b-hybrid", *arguments)
    assert status == 0
    (tmp_path / "shown.toml").write_text(text)
    overrides = [argument for argument in arguments if "=" in argument]
    assert load(tmp_path / "shown.toml") == load("linear-llama3-1b-hybrid", overrides, tiny="--tiny" in arguments), (
        "what it extends, the overrides and the defaults are in the text"
    )


def test_a_copy_is_the_text_and_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("recipes", "copy", "routed") == (
        0,
        "Wrote routed.toml. Edit it, then: longctx train routed.toml --check\n"
        "It extends 'quickstart', where the other keys are: longctx recipes show routed.toml prints all of them.\n",
    )
    assert (tmp_path / "routed.toml").read_text() == (shipped_folder() / "routed.toml").read_text()
    (tmp_path / "routed.toml").write_text("mine")
    status, told = run("recipes", "copy", "routed")
    assert (status, told) == (
        2,
        "error: routed.toml exists: name another file, longctx recipes copy routed FILE.toml\n",
    )
    assert (tmp_path / "routed.toml").read_text() == "mine"


def test_a_copy_in_another_file_has_that_files_name(tmp_path):
    assert run("recipes", "copy", "bam-upcycle", tmp_path / "mine.toml")[0] == 0
    mine, shipped = load(tmp_path / "mine.toml"), load("bam-upcycle")
    assert (mine.name, mine.stages[0].name) == ("mine", "short")
    assert mine.model_copy(update={"name": shipped.name}) == shipped


def test_a_copy_goes_where_a_recipe_can_be_read(tmp_path):
    assert (
        f"error: {tmp_path / 'mine'}: a recipe's file ends in .toml"
        in run("recipes", "copy", "routed", tmp_path / "mine")[1]
    )
    status, told = run("recipes", "copy", "routed", tmp_path / "none" / "mine.toml")
    assert (status, f"there is no directory {tmp_path / 'none'}" in told) == (2, True)


@pytest.mark.parametrize("command", ["show", "copy"])
def test_a_name_that_is_none_is_answered_with_the_nearest(command):
    for name in ("rooted", "../recipes/routed"):
        status, told = run("recipes", command, name)
        assert (status, told.startswith(f"error: longctx ships no recipe '{name}'")) == (2, True)
    assert "did you mean 'routed'?" in run("recipes", command, "rooted")[1]


def test_the_description_is_the_first_sentence_of_the_head():
    text = "# One model\n# of 2.5 GB. Another sentence.\n#\n# More.\nname = 'a'\n"
    assert description(text) == "One model of 2.5 GB."
    assert description("name = 'a'\n# Not at the head.\n") == ""
