"""Verification of a short run: the loader against its corpus, steps over ranks, and steps resumed on other layouts."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist

from longctx.data.loader import Sequence
from longctx.engines import torch_engine
from longctx.engines.torch_engine import TorchEngine
from longctx.kernels.loss import IGNORE
from longctx.parallel.layout import Layout
from longctx.recipe.tables import TrainConfig
from longctx.train.batches import Cursor
from longctx.verify import training
from longctx.verify.cases import Case, reference
from longctx.verify.measure import Subject
from longctx.verify.training import Run, loader_faults, open_stream, run_steps, runs, verify_training, write_corpus
from tests.combinations import mostly_slow_rows
from tests.model.cases import VOCABULARY, hybrid, with_experts

SUBJECT = Subject(hybrid(), TrainConfig(steps=1, clip=0.05), VOCABULARY, length=48, seed=1)
ONE, CP2, CP4 = reference(packed=True), Case(2, "zigzag", packed=True), Case(4, "zigzag", packed=True)
DP2 = Case(1, "contiguous", packed=True, dp_shard=2)


@pytest.mark.parametrize("model", [pytest.param(hybrid(), marks=pytest.mark.slow), with_experts(depth=2)])
def test_a_sound_run_passes(ranks, model):
    rows = list(verify_training(replace(SUBJECT, model=model), ranks))
    assert [str(row.case) for row in rows] == [
        "the loader: tokens, labels, documents",
        "cp 4, zigzag, from a corpus",
        "dp_shard 2, cp 2, contiguous, resumed from cp 4, zigzag",
        "one rank, resumed from cp 4, zigzag",
        "cp 4, zigzag, resumed from one rank",
    ]
    assert [row.failures for row in rows] == [[]] * 5
    assert all(0 < row.differences[row.nearest] < 1e-12 for row in rows[1:])
    assert {"loss", "grad norm", "embedding.weight", "moment of embedding.weight"} < rows[1].differences.keys()


def test_the_recipes_own_layout_is_run_where_it_fits():
    own = Case(2, "balanced", packed=True, attention="ring")
    split = Case(2, "contiguous", packed=True, dp_shard=2)
    assert runs(4, (replace(own, packed=False), own)) == [Run(own), Run(split, own), Run(ONE, own), Run(own, ONE)]
    assert runs(4, (replace(own, cp=8),)) == [Run(CP4), Run(split, CP4), Run(ONE, CP4), Run(CP4, ONE)]
    assert runs(2, ()) == [Run(CP2), Run(DP2, CP2), Run(ONE, CP2), Run(CP2, ONE)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder of a corpus, and its documents."""
    folder = tmp_path_factory.mktemp("verify")
    return folder, write_corpus(folder, SUBJECT.length, SUBJECT.seed)


def edited(change):
    """The stream of the corpus with one sequence changed."""

    class Edited:
        def __init__(self, stream):
            self.stream = stream

        def __getitem__(self, number):
            sequence = self.stream[number]
            return change(sequence) if number == 1 else sequence

    return Edited


def labels(sequence, change):
    copy = sequence.labels.clone()
    change(copy)
    return replace(sequence, labels=copy)


def other_tokens(sequence):
    tokens = sequence.tokens.clone()
    at = int((tokens != 256).nonzero()[0, 0])
    tokens[at] = ord("z")
    return replace(sequence, tokens=tokens)


def same_label(sequence):
    return labels(sequence, lambda x: x.copy_(torch.where(x == IGNORE, x, sequence.tokens)))


def skipped_label(sequence):
    return labels(sequence, lambda x: x.index_fill_(0, (x != IGNORE).nonzero()[0], IGNORE))


def label_across_documents(sequence):
    return labels(sequence, lambda x: x.index_fill_(0, (x == IGNORE).nonzero()[0], 5))


LOADER_FAULTS = [
    other_tokens,
    same_label,
    skipped_label,
    label_across_documents,
    lambda sequence: Sequence(sequence.tokens, sequence.labels, torch.tensor([0, SUBJECT.length]), 1),
    lambda sequence: replace(sequence, cu_seqlens=torch.cat([sequence.cu_seqlens, torch.tensor([7])]).unique()),
]


@pytest.mark.parametrize("fault", LOADER_FAULTS)
def test_faults_of_the_loader_are_found(corpus, fault):
    folder, texts = corpus
    stream = open_stream(SUBJECT, folder)
    assert loader_faults(stream, texts) == 0
    assert loader_faults(edited(fault)(stream), texts) > 0


def test_a_sequence_that_is_read_twice_is_found(corpus):
    folder, texts = corpus
    stream = open_stream(SUBJECT, folder)
    assert loader_faults({number: stream[number // 2] for number in range(4)}, texts) > 0
    assert loader_faults({number: stream[number + 1] for number in range(4)}, texts) > 0


def swapped_shards(patch):
    right = Layout.shard
    patch.setattr(Layout, "shard", lambda layout, x, **rest: right(replace(layout, rank=1 - layout.rank), x, **rest))


def no_clipping(patch):
    if dist.get_rank() == 1:
        patch.setattr(torch_engine, "clip_grads_with_norm_", lambda *arguments: None)


def the_same_sequences_on_all_ranks(patch):
    right = Cursor.step
    patch.setattr(Cursor, "step", lambda cursor, sequences, dp, dp_rank: right(cursor, sequences, dp, 0))


def no_moments_loaded(patch):
    right = TorchEngine.load

    def load(engine, path):
        right(engine, path)
        for state in engine.optimizer.state.values():
            state["exp_avg"].zero_()

    patch.setattr(TorchEngine, "load", load)


def nothing_loaded(patch):
    patch.setattr(TorchEngine, "load", lambda engine, path: None)


def the_sequences_of_the_first_step_again(patch):
    right = training.read_state
    patch.setattr(training, "read_state", lambda path: replace(right(path), sequences=0))


FAULTS = [
    (swapped_shards, Run(CP2), {"loss", "embedding.weight"}),
    (no_clipping, Run(CP2), {"moment of embedding.weight"}),
    (the_same_sequences_on_all_ranks, Run(DP2), {"loss", "embedding.weight"}),
    (no_moments_loaded, Run(DP2, ONE), {"moment of embedding.weight", "updated embedding.weight"}),
    (nothing_loaded, Run(CP2, ONE), {"loss", "embedding.weight"}),
    (the_sequences_of_the_first_step_again, Run(CP2, ONE), {"loss", "embedding.weight"}),
]


@dataclass(frozen=True)
class Faulty:
    """`run_steps` with a fault, but for the one rank to which others are compared."""

    fault: Callable[[pytest.MonkeyPatch], None]

    def __call__(self, *arguments, **checkpoints):
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_world_size() > 1:
                self.fault(patch)
            return run_steps(*arguments, **checkpoints)


@pytest.mark.parametrize(
    ("fault", "run", "names"),
    mostly_slow_rows(FAULTS, lambda fault, *_: fault in (swapped_shards, no_clipping, no_moments_loaded)),
)
def test_faults_of_a_run_are_found(ranks, monkeypatch, fault, run, names):
    monkeypatch.setattr(training, "runs", lambda most_ranks, own: [run])
    _, row = verify_training(SUBJECT, ranks, run_steps=Faulty(fault))
    assert row.case == run
    assert names <= set(row.failures)
