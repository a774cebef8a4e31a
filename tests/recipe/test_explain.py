"""Explanation of validation errors: one mistake per key, with what would be right."""

import json
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from longctx.config import Config, Integer
from longctx.recipe.explain import explain_validation_error


class Ring(Config):
    kind: Literal["ring"]
    chunks: Integer


class Tree(Config):
    kind: Literal["tree"]
    fanout: Integer = 2


class Inner(Config):
    hidden: Integer = 4
    rate: float = 0.5

    @model_validator(mode="after")
    def _fits(self):
        if self.hidden % 2:
            raise ValueError(f"hidden: {self.hidden} is odd; use 4; rate: so is this")
        if self.rate > 1:
            raise ValueError("the rate is above 1")
        return self


class Root(Config):
    steps: Integer
    name: str = "run"
    order: Literal["contiguous", "zigzag"] = "zigzag"
    sizes: tuple[Integer, Integer] = (1, 1)
    tile: Integer | Literal["none"] = "none"
    inner: Inner = Inner()
    schedule: Annotated[Ring | Tree, Field(discriminator="kind")] = Tree(kind="tree")


def mistakes(**data):
    with pytest.raises(ValidationError) as caught:
        Root.model_validate_json(json.dumps(data))
    return [(mistake.key, mistake.text) for mistake in explain_validation_error(caught.value, Root, data)]


@pytest.mark.parametrize(
    ("data", "key", "text"),
    [
        ({"steps": 1.5}, ("steps",), "should be an integer, not 1.5"),
        ({"steps": True}, ("steps",), "should be an integer, not true"),
        ({"steps": 1, "name": 3}, ("name",), "should be a string, not 3"),
        ({"steps": 1, "inner": 3}, ("inner",), "should be a table, not 3"),
        ({"steps": {"a": 1}}, ("steps",), "should be an integer, not a table"),
        ({"steps": "x"}, ("steps",), "'x' is not an integer; write 4096, '4_096', '4Ki' (4096) or '4k' (4000)"),
        ({"steps": 1, "name": ["ab"] * 40}, ("name",), f'should be a string, not [{chr(34)}ab", "ab", '),
        ({"steps": 1, "sizes": [1]}, ("sizes", 1), "missing"),
        ({"steps": 1, "sizes": [1, 2, 3]}, ("sizes",), "should have at most 2 items, not 3"),
        ({"steps": 1, "sizes": [1, "a"]}, ("sizes", 1), "'a' is not an integer"),
        ({"steps": 1, "schedule": {}}, ("schedule",), "needs 'kind', which selects its kind"),
        ({"steps": 1, "schedule": {"kind": "ring"}}, ("schedule", "chunks"), "missing"),
    ],
)
def test_a_wrong_value_has_its_key_and_what_would_be_right(data, key, text):
    ((got_key, got_text),) = mistakes(**data)
    assert got_key == key
    assert got_text.startswith(text)


def test_long_values_are_shortened():
    ((_, text),) = mistakes(steps=1, name=["ab"] * 40)
    assert text.endswith("...")
    assert len(text) < 90


def test_the_closest_choice_is_named():
    ((key, text),) = mistakes(steps=1, order="zigzg")
    assert key == ("order",)
    assert text.endswith("did you mean 'zigzag'?")
    ((_, text),) = mistakes(steps=1, order="up and down")
    assert "did you mean" not in text
    assert "'contiguous' or 'zigzag'" in text


def test_a_key_of_several_types_has_one_mistake_with_all_of_them():
    ((key, text),) = mistakes(steps=1, tile=[1])
    assert key == ("tile",)
    assert text == "should be an integer or 'none', not [1]"
    ((_, text),) = mistakes(steps=1, tile="nome")
    assert text.endswith("did you mean 'none'?")


@pytest.mark.parametrize(
    ("data", "key", "text"),
    [
        ({"naem": "a"}, ("naem",), "unknown key; did you mean 'name'?"),
        ({"inner": {"hiden": 4}}, ("inner", "hiden"), "unknown key; did you mean 'hidden'?"),
        ({"inner": {"name": "a"}}, ("inner", "name"), "unknown key; did you mean 'name'?"),
        ({"rate": 0.5}, ("rate",), "unknown key; did you mean 'inner.rate'?"),
        ({"inner": {"xyz": 4}}, ("inner", "xyz"), "unknown key; [inner] has hidden, rate"),
        ({"xyz": 4}, ("xyz",), "unknown key; a recipe has steps, name, order, sizes, tile, inner, schedule"),
        ({"schedule": {"kind": "tree", "fanot": 4}}, ("schedule", "fanot"), "unknown key; did you mean 'fanout'?"),
        (
            {"schedule": {"kind": "ring", "chunks": 4, "x": 1}},
            ("schedule", "x"),
            "unknown key; [schedule] has kind, chunks",
        ),
    ],
)
def test_an_unknown_key_names_the_closest_one(data, key, text):
    assert mistakes(steps=1, **data) == [(key, text)]


def test_a_misspelled_required_key_is_one_mistake():
    assert mistakes(stpes=1) == [(("stpes",), "unknown key; did you mean 'steps'?")]
    assert mistakes() == [(("steps",), "missing")]


def test_a_message_of_a_table_is_split_by_its_own_keys():
    assert mistakes(steps=1, inner={"hidden": 3}) == [
        (("inner", "hidden"), "3 is odd; use 4"),
        (("inner", "rate"), "so is this"),
    ]


def test_a_message_without_a_key_belongs_to_the_table():
    assert mistakes(steps=1, inner={"rate": 2.0}) == [(("inner",), "the rate is above 1")]


def test_all_mistakes_are_explained_in_order():
    got = mistakes(steps=0.5, order=1, inner={"hidden": "a", "rte": 1})
    assert [key for key, _ in got] == [("steps",), ("order",), ("inner", "hidden"), ("inner", "rte")]
