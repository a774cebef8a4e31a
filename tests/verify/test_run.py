"""Verification: passes where ranks agree, and names what is wrong where one of them computes something else."""

import math
from dataclasses import replace
from functools import partial
from itertools import islice

import pytest
import torch
import torch.distributed as dist

from longctx.engines import step as engine
from longctx.engines import torch_engine
from longctx.engines.torch_engine import TorchEngine
from longctx.kernels.loss import IGNORE
from longctx.mixers import lightning
from longctx.mixers.attention_experts import AttentionExpertsConfig
from longctx.model.moe import MoeConfig
from longctx.moe import experts
from longctx.parallel.layout import Layout
from longctx.recipe.tables import ParallelConfig, TrainConfig
from longctx.verify import measure as measuring
from longctx.verify import run
from longctx.verify.cases import Case, own_cases, reference
from longctx.verify.measure import RankResult, Subject, measure
from longctx.verify.run import BEYOND_CHANCE, Row, bound_of, differences, relative, shrink
from tests.model.cases import VOCABULARY, decoder, hybrid, routed, routed_by, with_experts

SUBJECT = Subject(hybrid(), TrainConfig(steps=1), VOCABULARY, length=32, seed=1)
verify = partial(run.verify, evaluate=None)  # one rank against the equations: tests/verify/equations/test_step.py
INPUT_OF = {"L": "blocks.0.mixer.qkvu.weight", "S": "blocks.1.mixer.qkv.weight"}


def only(monkeypatch, *chosen):
    monkeypatch.setattr(run, "cases", lambda most_ranks, model: iter(chosen))


def fp64_failures(ranks, function):
    """By case, what is out of bounds in float64."""
    chosen = len(list(run.cases(ranks.size, SUBJECT.model)))
    return {str(row.case): row.failures for row in islice(verify(SUBJECT, ranks, measure=function), chosen)}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_hybrid_passes_in_float64_and_in_its_own_precision(ranks, precision, monkeypatch):
    chosen = [Case(4, "contiguous", False), Case(2, "contiguous", True, dp_replicate=2)]
    chosen.append(Case(4, "zigzag", True, ulysses=2, attention="ulysses-ring", states="tree"))
    only(monkeypatch, *chosen)
    subject = Subject(SUBJECT.model, TrainConfig(steps=1, precision=precision), VOCABULARY, 32, 1)
    rows = list(verify(subject, ranks))
    alone = [(reference(packed), precision) for packed in (False, True)]
    want = [*((c, "fp64") for c in chosen), *alone, *((c, precision) for c in chosen)]
    assert [(row.case, row.precision) for row in rows] == want
    for row in rows:
        assert row.failures == []
        names = [name for name, _ in decoder(hybrid()).named_parameters()]
        steps = {f"{what} {name}" for what in ("moment of", "updated") for name in names}
        assert row.differences.keys() == {"loss", "logits", "grad norm", *names, *steps}
        # Some rounding there is: these are really other computations.
        assert row.differences[row.nearest] > 0
    assert all(max(row.differences.values()) < 1e-12 for row in rows if row.precision == "fp64")


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [
        [Case(2, "zigzag", True, ep=2), Case(2, "zigzag", True, dp_shard=2, ep=4)],
        [Case(2, "zigzag", True, dp_shard=2, ep=2)],
    ],
    ids=["over all ranks", "over some ranks"],
)
def test_experts_pass_over_ranks_that_divide_them(ranks, monkeypatch, chosen):
    only(monkeypatch, *chosen)
    monkeypatch.setattr(run, "DRAWS", 1)
    subject = Subject(routed(), TrainConfig(steps=1), VOCABULARY, 32, 1)
    rows = list(verify(subject, ranks))
    assert [row.failures for row in rows] == [[]] * len(rows)
    for row in rows[: len(chosen)]:
        assert row.differences.keys() > {
            "blocks.1.ffn.experts.gate_up",
            "blocks.1.ffn.router.weight",
            "blocks.0.mixer.head_router.weight",
        }
        assert 0 < max(row.differences.values()) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["each", "shared"])
