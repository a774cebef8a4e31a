"""User errors: ValueErrors whose message reaches the user unchanged, from other processes as well."""

import pickle

import pytest

from longctx.adapters.versions import UnsupportedVersionError
from longctx.engines.router_stats import NonFiniteLogitsError
from longctx.errors import UserError
from longctx.parallel.collectives import CollectiveError
from longctx.parallel.local_ranks import LocalRankError

MESSAGE = "recipe.toml:3: train.steps: 'many' is not an integer;\nwrite 4096"


def test_the_message_is_unchanged_and_has_several_lines():
    assert str(UserError(MESSAGE)) == MESSAGE


def test_callers_of_the_library_catch_it_as_a_value_error():
    with pytest.raises(ValueError, match=r"^recipe\.toml:3") as caught:
        raise UserError(MESSAGE)
    assert type(caught.value) is UserError


def test_it_crosses_processes():
    error = pickle.loads(pickle.dumps(UserError(MESSAGE)))
    assert type(error) is UserError
    assert str(error) == MESSAGE


def test_router_logits_that_are_not_finite_are_a_mistake_of_the_user():
    assert issubclass(NonFiniteLogitsError, UserError)


@pytest.mark.parametrize("error", [CollectiveError, LocalRankError, UnsupportedVersionError])
def test_failures_that_need_their_traceback_are_no_user_errors(error):
    assert not issubclass(error, ValueError)
