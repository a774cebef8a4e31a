"""Errors of one rank are raised on every rank, and the ranks stay in step."""

import torch
import torch.distributed as dist

from longctx.parallel.rank_errors import raise_on_all_ranks


class LocalStateError(Exception):
    """An error that pickle refuses."""

    def __init__(self, text):
        super().__init__(text)
        self.function = lambda: text


KINDS = {"ValueError": ValueError, "KeyError": KeyError, "OSError": OSError, "LocalStateError": LocalStateError}


def run_blocks(cases):
    """For each case, which names the error of some ranks: the type and text of what is raised here, and whether it is
    this rank's own error."""
    answers = []
    for case in cases:
        kind = case.get(dist.get_rank())
        own = KINDS[kind](f"no data on {dist.get_rank()}") if kind else None
        try:
            with raise_on_all_ranks():
                if own is not None:
                    raise own
            answers.append(None)
        except Exception as error:  # noqa: BLE001 - the test compares it
            answers.append((type(error).__name__, str(error), error is own))
        # A rank that had left the block at another place would wait here for another collective.
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == dist.get_world_size()
    return answers


def by_case(ranks, *cases):
    return list(zip(*ranks.run(run_blocks, cases, size=3), strict=True))


def test_without_an_error_every_rank_continues(ranks):
    assert by_case(ranks, {}) == [(None, None, None)]


def test_a_value_error_is_raised_as_it_is_on_every_rank(ranks):
    (answers,) = by_case(ranks, {1: "ValueError"})
    assert [answer[:2] for answer in answers] == [("ValueError", "no data on 1")] * 3


def test_of_several_value_errors_the_lowest_ranks_is_raised(ranks):
    (answers,) = by_case(ranks, {1: "ValueError", 2: "ValueError"})
    assert [answer[:2] for answer in answers] == [("ValueError", "no data on 1")] * 3


def test_another_error_is_raised_where_it_happened_and_named_elsewhere(ranks):
    (answers,) = by_case(ranks, {1: "KeyError"})
    elsewhere = ("RankError", "rank 1 failed: KeyError: 'no data on 1'", False)
    assert answers == (elsewhere, ("KeyError", "'no data on 1'", True), elsewhere)


def test_each_rank_that_failed_raises_its_own_error_and_the_others_name_the_lowest_rank(ranks):
    (answers,) = by_case(ranks, {1: "OSError", 2: "KeyError"})
    assert answers == (
        ("RankError", "rank 1 failed: OSError: no data on 1", False),
        ("OSError", "no data on 1", True),
        ("KeyError", "'no data on 2'", True),
    )


def test_an_error_that_cannot_be_pickled_reaches_the_others_as_text(ranks):
    (answers,) = by_case(ranks, {0: "LocalStateError"})
    assert answers[0] == ("LocalStateError", "no data on 0", True)
    for name, text, _ in answers[1:]:
        assert name == "RankError"
        assert text.startswith("rank 0 failed: ")
        assert text.endswith("LocalStateError: no data on 0")


def test_ranks_stay_in_step_over_blocks_that_fail_in_different_places(ranks):
    first, second, third = by_case(ranks, {0: "KeyError"}, {}, {2: "ValueError"})
    assert [answer[0] for answer in first] == ["KeyError", "RankError", "RankError"]
    assert second == (None, None, None)
    assert [answer[:2] for answer in third] == [("ValueError", "no data on 2")] * 3
