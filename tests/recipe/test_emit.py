import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from longctx.config import Config
from longctx.recipe.emit import dump, value_text
from longctx.recipe.loading import load_as


class Inner(Config):
    ratio: float
    pair: tuple[float, float] = (0.9, 0.95)
    maybe: int | None = None


class Root(Config):
    name: str
    tables: dict[str, Inner] = Field(default_factory=dict)
    inner: Inner
    items: tuple[Inner, ...] = ()


def test_a_dump_reads_as_a_person_would_write_it():
    root = Root(name='say "hi"', inner=Inner(ratio=1e-8), tables={"a b": Inner(ratio=2.0, maybe=3)})
    assert dump(root) == (
        'name = "say \\"hi\\""\n'
        "items = []\n"
        "\n"
        '[tables."a b"]\n'
        "ratio = 2.0\n"
        "pair = [0.9, 0.95]\n"
        "maybe = 3\n"
        "\n"
        "[inner]\n"
        "ratio = 1e-08\n"
        "pair = [0.9, 0.95]\n"
    )


_text = st.text(st.characters(exclude_categories=["Cs"]))
_inner = st.builds(
    Inner,
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    pair=st.tuples(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False)),
    maybe=st.none() | st.integers(-(2**62), 2**62),
)
_roots = st.builds(
    Root,
    name=_text,
    inner=_inner,
    tables=st.dictionaries(_text, _inner, max_size=3),
    items=st.lists(_inner, max_size=3).map(tuple),
)


@given(root=_roots)
def test_a_dump_loads_back_to_an_equal_configuration(root, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "dumped.toml"
    path.write_bytes(dump(root).encode())
    assert load_as(Root, path) == root


class Optional(Config):
    value: int | None = None


class Required(Config):
    required: Optional


def test_a_table_without_values_is_written_as_well(tmp_path):
    path = tmp_path / "empty.toml"
    path.write_text(dump(Required(required=Optional())))
    assert load_as(Required, path) == Required(required=Optional())


@pytest.mark.parametrize("value", [0, -5, True, 0.1, float("inf"), "", "\x7f\x00\n", [1, [2]], {"a": {"b c": 1}}])
def test_values_are_read_back_by_the_standard_parser(value: Any):
    assert tomllib.loads(f"value = {value_text(value)}")["value"] == value


def test_what_toml_cannot_hold_is_refused():
    with pytest.raises(TypeError, match="a recipe cannot have the value"):
        value_text(object())
