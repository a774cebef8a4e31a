"""Recipe sources: files and overrides merged, with the origin of every key."""

import pytest

from longctx.errors import UserError
from longctx.recipe import sources
from longctx.recipe.loading import read_recipe
from longctx.recipe.sources import COMMAND_LINE, MergedConfig, Mistake, Origin, dotted, override, read_merged


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file below the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return name

    return write


def with_overrides(source, overrides):
    """Read a recipe and merge overrides into it."""
    merged = read_merged(source)
    for text in overrides:
        override(merged, text)
    return merged


@pytest.mark.parametrize(
    ("key", "text"), [((), ""), (("a",), "a"), (("a", "b", 0), "a.b[0]"), (("a", 0, "b", 1, 2), "a[0].b[1][2]")]
)
def test_keys_are_formatted_with_dots_and_indices(key, text):
    assert dotted(key) == text


def test_an_origin_is_a_place_and_a_line():
    assert str(Origin("r.toml", 3)) == "r.toml:3"
    assert str(COMMAND_LINE) == "command line"


def test_a_key_without_an_origin_has_that_of_the_nearest_table():
    origins = {(): Origin("r.toml"), ("a",): Origin("r.toml", 2), ("a", "b"): Origin("r.toml", 5)}
    merged = MergedConfig({}, origins)
    assert merged.origin(("a", "b", 0)) == Origin("r.toml", 5)
    assert merged.origin(("a", "c", "d")) == Origin("r.toml", 2)
    assert merged.origin(("z",)) == Origin("r.toml")
    assert merged.describe(Mistake(("a", "b"), "wrong")) == "r.toml:5: a.b: wrong"
    assert merged.describe(Mistake((), "wrong")) == "r.toml: wrong"


def test_tables_are_merged_key_by_key_and_the_extending_file_wins(write):
    write("base.toml", "[a]\nx = 1\ny = [1, 2]\n[a.c]\nz = 1\n[b]\nw = 1\n")
    merged = read_merged(write("r.toml", "extends = 'base.toml'\nb = 5\n[a]\ny = [3]\n[a.c]\nv = 2\n"))
    assert merged.data == {"a": {"x": 1, "y": [3], "c": {"z": 1, "v": 2}}, "b": 5}
    keys = {"a.x": "base.toml:2", "a.y": "r.toml:4", "a.c.z": "base.toml:5", "a.c.v": "r.toml:6", "b": "r.toml:2"}
    assert {key: str(merged.origin(tuple(key.split(".")))) for key in keys} == keys


def test_a_corpus_and_a_mix_replace_each_other(write):
    """Else neither could be changed by a recipe that extends, or on the command line: [data] has one of them."""
    mix = [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}]
    one = write("one.toml", '[data]\npath = "corpus"\nsequence_length = 16\n')
    several = write("several.toml", 'extends = "one.toml"\n[[data.mix]]\npath = "a"\nweight = 1\n')
    assert read_merged(several).data == {"data": {"sequence_length": 16, "mix": mix[:1]}}
    assert read_recipe(several, ["data.path=c"]).data == {"data": {"sequence_length": 16, "path": "c"}}
    override = 'data.mix=[{path="a",weight=1},{path="b",weight=2}]'
    assert read_recipe(one, [override]).data == {"data": {"sequence_length": 16, "mix": mix}}
    assert read_recipe(one, ["data.mix=[]"]).data["data"]["path"] == "corpus"


def test_paths_are_relative_to_the_file_that_extends(write):
    write("deep/base.toml", "x = 1\n")
    write("deep/middle.toml", "extends = 'base.toml'\ny = 2\n")
    merged = read_merged(write("r.toml", "extends = 'deep/middle.toml'\n"))
    assert merged.data == {"y": 2, "x": 1}
    assert str(merged.origin(("x",))) == "deep/base.toml:1"


@pytest.mark.parametrize(
    ("override", "data"),
    [
        ("a.x=2", {"a": {"x": 2, "y": "b"}}),
        ("a.x=[1, 2]", {"a": {"x": [1, 2], "y": "b"}}),
        ("a.y=zigzag", {"a": {"x": 1, "y": "zigzag"}}),
        ("a.y=1 # 2", {"a": {"x": 1, "y": 1}}),
        ("a.y=1\nb = 2", {"a": {"x": 1, "y": "1\nb = 2"}}),
        ("a.y=", {"a": {"x": 1, "y": ""}}),
        ("a.y=x=1", {"a": {"x": 1, "y": "x=1"}}),
        ("b.c.d=true", {"a": {"x": 1, "y": "b"}, "b": {"c": {"d": True}}}),
        ("a={ z = 3 }", {"a": {"x": 1, "y": "b", "z": 3}}),
        ("a.x.z=3", {"a": {"x": {"z": 3}, "y": "b"}}),
        ('"a.b"=1', {"a": {"x": 1, "y": "b"}, "a.b": 1}),
    ],
)
def test_an_override_is_a_toml_value_or_a_word(write, override, data):
    merged = with_overrides(write("r.toml", "[a]\nx = 1\ny = 'b'\n"), [override])
    assert merged.data == data
    assert merged.mistakes == []


