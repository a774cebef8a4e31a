"""Findings: one line for nodes that are alike, and what is not ok says what to do."""

import pytest

from longctx.doctor.findings import Finding, few, merged, worst


def test_what_is_not_ok_says_what_to_do() -> None:
    with pytest.raises(AssertionError):
        Finding("a", "b", "warning")
    with pytest.raises(AssertionError):
        Finding("a", "b", "ok", "nothing")


def test_nodes_that_are_alike_are_one_line() -> None:
    low = Finding("open files", "64", "wrong", "raise it")
    nodes = {"a": [Finding("open files", "9"), Finding("gpus", "8")], "b": [low], "c": [Finding("open files", "10")]}
    assert merged(nodes) == [
        Finding("open files", "9; 10", where="a, c"),
        Finding("open files", "64", "wrong", "raise it", "b"),
        Finding("gpus", "8", where="a"),
    ]
    assert merged({"a": [low], "b": [low]}) == [low], "everywhere: no place is named"


def test_of_many_names_the_first_are_shown() -> None:
    assert few("abcd") == "a, b, c, d"
    assert few("abcdef") == "a, b, c, 3 more"


def test_the_most_severe_status_counts() -> None:
    fine, warning = Finding("a", ""), Finding("b", "", "warning", "x")
    assert worst([]) == worst([fine]) == "ok"
    assert worst([warning, fine]) == "warning"
    assert worst([warning, Finding("c", "", "wrong", "x"), fine]) == "wrong"