def test_attention_experts_in_parallel_blocks_pass_beside_experts_of_which_a_token_takes_one(ranks, monkeypatch, kv):
    chosen = [Case(4, "zigzag", True), Case(2, "contiguous", False, dp_shard=2, ep=2)]
    chosen.append(Case(4, "zigzag", True, attention="ulysses"))
    only(monkeypatch, *chosen)
    model = hybrid(
        layers="LA",
        softmax=None,
        attention_experts=AttentionExpertsConfig(experts=2, heads=2, head_dim=4, kv=kv),
        block="parallel",
        ffn="moe",
        swiglu=None,
        moe=MoeConfig(experts=4, active=1, hidden=6, z=1e-3),
        depth=2,
    )
    rows = list(verify(Subject(model, TrainConfig(steps=1, precision="bf16"), VOCABULARY, 32, 1), ranks))
    assert [row.failures for row in rows] == [[]] * len(rows)
    for row in rows[: len(chosen)]:
        assert row.differences.keys() > {"blocks.1.mixer.router.weight", "blocks.1.ffn.router.weight"}
        assert 0 < max(row.differences.values()) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("router", ["similarity", "attention"])
def test_experts_that_tokens_choose_together_pass(ranks, router, monkeypatch):
    chosen = [Case(2, "contiguous", False), Case(4, "zigzag", True, ep=2)]
    chosen.append(Case(4, "zigzag", True, ulysses=2, attention="ulysses-all-gather"))
    only(monkeypatch, *chosen)
    rows = list(verify(Subject(routed_by(router), TrainConfig(steps=1), VOCABULARY, 32, 1), ranks))
    assert [row.failures for row in rows] == [[]] * len(rows)
    for row in rows[: len(chosen)]:
        assert ("blocks.1.ffn.similarity.weight" in row.differences) == (router == "similarity")
        assert 0 < max(row.differences.values()) < 1e-12


def with_a_lost_token_on_rank_1(subject, case, precision):
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            right = experts.combine
            patch.setattr(
                experts, "combine", lambda rows, places, w: right(rows, places.index_fill(0, torch.tensor([0]), -1), w)
            )
        return measure(subject, case, precision)


def test_a_token_that_its_experts_lose_is_reported(ranks, monkeypatch):
    only(monkeypatch, Case(2, "zigzag", False, ep=2))
    subject = Subject(with_experts(), TrainConfig(steps=1), VOCABULARY, 32, 1)
    row = next(verify(subject, ranks, measure=with_a_lost_token_on_rank_1))
    assert {"loss", "logits", "blocks.1.ffn.experts.down"} <= set(row.failures)


@pytest.mark.slow
def test_every_case_passes(ranks):
    rows = list(verify(SUBJECT, ranks))
    # Each case in two precisions, and one rank by itself in its own, packed and not.
    assert len(rows) == 2 * len(list(run.cases(4, SUBJECT.model))) + 2
    assert [(str(row.case), row.precision, row.failures) for row in rows if row.failures] == []


def with_another_decay_on_rank_1(subject, case, precision):
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            right = lightning.log_decays
            patch.setattr(lightning, "log_decays", lambda *args: [1.001 * decay for decay in right(*args)])
        return measure(subject, case, precision)


def with_shifted_positions_on_rank_1(subject, case, precision):
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            right = Layout.positions.func
            patch.setattr(Layout, "positions", property(lambda layout: right(layout) + 1))
        return measure(subject, case, precision)


def without_documents_starts_on_rank_1(subject, case, precision):
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(Layout, "starts", lambda layout, part: ())
        return measure(subject, case, precision)


def with_nan_on_rank_1(subject, case, precision):
    measured = measure(subject, case, precision)
    if dist.get_rank() == 1:
        next(iter(measured.logits.values()))[0, 0] = math.nan
    return measured


PACKINGS = [Case(2, "contiguous", False), Case(2, "zigzag", True)]
MORE_PACKINGS = [Case(2, "contiguous", True), Case(2, "zigzag", False)]
each_packing = pytest.mark.parametrize(
    "packings", [PACKINGS, pytest.param(MORE_PACKINGS, marks=pytest.mark.slow)], ids=["usual", "more"]
)


@each_packing
def test_a_wrong_decay_on_one_rank_is_found_everywhere(ranks, monkeypatch, packings):
    only(monkeypatch, *packings, Case(1, "contiguous", False, dp_shard=2))
    failures = fp64_failures(ranks, with_another_decay_on_rank_1)
    assert len(failures) == 3
    for case, names in failures.items():
        assert {"loss", "logits", INPUT_OF["L"], "embedding.weight"} <= set(names), case


@pytest.mark.parametrize(
    "chosen",
    [
        [Case(2, "contiguous", False), Case(4, "zigzag", True)],
        pytest.param([Case(2, "zigzag", False)], marks=pytest.mark.slow),
    ],
    ids=["usual", "more"],
)
def test_a_wrong_position_on_one_rank_is_found_where_documents_cross_ranks(ranks, monkeypatch, chosen):
    only(monkeypatch, *chosen)
    for case, names in fp64_failures(ranks, with_shifted_positions_on_rank_1).items():
        assert {"loss", "logits", INPUT_OF["S"], "embedding.weight"} <= set(names), case