def test_keys_of_an_override_and_the_tables_that_it_creates_are_of_the_command_line(write):
    merged = with_overrides(write("r.toml", "[a]\nx = 1\n"), ["a.y={ z = 3 }", "b.c.d=1"])
    of_command_line = [("a", "y"), ("a", "y", "z"), ("b",), ("b", "c"), ("b", "c", "d")]
    assert [merged.origin(key) for key in of_command_line] == [COMMAND_LINE] * 5
    assert str(merged.origin(("a",))) == "r.toml:1"
    assert str(merged.origin(("a", "x"))) == "r.toml:2"


def test_later_overrides_win(write):
    assert with_overrides(write("r.toml", "x = 1\n"), ["x=2", "x=3"]).data == {"x": 3}


@pytest.mark.parametrize("override", ["x", "=1", "a b=1", "[a]=1", ""])
def test_malformed_overrides_are_mistakes_and_change_nothing(write, override):
    merged = with_overrides(write("r.toml", "x = 1\n"), [override])
    assert merged.mistakes == [f"command line: {override!r} should be key=value, such as train.steps=100"]
    assert merged.data == {"x": 1}


def test_shipped_recipes_are_found_by_name_and_misspelled_ones_are_suggested(write, tmp_path, monkeypatch):
    write("shipped/quickstart.toml", "x = 1\n")
    monkeypatch.setattr(sources, "shipped_folder", lambda: tmp_path / "shipped")
    assert read_merged("quickstart").data == {"x": 1}
    with pytest.raises(UserError, match=r"ships no recipe 'quickstat'; did you mean 'quickstart'\?"):
        read_merged("quickstat")
    with pytest.raises(UserError, match=r"ships no recipe 'zzz' \(available: quickstart\)"):
        read_merged("zzz")


def test_the_shipped_folder_has_recipes():
    assert "quickstart" in {file.stem for file in sources.shipped_folder().glob("*.toml")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends = 3\n", "r.toml:1: extends: should be the path of a recipe or the name of a shipped one, not 3"),
        ("\nextends = 'no.toml'\n", "r.toml:2: extends: no.toml: no such file"),
        ("extends = 'r.toml'\n", "r.toml:1: extends: recipes extend each other in a cycle: r.toml → r.toml"),
        ("x = 1\ny = = 2\n", "r.toml:2: not valid TOML: Invalid value (column 5)"),
        ("x = 1\ny = [1,\n", "r.toml:2: not valid TOML: "),
    ],
)
def test_a_file_that_cannot_be_read_has_its_line(write, text, message):
    with pytest.raises(UserError) as caught:
        read_merged(write("r.toml", text))
    assert str(caught.value).startswith(message)


def test_a_file_that_is_missing_or_not_text_is_named(write, tmp_path):
    with pytest.raises(UserError, match=r"^none\.toml: no such file$"):
        read_merged("none.toml")
    (tmp_path / "r.toml").write_bytes(b"x = '\xff'")
    with pytest.raises(UserError, match=r"^r\.toml: is not UTF-8 text \(byte 5\)$"):
        read_merged("r.toml")


DEEP = {
    "arrays": "a = " + "[" * 5000 + "]" * 5000,
    "inline tables": "a = " + "{b = " * 5000 + "1" + "}" * 5000,
    "a dotted key": ".".join(["a"] * 5000) + " = 1",
    "a header": f"[{'.'.join(['a'] * 5000)}]",
    "a little": "a = " + "[" * 21 + "1" + "]" * 21,
}
TOO_DEEP = "tables and arrays are nested more than 20 levels deep"


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP.keys())
def test_a_recipe_that_is_nested_too_deeply_is_named(write, text):
    with pytest.raises(UserError, match=f"^r.toml: {TOO_DEEP}"):
        read_merged(write("r.toml", text))
    assert read_merged(write("r.toml", "a = " + "[" * 20 + "1" + "]" * 20)).data["a"]


@pytest.mark.parametrize("override", [text.replace(" = ", "=", 1) for text in DEEP.values() if "=" in text])
def test_an_override_that_is_nested_too_deeply_is_a_short_mistake(write, override):
    merged = with_overrides(write("r.toml", "x = 1\n"), [override])
    assert merged.data == {"x": 1}
    (mistake,) = merged.mistakes
    assert mistake.startswith(f"command line: {override[:80]!r}"[:-1])
    assert TOO_DEEP in mistake
    assert len(mistake) < 300


def test_a_number_of_thousands_of_digits_is_a_mistake(write):
    number = "9" * 5000
    with pytest.raises(UserError, match=r"^r\.toml: a number has too many digits$"):
        read_merged(write("r.toml", f"a = {number}"))
    (mistake,) = with_overrides(write("r.toml", "x = 1\n"), [f"a={number}"]).mistakes
    assert mistake.endswith("(5,002 characters)': a number has too many digits")


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".toml", "x/" * 3000, "a\0b.toml", ""])
def test_a_name_that_no_recipe_can_have_is_named_with_the_reason(write, name):
    reason = "has a NUL character" if "\0" in name else "is empty" if not name else "a path has at most 4,095 bytes"
    with pytest.raises(UserError, match=f"^recipe .*{reason}") as caught:
        read_merged(name)
    assert len(str(caught.value)) < 300
    quoted = name.replace("\0", "\\u0000")
    with pytest.raises(UserError, match=rf"^r\.toml:2: extends: recipe .*{reason}"):
        read_merged(write("r.toml", f'x = 1\nextends = "{quoted}"'))


def test_the_home_of_nobody_is_no_such_file(write):
    with pytest.raises(UserError, match=r"^~no-such-user/r\.toml: no such file"):
        read_merged("~no-such-user/r.toml")
