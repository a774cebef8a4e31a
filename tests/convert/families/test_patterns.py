"""Helpers of hybrid families: the pattern of layers, and rows grouped by head."""

import pytest

from longctx.convert.families.base import Keys
from longctx.convert.families.patterns import FULL, LINEAR, ranges_by_part, read_pattern
from longctx.convert.row_table import RowRange

LETTERS = {LINEAR: "L", FULL: "S"}


def keys_of(**values):
    return Keys(values)


def test_the_pattern_is_read_from_layer_types_or_the_default():
    assert read_pattern(keys_of(layer_types=[FULL, LINEAR]), LETTERS, [LINEAR, FULL]) == "SL"
    assert read_pattern(keys_of(), LETTERS, [LINEAR, FULL]) == "LS"


@pytest.mark.parametrize("kinds", [[FULL], [FULL, "sliding_attention"], "full", [[FULL], [FULL]]], ids=str)
def test_another_pattern_is_a_problem_of_its_key(kinds):
    keys = keys_of(layer_types=kinds)
    assert read_pattern(keys, LETTERS, [LINEAR, FULL]) == "SS"
    assert [problem.partition(":")[0] for problem in keys.problems] == ["layer_types"]


def test_rows_are_grouped_by_head_then_by_part():
    assert ranges_by_part("w", 2, {"q": 3, "k": 1}) == {
        "q": [RowRange("w", 0, 3), RowRange("w", 4, 3)],
        "k": [RowRange("w", 3, 1), RowRange("w", 7, 1)],
    }