@each_packing
def test_documents_that_one_rank_does_not_separate_are_found(ranks, monkeypatch, packings):
    only(monkeypatch, *packings)
    failures = fp64_failures(ranks, without_documents_starts_on_rank_1)
    assert len(failures) == 2
    for case, names in failures.items():
        assert ({"loss", "logits", INPUT_OF["L"]} <= set(names)) if "packed" in case else (names == []), case


def with_a_mean_over_ranks(subject, case, precision):
    """The loss of each data-parallel rank divided by its own labels, and the mean of those: a common mistake."""
    with pytest.MonkeyPatch.context() as patch:
        whole = engine.all_reduce
        if case.dp_shard * case.dp_replicate > 1:
            patch.setattr(engine, "all_reduce", lambda x: x * dist.get_world_size() if x.dim() == 0 else whole(x))
        return measure(subject, case, precision)


def test_a_mean_over_data_parallel_ranks_instead_of_over_labels_is_found(ranks, monkeypatch):
    only(monkeypatch, Case(1, "contiguous", False, dp_shard=2))
    ((_, names),) = fp64_failures(ranks, with_a_mean_over_ranks).items()
    assert {"loss", "embedding.weight"} <= set(names)


def with_another_replica(subject, case, precision):
    """The second replica's gradients are five times as large, after they were summed over replicas."""
    with pytest.MonkeyPatch.context() as patch:
        right = TorchEngine.gradients

        def wrong(self, batches):
            result = right(self, batches)
            if dist.get_rank() == 1:
                for parameter in self.model.parameters():
                    parameter.grad *= 5
            return result

        patch.setattr(TorchEngine, "gradients", wrong)
        return measure(subject, case, precision)


def without_clipping_on_rank_1(subject, case, precision):
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(torch_engine, "clip_grads_with_norm_", lambda *arguments: None)
        return measure(subject, case, precision)


def with_a_skipped_label_on_rank_1(subject, case, precision):
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            right = measuring.batch_of

            def wrong(*arguments):
                batch = right(*arguments)
                batch.labels[0, (batch.labels[0] != IGNORE).nonzero()[:1, 0]] = IGNORE
                return batch

            patch.setattr(measuring, "batch_of", wrong)
        return measure(subject, case, precision)


@pytest.mark.parametrize(
    ("fault", "case", "names"),
    [
        (with_another_replica, Case(1, "contiguous", False, dp_replicate=2), {"embedding.weight"}),
        (without_clipping_on_rank_1, Case(2, "zigzag", True), {"moment of embedding.weight"}),
        (with_a_skipped_label_on_rank_1, Case(2, "zigzag", True), {"loss", "embedding.weight"}),
    ],
)
def test_faults_of_one_replica_of_clipping_and_of_labels_are_found(ranks, monkeypatch, fault, case, names):
    only(monkeypatch, case)
    subject = replace(SUBJECT, train=TrainConfig(steps=1, clip=0.05))
    row = next(verify(subject, ranks, measure=fault))
    assert names <= set(row.failures)


def test_bounds_come_from_several_draws_and_differences_by_chance_stay_below():
    generator = torch.Generator().manual_seed(0)
    for numbers, freedom in ((1, 1), (64, 4), (4096, 4)):
        # Norms of as many independent errors as a tensor is assumed to have.
        errors = torch.randn(20000, 7, freedom, generator=generator, dtype=torch.float64).norm(dim=2) / freedom**0.5
        bounds = errors[:, :6].square().mean(dim=1).sqrt() * BEYOND_CHANCE[freedom]
        assert (errors[:, 6] <= bounds).all()
        draws = errors[0, :6].tolist()
        assert bound_of(numbers, draws) == pytest.approx(float(bounds[0]))
    assert bound_of(1, [1e-9] * 6) == 1e-5


def test_the_recipes_own_layout_is_run_where_there_are_enough_ranks(ranks, monkeypatch):
    only(monkeypatch)
    own = own_cases(ParallelConfig(cp=4, layout="balanced", attention="ring", states="tree"))
    assert [str(case) for case in own] == [
        "cp 4, balanced, attention by ring, states by tree, one document",
        "cp 4, balanced, attention by ring, states by tree, packed",
    ]
    assert own_cases(ParallelConfig()) == ()
    rows = list(islice(verify(replace(SUBJECT, own=own), ranks), 2))
    assert [(row.case, row.failures) for row in rows] == [(own[0], []), (own[1], [])]
    eight = own_cases(ParallelConfig(cp=8))
    assert eight[0] not in {row.case for row in islice(verify(replace(SUBJECT, own=eight), ranks), 2)}


