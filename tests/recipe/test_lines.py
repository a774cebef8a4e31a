import tomllib

from hypothesis import given
from hypothesis import strategies as st

from longctx.recipe.emit import value_text
from longctx.recipe.lines import key_lines


def test_each_key_and_table_has_the_line_where_it_stands():
    text = """\
# a comment with = and [brackets]
name = "a # b"   # and a comment

[train]   # [not.this]
steps = 10
schedule.kind = 'wsd'
"a.b" = 1

[ model . "x y" ]
width = 3
"""
    assert key_lines(text) == {
        ("name",): 2,
        ("train",): 4,
        ("train", "steps"): 5,
        ("train", "schedule"): 6,
        ("train", "schedule", "kind"): 6,
        ("train", "a.b"): 7,
        ("model",): 9,
        ("model", "x y"): 9,
        ("model", "x y", "width"): 10,
    }


def test_what_looks_like_toml_inside_a_string_is_a_string():
    text = '''a = """
[fake]
b = 1 \\"""
""""
c = \'\'\'
d = 2\'\'\'
e = "\\""
f = 'C:\\'
g = ""
'''
    assert tomllib.loads(text).keys() == {"a", "c", "e", "f", "g"}
    assert key_lines(text) == {("a",): 1, ("c",): 5, ("e",): 7, ("f",): 8, ("g",): 9}


def test_array_elements_and_inline_tables_have_lines_of_their_own():
    text = """\
sizes = [
    1,  # one
    [2, 3],
    { deep.er = "]" },
]
empty = []
table = { a = 1, b = { c = {} } }
"""
    lines = key_lines(text)
    assert (lines["sizes", 0], lines["sizes", 1], lines["sizes", 1, 1]) == (2, 3, 3)
    assert lines["sizes", 2, "deep", "er"] == 4
    assert lines["empty",] == 6
    assert lines["table", "b", "c"] == 7


def test_tables_of_an_array_are_counted():
    text = "[[run]]\nx = 1\n[run.sub]\ny = 1\n[[run]]\nx = 2\n[[run.part]]\n[[run.part]]\nz = 3\n"
    lines = key_lines(text)
    assert lines["run", 0, "sub", "y"] == 4
    assert lines["run", 1, "x"] == 6
    assert lines["run", 1, "part", 1, "z"] == 9


def test_windows_line_ends_count_once():
    assert key_lines("a = 1\r\n\r\n[t]\r\nb = 2\r\n")["t", "b"] == 4


_values = st.recursive(
    st.text(alphabet="ab\"'\\#=[]{},\n\t.") | st.integers() | st.booleans(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet="ab.# ]=", max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def _paths(value, path):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield from _paths(inner, (*path, name))


@given(st.dictionaries(st.text(alphabet="ab. #=]", max_size=3), _values, max_size=4))
def test_any_value_on_one_line_lies_on_that_line(data):
    text = "".join(f"{value_text(key)} = {value_text(value)} # end\n" for key, value in data.items())
    expected = {path: number for number, key in enumerate(data, start=1) for path in _paths(data[key], (key,))}
    assert tomllib.loads(text) == data
    assert key_lines(text) == expected
