"""The `[data]` table: values and their units."""

import pytest
from pydantic import ValidationError

from longctx.data.config import DataConfig


def test_lengths_may_have_units():
    config = DataConfig(path="corpus", sequence_length="1Mi", shuffle_window="64Ki")
    assert (config.sequence_length, config.shuffle_window) == (2**20, 2**16)


def test_documents_may_stay_in_their_order():
    assert DataConfig(path="corpus", sequence_length=16, shuffle_window="none").shuffle_window == "none"


@pytest.mark.parametrize(
    "wrong", [{"path": ""}, {"sequence_length": 0}, {"shuffle_window": 0}, {"shuffle_window": "all"}]
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        DataConfig(**{"path": "corpus", "sequence_length": 16} | wrong)