def test_one_nan_is_out_of_bounds(ranks, monkeypatch):
    only(monkeypatch, Case(2, "zigzag", False))
    assert fp64_failures(ranks, with_nan_on_rank_1) == {"cp 2, zigzag, one document": ["logits"]}


def test_failures_are_the_names_beyond_their_bounds():
    differences = {"loss": 1e-6, "logits": math.nan, "a": 2e-5, "b": 1e-5, "c": math.nan}
    row = Row(Case(2, "zigzag", False), "fp32", differences, dict.fromkeys(differences, 1e-5))
    assert row.failures == ["logits", "a", "c"]
    assert row.nearest == "c"
    infinite = Row(row.case, "fp32", {"loss": math.inf}, {"loss": math.inf})
    assert infinite.failures == ["loss"]
    row = Row(row.case, "fp32", {"loss": 1.0, "logits": 1.0, "a": 2.0, "b": 1.0}, {"a": 1.0, "b": 0.1})
    assert row.nearest == "b"


def ladder(subject, case, precision):
    """One rank is 1e-4, 2e-4 and 3e-4 off in float32 by draw, and N ranks 1e-4 times a number for each N."""
    size = {"fp64": 0.0, "fp32": 1e-4 * {1: 1 + (subject.seed - SUBJECT.seed) / 1000, 2: 8.0, 4: 44.0}[case.ranks]}
    size = size[precision]
    ones = torch.ones(100, dtype=torch.float64)
    logits = {number: (1 + size) * torch.ones(subject.length // case.cp, 2).double() for number in range(2)}
    return RankResult(1 + size, logits, dist.get_rank(), {"w": (1 + size) * ones})


def test_lower_precisions_may_be_off_by_what_one_rank_shows_to_be_rounding(ranks, monkeypatch):
    only(monkeypatch, Case(2, "contiguous", False), Case(4, "contiguous", False))
    rows = [r for r in verify(SUBJECT, ranks, measure=ladder) if r.precision == "fp32" and r.case.ranks > 1]
    rms = 1e-4 * (14 / 3) ** 0.5
    assert [row.failures for row in rows] == [[], ["loss", "logits", "w"]]
    assert rows[0].bounds == pytest.approx({"loss": 20.05 * rms, "logits": 4.12 * rms, "w": 4.12 * rms})
    assert rows[0].differences == pytest.approx(dict.fromkeys(("loss", "logits", "w"), 8e-4))


def test_relative_is_the_norm_of_the_difference_by_that_of_the_reference():
    assert relative(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.0])) == 5
    assert relative(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 2.0])) == pytest.approx(2 / 13**0.5)
    assert relative(torch.zeros(2), torch.zeros(2)) == 0
    assert math.isnan(relative(torch.tensor([math.nan]), torch.ones(1)))


def test_a_gradient_that_is_rounding_around_zero_is_not_compared_with_itself(ranks, monkeypatch):
    only(monkeypatch, Case(2, "zigzag", True))
    one = MoeConfig(experts=4, active=1, hidden=6, balance=0.0)
    subject = Subject(with_experts(moe=one), TrainConfig(steps=1), VOCABULARY, 32, 1)
    rows = list(islice(run.verify(subject, ranks), 3))
    assert [row.failures for row in rows] == [[], [], []]
    assert all(0 < row.differences["blocks.1.ffn.router.weight"] < 1e-11 for row in rows)


def test_small_gradients_count_as_a_fraction_of_all_and_others_by_themselves():
    ones = torch.ones(100, dtype=torch.float64)
    sizes = {"loss": 1e-9, "a": 100.0, "b": 1e-2, "c": 1e-4, "moment of c": 1e-4}
    reference = {name: size * ones for name, size in sizes.items()}
    found = {name: 1.001 * x for name, x in reference.items()}
    want = {"loss": 1e-3, "a": 1e-3, "b": 1e-3, "c": 1e-3 * 1e-4 / (100 * 1e-5), "moment of c": 1e-3}
    assert differences(found, reference) == pytest.approx(want, rel=1e-6)


def test_shrink_keeps_the_kind_and_bounds_the_size():
    small = shrink(Subject(hybrid(depth=30, dim=768), SUBJECT.train, 50_000, 2**20, 9))
    assert (small.model.pattern, small.vocab_size, small.length, small.seed) == ("LS", 128, 256, 9)
    assert shrink(replace(SUBJECT, length=40)).length == 40
