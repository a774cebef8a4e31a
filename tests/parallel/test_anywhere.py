"""Documents that begin and end anywhere, on up to 8 ranks: whatever hypothesis comes up with."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longctx.parallel.layout import STATE_SCHEDULES
from longctx.parallel.local_ranks import LocalRanks
from tests.kernels.linear.cases import KINDS
from tests.parallel.attention import test_api as attention
from tests.parallel.cases import ORDERS
from tests.parallel.linear import test_state_scan as scan


@st.composite
def packings(draw):
    length = draw(st.integers(1, 70))
    return (0, *sorted(draw(st.sets(st.integers(1, length - 1), max_size=9)) if length > 1 else ()), length)


attention_cases = st.lists(
    st.tuples(
        packings(),
        st.sampled_from(ORDERS),
        st.sampled_from(attention.schedules(4)),
        st.fixed_dictionaries({"causal": st.booleans(), "window": st.none() | st.integers(1, 30)}),
    ),
    min_size=8,
    max_size=8,
)
few = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(cases=attention_cases)
def test_attention(ranks, cases):
    answers = ranks.run(attention.on_rank, cases, torch.float64, 2, attention.HEADS, size=4)
    attention.compare(answers, cases, 4, torch.float64, 1e-10)


scan_cases = st.lists(st.tuples(packings(), st.sampled_from(ORDERS), st.booleans()), min_size=4, max_size=4)


@few
@given(cases=scan_cases, kind=st.sampled_from(list(KINDS)), states=st.sampled_from(STATE_SCHEDULES))
def test_recurrences(ranks, cases, kind, states):
    answers = ranks.run(scan.on_rank, kind, cases, torch.float64, states, size=4)
    scan.compare(answers, kind, cases, 4, torch.float64, 1e-10)


@pytest.fixture(scope="module")
def eight():
    with LocalRanks(8) as pool:
        yield pool


@pytest.mark.slow
@settings(few, max_examples=40)
@given(cases=attention_cases)
def test_attention_on_eight_ranks(eight, cases):
    answers = eight.run(attention.on_rank, cases, torch.float64, 2, (8, 2))
    attention.compare(answers, cases, 8, torch.float64, 1e-10)


@pytest.mark.slow
@settings(few, max_examples=40)
@given(cases=scan_cases, kind=st.sampled_from(list(KINDS)), states=st.sampled_from(STATE_SCHEDULES))
def test_recurrences_on_eight_ranks(eight, cases, kind, states):
    answers = eight.run(scan.on_rank, kind, cases, torch.float64, states)
    scan.compare(answers, kind, cases, 8, torch.float64, 1e-10)
