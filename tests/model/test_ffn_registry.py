"""Registry of feed-forward layers: names, tables of a recipe, and layers."""

import pytest
from pydantic import ValidationError

from longctx.mixers import MIXERS
from longctx.model.config import ModelConfig
from longctx.model.ffn import FeedForward, FeedForwardConfig
from longctx.model.ffn_registry import FFNS, NO_FFN
from tests.model.cases import hybrid

REQUIRED = {"moe": {"experts": 4, "active": 2, "hidden": 6}}
"""Keys without a default."""


@pytest.mark.parametrize("name", FFNS)
def test_each_name_is_a_table_of_the_model_with_its_configuration(name):
    kind = FFNS[name]
    assert issubclass(kind, FeedForwardConfig)
    assert kind.name == name
    tables = {"swiglu": None, name: kind(**REQUIRED.get(name, {}))}
    config = hybrid(ffn=(name,), **tables)
    assert type(config.feed_forward(0)) is kind
    assert isinstance(config.feed_forward(0).build(12, 0, 1), FeedForward)


@pytest.mark.parametrize("name", FFNS)
def test_a_table_is_optional_if_all_of_its_keys_have_defaults(name):
    assert FFNS[name].needs_table() == (name in REQUIRED)
    if name in REQUIRED:
        with pytest.raises(ValidationError, match=rf"ffn: {name} needs the table \[model\.{name}\]"):
            hybrid(ffn=(name,), swiglu=None)
    else:
        assert hybrid(ffn=(name,), swiglu=None).feed_forward(0) == FFNS[name]()


def test_layers_may_have_no_feed_forward():
    assert NO_FFN not in FFNS
    config = hybrid(ffn=(NO_FFN, "swiglu"))
    assert [config.feed_forward(layer) is None for layer in range(3)] == [True, False, True]


def test_an_unknown_name_is_refused_with_those_that_there_are():
    known = ", ".join((*FFNS, NO_FFN))
    with pytest.raises(ValidationError, match=f"unknown feed-forward 'mlp'; expected one of {known}"):
        hybrid(ffn=("mlp",))


def test_feed_forwards_and_mixers_have_different_tables():
    names = [*FFNS, *(kind.name for kind in MIXERS.values())]
    assert len(set(names)) == len(names)
    assert set(names) <= ModelConfig.model_fields.keys()
