"""The held-out loss, over all labels and by position, against a loop over tokens."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import distribute_tensor
from torch.nn import functional as F

from longctx.data.loader import Sequence
from longctx.engines.router_stats import RoutingFluctuation
from longctx.engines.torch_engine import TorchEngine
from longctx.model.decoder import Losses
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh
from longctx.recipe.tables import OptimizerConfig, TrainConfig
from longctx.train.batches import to_batch
from longctx.train.evaluate import evaluate, unigram_loss
from tests.model.cases import VOCABULARY, decoder, hybrid, tokens, with_experts

BOUNDS = [(0, 1, 6, 24), (0, 24), (0, 8, 9, 24)]


def heldout():
    """Three sequences, of which two data-parallel ranks have one too few."""
    sequences = []
    for number, bounds in enumerate(BOUNDS):
        x, labels = tokens(24, seed=number)[0], tokens(24, seed=number + 10)[0]
        labels[number :: number + 3] = -100
        sequences.append(Sequence(x, labels, torch.tensor(bounds), number))
    return sequences


def engine_on(mesh, model):
    train, optimizer = TrainConfig(steps=1), OptimizerConfig()
    return TorchEngine(model, train, optimizer, mesh, vocab_size=VOCABULARY, seed=7, dtype=torch.float64)


def maker(mesh, order):
    return partial(to_batch, mesh=mesh, order=order, device=torch.device("cpu"))


def evaluation_here(runs):
    answers = []
    for axes, order in runs:
        mesh = Mesh.build("cpu", **axes)
        answers.append(evaluate(engine_on(mesh, hybrid()), heldout(), maker(mesh, order), 40, RoutingFluctuation()))
    return answers


def by_a_loop():
    """Sums and counts by bucket, token by token: {lo: (sum, count)}."""
    model = decoder(hybrid())
    found = {}
    for sequence in heldout():
        bounds = tuple(sequence.cu_seqlens.tolist())
        logits = model(sequence.tokens[None], Layout(bounds))[0].detach()
        for t, label in enumerate(sequence.labels.tolist()):
            if label == -100:
                continue
            position = t - max(b for b in bounds if b <= t)
            lo = 0 if position == 0 else 2 ** int(math.log2(position))
            total, count = found.get(lo, (0.0, 0))
            nll = F.cross_entropy(logits[t], torch.tensor(label)).item()
            found[lo] = (total + nll, count + 1)
    return found


@pytest.mark.parametrize(
    ("size", "runs"),
    [
        (1, [({}, "zigzag")]),
        (2, [({"cp": 2}, "contiguous"), ({"dp_shard": 2}, "zigzag")]),
        (4, [({"dp_shard": 2, "cp": 2}, "zigzag"), ({"dp_shard": 2, "dp_replicate": 2}, "zigzag")]),
    ],
)
def test_every_mesh_gives_the_mean_and_the_buckets_of_a_loop(ranks, size, runs):
    want = by_a_loop()
    mean = sum(total for total, _ in want.values()) / sum(count for _, count in want.values())
    for answer in ranks.run(evaluation_here, runs, size=size):
        for got in answer:
            assert got.step == 40
            assert got.loss == pytest.approx(mean, rel=1e-10)
            assert [(p.lo, p.hi) for p in got.positions] == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32)]
            assert [p.tokens for p in got.positions] == [want[p.lo][1] for p in got.positions]
            assert [p.loss for p in got.positions] == pytest.approx(
                [want[p.lo][0] / want[p.lo][1] for p in got.positions], rel=1e-10
            )


def one_token_each(axes):
    mesh = Mesh.build("cpu", **axes)
    engine = SimpleNamespace(
        mesh=mesh,
        device=torch.device("cpu"),
        losses=lambda batch: Losses(torch.zeros(()), torch.full(batch.labels.shape, 2.0), {}),
    )
    sequence = Sequence(torch.arange(8), torch.arange(8), torch.arange(9), 0)
    return evaluate(engine, [sequence], maker(mesh, "contiguous"), 1, RoutingFluctuation())


def test_a_bucket_without_a_token_has_no_loss(ranks):
    (got,) = ranks.run(one_token_each, {}, size=1)
    assert (got.loss, got.positions[0].loss, got.positions[0].tokens) == (2.0, 2.0, 8)
    assert [p.tokens for p in got.positions[1:]] == [0, 0, 0]
    assert all(math.isnan(p.loss) for p in got.positions[1:])


def fluctuations(axes, order):
    """Evaluations before and after two experts of a layer change places for the router, and once more."""
    mesh = Mesh.build("cpu", **axes)
    engine = engine_on(mesh, with_experts())
    fluctuation, found = RoutingFluctuation(), []
    for change in (False, True, False):
        if change:
            for name, parameter in engine.model.named_parameters():
                if name == "blocks.3.ffn.router.weight":
                    whole = parameter.detach().full_tensor()
                    swapped = whole[[1, 0, 2, 3]]
                    with torch.no_grad():
                        local = distribute_tensor(swapped, parameter.device_mesh, parameter.placements)
                        parameter.copy_(local)
        found.append(evaluate(engine, heldout(), maker(mesh, order), 1, fluctuation).fluctuation)
    return found


def test_fluctuation_is_the_share_of_tokens_whose_experts_have_changed(ranks):
    (one,) = ranks.run(fluctuations, {}, "contiguous", size=1)
    first, second, third = one
    assert first == {}
    assert list(second) == ["blocks.1.ffn", "blocks.3.ffn"]
    # Swapped, a set changes where it holds one of the two and not the other: that is common, and not always so.
    assert second["blocks.1.ffn"] == 0
    assert 0.2 < second["blocks.3.ffn"] < 0.95
    assert set(third.values()) == {0.0}
    for axes in ({"cp": 2}, {"dp_shard": 2, "ep": 2}):
        for answer in ranks.run(fluctuations, axes, "zigzag", size=2):
            assert answer == one, axes


class Stream:
    """Sequences of four tokens: 0 0 1 2, then 0 0 1 2 again, and so on."""

    sequence_length = 4

    def __init__(self, sequences_per_epoch=1000.0):
        self.read = []
        self.sequences_per_epoch = sequences_per_epoch

    def __getitem__(self, number):
        self.read.append(number)
        return Sequence(torch.tensor([0, 0, 1, 2]), torch.zeros(4, dtype=torch.int64), torch.tensor([0, 4]), number)


def test_unigram_loss_by_hand():
    stream = Stream()
    labels = torch.tensor([0, 1, -100, 4])
    got = unigram_loss(stream, [Sequence(labels, labels, torch.tensor([0, 4]), 0)], 5, tokens=8)
    # 8 tokens are 0 four times, 1 and 2 twice; one added to each of 5 makes 13.
    assert got == pytest.approx(-(math.log(5 / 13) + math.log(3 / 13) + math.log(1 / 13)) / 3)
    assert stream.read == [0, 1]


def test_unigram_loss_reads_a_sequence_even_where_it_is_longer_than_the_tokens_asked_for():
    stream, labels = Stream(), torch.tensor([3])
    got = unigram_loss(stream, [Sequence(labels, labels, torch.tensor([0, 1]), 0)], 4, tokens=1)
    assert got == pytest.approx(math.log(8))
    assert stream.read == [0]


def test_unigram_loss_reads_no_epoch_twice():
    """One sequence ends the epoch that it shares with the next."""
    stream, labels = Stream(sequences_per_epoch=1.5), torch.tensor([3])
    unigram_loss(stream, [Sequence(labels, labels, torch.tensor([0, 1]), 0)], 4)
    assert stream.read == [0, 1]
