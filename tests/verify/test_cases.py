"""Which layouts a verification runs, and on which sequences."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.kernels.loss import IGNORE
from longctx.mixers.head_mixture import HeadMixtureConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.moe import MoeConfig
from longctx.recipe.tables import TrainConfig
from longctx.verify.cases import SEQUENCES, Case, cases, documents
from longctx.verify.measure import Subject, sequence
from tests.model.cases import hybrid, with_experts

MOE = MoeConfig(experts=4, active=2, hidden=6)


@pytest.mark.parametrize("model", [hybrid(), with_experts()], ids=["dense", "experts"])
@pytest.mark.parametrize("most_ranks", range(1, 9))
def test_every_case_fits_the_ranks(most_ranks, model):
    found = list(cases(most_ranks, model))
    assert len(set(found)) == len(found)
    for case in found:
        assert case.ranks <= most_ranks
        assert SEQUENCES % (case.dp_shard * case.dp_replicate) == 0


def test_on_four_ranks_everything_is_there():
    found = set(cases(4, hybrid()))
    want = {Case(1, "contiguous", packed, dp_shard=2) for packed in (False, True)}
    for order, packed in itertools.product(("contiguous", "zigzag"), (False, True)):
        want |= {Case(2, order, packed), Case(4, order, packed)}
        want |= {Case(2, order, packed, dp_shard=2), Case(2, order, packed, dp_replicate=2)}
    want.add(Case(4, "balanced", True))
    # 6 query heads do not divide over 4 ranks: no Ulysses over all of them.
    for schedule, ulysses in (("all-gather", 1), ("ring", 1), ("ulysses-ring", 2), ("ulysses-all-gather", 2)):
        want.add(Case(4, "zigzag", True, ulysses=ulysses, attention=schedule))
    want |= {Case(4, "zigzag", True, states=schedule) for schedule in ("ring", "tree")}
    assert found == want
    assert list(cases(1, hybrid())) == []


def test_a_mixture_has_the_schedules_that_all_of_its_heads_divide_for():
    softmax = SoftmaxConfig(heads=8, kv_heads=8, head_dim=4)

    def schedules(**heads):
        mix = HeadMixtureConfig(mixers=("softmax",), active=1, **heads) if heads else None
        return {case.attention for case in cases(4, hybrid(softmax=softmax, heads=mix))}

    assert schedules() == {"auto", "all-gather", "ring", "ulysses", "ulysses-ring", "ulysses-all-gather"}
    assert schedules(shared=4) == schedules() == schedules(shared=0)
    assert schedules(shared=2) == schedules() - {"ulysses"}
    assert schedules(shared=1) == {"auto", "all-gather", "ring"}


def test_experts_are_divided_over_ranks_of_every_axis_but_copies():
    found = set(cases(4, with_experts())) - set(cases(4, hybrid()))
    axes = ((2, 1, 1, 2), (1, 2, 1, 2), (2, 2, 1, 2), (2, 2, 1, 4), (2, 1, 2, 2))
    assert found == {
        Case(cp, "zigzag", packed, dp_shard=shard, dp_replicate=replicate, ep=ep)
        for cp, shard, replicate, ep in axes
        for packed in (False, True)
    }
    # 6 experts do not divide over 4 ranks.
    six = with_experts(moe=MoeConfig(experts=6, active=2, hidden=6))
    assert {case.ep for case in cases(4, six)} == {1, 2}


def test_a_similarity_router_is_verified_by_schedules_that_its_mixers_do_not_have():
    moe = MoeConfig(experts=4, active=2, hidden=6, router="similarity")
    model = hybrid(layers="L", softmax=None, ffn="moe", swiglu=None, moe=moe)
    attention = {case.attention for case in cases(4, model)}
    assert attention == {"auto", "all-gather", "ring"}
    assert {case.attention for case in cases(4, model.model_copy(update={"moe": MOE}))} == {"auto"}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case(1, "contiguous", False), "one rank, one document"),
        (Case(4, "zigzag", True), "cp 4, zigzag, packed"),
        (Case(2, "contiguous", False, 2, 1), "dp_shard 2, cp 2, contiguous, one document"),
        (Case(2, "zigzag", True, 1, 2), "dp_replicate 2, cp 2, zigzag, packed"),
        (Case(2, "zigzag", True, 2, ep=4), "dp_shard 2, cp 2, ep 4, zigzag, packed"),
        (Case(2, "zigzag", True, states="ring"), "cp 2, zigzag, states by ring, packed"),
    ],
)
def test_a_case_says_what_it_is(case, words):
    assert str(case) == words


@given(st.integers(1, 300), st.booleans(), st.integers(0, 5))
def test_documents_cover_the_sequence(length, packed, seed):
    bounds = documents(length, packed, seed)
    assert (bounds[0], bounds[-1]) == (0, length)
    assert all(left < right for left, right in itertools.pairwise(bounds))
    assert packed or len(bounds) == 2
    if packed and length >= 4:
        assert min(right - left for left, right in itertools.pairwise(bounds)) == 1
        assert len(bounds) >= min(length, 12)


@pytest.mark.parametrize("packed", [False, True])
def test_labels_follow_in_their_document_and_the_last_token_has_none(packed):
    subject = Subject(hybrid(), TrainConfig(steps=1), vocab_size=29, length=40, seed=3)
    (x, labels, bounds), again = sequence(subject, 1, packed), sequence(subject, 1, packed)
    assert torch.equal(x, again[0])
    assert not torch.equal(x, sequence(subject, 0, packed)[0])
    unlabelled = 40 // 3
    for begin, end in itertools.pairwise(bounds):
        begin = max(begin, unlabelled)
        assert torch.equal(labels[0, begin : end - 1], x[0, begin + 1 : end])
        assert labels[0, end - 1] == IGNORE
    assert (labels[0, :unlabelled] == IGNORE).all()
    assert (sequence(subject, 0, packed)[1] != IGNORE).sum() > (labels != IGNORE).sum()
