"""Router statistics of a step, and routing fluctuation between evaluations."""

import math
from unittest.mock import patch

import pytest
import torch

from longctx.engines import router_stats as module
from longctx.engines.metrics import RouterMetrics
from longctx.engines.router_stats import NonFiniteLogitsError, RouterStats, RoutingFluctuation
from longctx.moe.report import RouterReport
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Axis


def report(counts, *, finite=True, dropped=0, entropy=2.0, choice=None):
    return RouterReport(
        loss=torch.ones((), requires_grad=True),
        counts=torch.tensor(counts),
        tokens=torch.tensor(4),
        entropy=torch.tensor(entropy),
        dropped=torch.tensor(dropped),
        finite=torch.tensor(finite),
        choice=torch.zeros(1, 4, dtype=torch.int64) if choice is None else choice,
    )


def summed():
    rank = torch.distributed.get_rank()
    routing = RouterStats()
    routing.add({"a": report([1, 0, 3]), "b": report([2, 2], dropped=rank)})
    routing.add({"a": report([1, 0, 3]), "b": report([2, 2], finite=rank == 0)})
    routing.sum_over_ranks(torch.device("cpu"))
    try:
        routing.check_finite()
    except NonFiniteLogitsError as error:
        return {name: routed.metrics for name, routed in routing.layers.items()}, str(error)
    raise AssertionError("nothing was said")


def test_sums_are_of_all_batches_and_ranks_and_the_first_broken_layer_is_named_on_all(ranks):
    want = {
        "a": RouterMetrics(imbalance=12 * 3 / 16, entropy=0.5, dropped=0.0),
        "b": RouterMetrics(imbalance=1.0, entropy=0.5, dropped=1 / 16),
    }
    for metrics, message in ranks.run(summed, size=2):
        assert metrics == want
        assert message == "b: the router's logits are not all finite numbers"


def on_stages():
    """Two stages of a pipeline, each on two ranks that hold the step's tokens."""
    rank = torch.distributed.get_rank()
    rows = [torch.distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    columns = [torch.distributed.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    tokens, stages = rows[rank // 2], Axis.from_group(columns[rank % 2])
    routing, fluctuation = RouterStats(), RoutingFluctuation()
    said = {"early": report([1, 0, 3])} if rank < 2 else {"late": report([2, 2]), "last": report([4, 0])}
    routing.add(said)
    routing.sum_over_ranks(torch.device("cpu"), tokens, stages)
    for _ in range(2):
        fluctuation.add(0, Layout((0, 8), "contiguous", 2, rank % 2), said)
    changed = fluctuation.rates(list(said), torch.device("cpu"), tokens, stages)
    return {name: routed.counts.tolist() for name, routed in routing.layers.items()}, changed


def test_stages_of_a_pipeline_say_all_layers(ranks):
    for counts, changed in ranks.run(on_stages, size=4):
        assert counts == {"early": [2.0, 0.0, 6.0], "late": [4.0, 4.0], "last": [8.0, 0.0]}
        assert list(counts) == ["early", "late", "last"]
        assert changed == {"early": 0.0, "late": 0.0, "last": 0.0}


def test_a_step_without_choices_has_no_load():
    routing = RouterStats()
    routing.add({"a": report([0, 0])})
    assert math.isnan(routing.layers["a"].metrics.imbalance)
    routing.check_finite()


def test_a_model_without_routers_communicates_nothing():
    routing = RouterStats()
    routing.sum_over_ranks(torch.device("cpu"))
    assert routing.layers == {}
    assert RoutingFluctuation().rates([], torch.device("cpu")) == {}


def changed(sample):
    fluctuation, layout = RoutingFluctuation(), Layout((0, 7), "contiguous", 2, 1)
    choice = torch.tensor([[5, 6, 7, 0]])
    answers = []
    with patch.object(module, "SAMPLE", sample):
        for now in (choice, choice, choice + torch.tensor([[0, 1, 0, 9]])):
            fluctuation.add(0, layout, {"a": report([1], choice=now)})
            answers.append(fluctuation.rates(["a"], torch.device("cpu")))
    return answers


@pytest.mark.parametrize(("sample", "share"), [(16384, 1 / 3), (2, 0.0), (1, 0.0)])
def test_only_real_tokens_are_compared_and_of_long_sequences_some(ranks, sample, share):
    (answers,) = ranks.run(changed, sample, size=1)
    assert answers == [{}, {"a": 0.0}, {"a": pytest.approx(share)}]
