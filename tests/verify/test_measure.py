"""Verification step: its sequences, and logits gathered from the shards of all ranks."""

import pytest
import torch

from longctx.kernels.loss import IGNORE
from longctx.parallel.layout import Layout
from longctx.recipe.tables import TrainConfig
from longctx.verify.cases import SEQUENCES, Case
from longctx.verify.measure import RankResult, Subject, gather_logits, sequence
from tests.model.cases import hybrid

SUBJECT = Subject(hybrid(), TrainConfig(steps=1), vocab_size=29, length=24, seed=1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("number", range(SEQUENCES))
def test_a_label_is_the_next_token_of_the_same_document(number, packed):
    tokens, labels, bounds = sequence(SUBJECT, number, packed)
    assert tokens.shape == labels.shape == (1, 24)
    assert (bounds[0], bounds[-1]) == (0, 24)
    assert (len(bounds) > 2) == packed
    ends = {end - 1 for end in bounds[1:]}
    for t in range(24):
        if t in ends or t < number * 8:
            assert labels[0, t] == IGNORE
        else:
            assert labels[0, t] == tokens[0, t + 1]


def test_sequences_repeat_and_differ_in_tokens_and_number_of_labels():
    drawn = [sequence(SUBJECT, number, True) for number in range(SEQUENCES)]
    again = [sequence(SUBJECT, number, True) for number in range(SEQUENCES)]
    for (tokens, labels, bounds), (same_tokens, same_labels, same_bounds) in zip(drawn, again, strict=True):
        assert torch.equal(tokens, same_tokens)
        assert torch.equal(labels, same_labels)
        assert bounds == same_bounds
    assert not torch.equal(drawn[0][0], drawn[1][0])
    counts = {int((labels != IGNORE).sum()) for _, labels, _ in drawn}
    assert len(counts) == SEQUENCES
    assert 0 not in counts


def test_every_token_is_of_the_vocabulary():
    tokens, _, _ = sequence(Subject(SUBJECT.model, SUBJECT.train, 3, 200, 1), 0, False)
    assert tokens.unique().tolist() == [0, 1, 2]


CASES = [
    Case(1, "contiguous", False),
    Case(2, "contiguous", False),
    Case(2, "zigzag", True),
    Case(4, "balanced", True),
    Case(2, "zigzag", True, dp_shard=2),
    Case(2, "zigzag", True, dp_replicate=2),
    Case(1, "contiguous", True, dp_shard=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("length", [24, 21])
def test_logits_of_all_ranks_are_gathered_in_token_order(case, length):
    subject = Subject(SUBJECT.model, SUBJECT.train, 29, length, 1)
    logits = torch.randn(SEQUENCES, length, 29, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dp = case.dp_shard * case.dp_replicate
    results = []
    for dp_rank in range(dp):
        for cp_rank in range(case.cp):
            shards = {}
            for number in range(dp_rank, SEQUENCES, dp):
                layout = Layout(sequence(subject, number, case.packed)[2], case.order, case.cp, cp_rank)
                shards[number] = layout.shard(logits[number], dim=0)
            results.append(RankResult(0.0, shards, cp_rank, {}))
    # The ranks' results may come in any order.
    assert torch.equal(gather_logits(results[::-1], subject, case), logits)
