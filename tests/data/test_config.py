"""The `[data]` table: values and their units."""

import pytest
from pydantic import ValidationError

from longctx.data.config import DataConfig
from longctx.data.length_range import LengthRange


def test_lengths_may_have_units():
    config = DataConfig(path="corpus", sequence_length="1Mi", shuffle_window="64Ki")
    assert (config.sequence_length, config.shuffle_window) == (2**20, 2**16)


def test_one_corpus_is_one_source():
    (source,) = DataConfig(path="corpus", sequence_length=16).sources
    assert (source.path, source.lengths) == ("corpus", LengthRange())


def test_a_mix_has_sources_with_ranges_of_lengths():
    mix = (
        {"path": "a", "weight": 3.0, "max_document": "4Ki"},
        {"path": "a", "weight": 0.5, "min_document": "32Ki"},
        {"path": "b", "weight": 1.0},
    )
    config = DataConfig(mix=mix, sequence_length=16)
    assert [source.lengths for source in config.sources] == [LengthRange(1, 4096), LengthRange(32768), LengthRange()]
    assert config.corpora == "a, b"


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({}, "path: missing: name one corpus, or several with tables"),
        ({"path": "a", "mix": ({"path": "b", "weight": 1.0},)}, "mix: data.path is set too: keep either path"),
        ({"mix": ({"path": "b"},)}, "weight"),
        ({"mix": ({"path": "b", "weight": 0.0},)}, "greater than 0"),
        ({"mix": ({"path": "b", "weight": float("inf")},)}, "finite"),
        ({"mix": ({"path": "b", "weight": 1.0, "min_document": 0},)}, "greater than 0"),
        (
            {"mix": ({"path": "b", "weight": 1.0, "min_document": 5, "max_document": 4},)},
            "max_document: 4 is less than",
        ),
    ],
)
def test_a_mix_that_is_none_is_refused(tables, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(sequence_length=16, **tables)


def test_documents_may_stay_in_their_order():
    assert DataConfig(path="corpus", sequence_length=16, shuffle_window="none").shuffle_window == "none"


@pytest.mark.parametrize(
    "wrong", [{"path": ""}, {"sequence_length": 0}, {"shuffle_window": 0}, {"shuffle_window": "all"}]
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        DataConfig(**{"path": "corpus", "sequence_length": 16} | wrong)
