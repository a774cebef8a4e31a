"""Loss spikes: which steps are spikes, and what a run does at one, also after it was resumed."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from longctx.checkpoint.spike_state import SpikeState
from longctx.engines.base import StepResult
from longctx.engines.metrics import SpikeMetrics
from longctx.engines.reproducible import ReproducibleEngine
from longctx.engines.router_stats import RouterStats
from longctx.engines.torch_engine import TorchEngine
from longctx.recipe.tables import SpikeConfig
from longctx.train.spikes import LEAST_LOSS, LEAST_NORM, SpikeWatch, find_sound, message, stop_text, usual
from tests.train.runs import checkpoints, interrupted_copy, losses, metrics, mistake, tensors, train, write_workplace

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # checkpoints read by one process

NOISE = (2.0, 2.1, 1.9, 2.05, 1.95, 2.0, 2.15, 1.85)
"""Losses whose median absolute deviation is 0.075."""


def watch(policy="report", deviations=10.0, **options) -> SpikeWatch:
    config = SpikeConfig(policy=policy, window=8, deviations=deviations, **options)
    return SpikeWatch(config, SpikeState(), torch.device("cpu"))


def result(loss: float, norm: float = 1.0, *, skipped: bool = False) -> StepResult:
    return StepResult(loss, norm, RouterStats(), skipped)


def watched(*found: StepResult, **options) -> tuple[SpikeWatch, list[SpikeMetrics | None]]:
    """A watch, and what it says of each result of `found`, the first being step 1."""
    one = watch(**options)
    return one, [one.observe(step, each) for step, each in enumerate(found, start=1)]


# Which steps are spikes


def test_the_limit_is_so_many_robust_deviations_above_the_median():
    assert usual(NOISE, 10.0, LEAST_LOSS).value == 2.0
    assert usual(NOISE, 10.0, LEAST_LOSS).limit == pytest.approx(2.0 + 10 * 1.4826 * 0.075)


def test_earlier_spikes_hardly_move_the_limit():
    """Three of eight; by a mean and a standard deviation even ten deviations would be beyond 1000."""
    assert usual((*NOISE[:5], 400.0, 400.0, 400.0), 10.0, LEAST_LOSS).limit < 5


def test_a_loss_that_hardly_varies_has_a_least_deviation():
    assert usual([2.0] * 8, 10.0, LEAST_LOSS).limit == 2.0 + 10 * LEAST_LOSS
    _, found = watched(*map(result, (*[2.0] * 8, 2.0 + 9.9 * LEAST_LOSS)))
    assert found[-1] is None


@pytest.mark.parametrize(
    ("loss", "norm", "spike"),
    [(3.1, 1.0, False), (3.12, 1.0, True), (0.0, 0.0, False), (2.0, math.e * 0.99, False), (2.0, math.e * 1.01, True)],
)
def test_a_jump_up_of_the_loss_or_of_the_norm_is_a_spike(loss, norm, spike):
    """Of a norm that does not vary, by ten deviations of `LEAST_NORM`: a factor of e."""
    assert LEAST_NORM == 0.1
    _, found = watched(*map(result, NOISE), result(loss, norm))
    assert [each is not None for each in found] == [False] * 8 + [spike]


def test_no_step_is_a_spike_before_the_window_is_full():
    _, found = watched(*map(result, NOISE[:7]), result(400.0, 1e6))
    assert found == [None] * 8


def test_steps_without_labels_or_gradients_are_nothing_special():
    _, found = watched(*[result(0.0, 0.0)] * 10)
    assert found == [None] * 10


def test_a_limit_beyond_all_numbers_is_infinite():
    """Of a norm that is 0 in every other step."""
    _, (*_, found) = watched(*[result(2.0, norm) for norm in (0.0, 1.0)] * 4, result(9.0))
    assert found.grad_norm_limit == math.inf


def test_what_is_said_of_a_spike():
    _, (*_, found) = watched(*map(result, NOISE), result(4.0, 9.0))
    assert found == SpikeMetrics(
        step=9,
        loss=4.0,
        usual_loss=2.0,
        loss_limit=usual(NOISE, 10.0, LEAST_LOSS).limit,
        grad_norm=9.0,
        usual_grad_norm=1.0,
        grad_norm_limit=math.exp(10 * LEAST_NORM),
        in_a_row=1,
        action="reported",
    )
    assert message(found) == (
        "Spike at step 9: loss 4 (usual 2, limit 3.112), grad norm 9 (usual 1, limit 2.72). Its update is applied "
        "(spikes.policy = 'report')."
    )


def test_a_level_that_stays_becomes_the_usual_one_and_is_reported_once():
    one, found = watched(*map(result, NOISE), *[result(9.0)] * 8)
    spikes = [each for each in found if each is not None]
    assert [each.step for each in spikes] == [9, 10, 11, 12]
    assert [message(each) is not None for each in spikes] == [True, False, False, False]
    assert one.state == SpikeState((9.0,) * 8, (1.0,) * 8)


def test_a_skipped_step_stays_out_of_the_window_and_is_counted():
    one, found = watched(*map(result, NOISE), result(9.0, skipped=True), result(2.0), policy="skip")
    assert found[8].action == "skipped"
    assert message(found[8]).endswith("Its update is skipped (spikes.policy = 'skip').")
    assert one.state == SpikeState((*NOISE[1:], 2.0), (1.0,) * 8, in_a_row=0, skipped=1)


def test_a_shorter_window_takes_the_latest_steps_of_a_longer_one():
    losses = (100.0,) * 8 + NOISE
    config = SpikeConfig(window=8)
    one = SpikeWatch(config, SpikeState(losses, (1.0,) * 16), torch.device("cpu"))
    assert one.observe(17, result(4.0)).usual_loss == 2.0
    assert one.state.losses == (*NOISE[1:], 4.0)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_ranks_agree_where_one_alone_finds_a_spike(ranks, policy, rank):
    assert ranks.run(on_one_rank, policy, rank, size=2) == [(True, True, SpikeState(NOISE, (1.0,) * 8))] * 2


def on_one_rank(policy: str, rank: int) -> tuple[bool, bool, SpikeState]:
    """Whether there is a spike that only `rank` sees, and none that none sees, and the state before."""
    one, _ = watched(*map(result, NOISE), policy=policy)
    state = one.state

    def decide(loss: float) -> bool:
        return one._skip(loss, 1.0) if policy == "skip" else one.observe(9, result(loss)) is not None

    usual_step = not decide(2.0)
    one.state = state
    return usual_step, decide(9.0 if dist.get_rank() == rank else 2.0), state


# The checkpoint to resume from


@pytest.mark.parametrize(
    ("spike", "steps", "sound"),
    [
        (11, (8, 9), 9),
        (11, (8, 9, 10), 9),  # the loss of step 11 is that of the parameters after step 10
        (11, (10,), 10),
        (11, (10, 11, 12), 10),
        (11, (11, 12), None),
        (11, (), None),
    ],
)
def test_the_checkpoint_to_resume_from_is_one_whose_parameters_had_a_usual_loss(spike, steps, sound):
    paths = [Path(f"step-{step:08d}") for step in steps]
    assert find_sound(paths, spike) == (None if sound is None else Path(f"step-{sound:08d}"))


def test_without_a_checkpoint_another_start_is_advised():
    _, (*_, found) = watched(*map(result, NOISE), result(9.0))
    assert "There is no earlier checkpoint: start again in another directory (--out), and with a lower" in stop_text(
        found, []
    )


# Runs

OVERRIDES = ("spikes.window=8", "train.steps=14", "checkpoint.keep=14", "schedule.kind=constant")
ONE_RANK = ("parallel.cp=1",)
"""Where ranks would repeat each other."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return write_workplace(tmp_path_factory.mktemp("workplace"))


@contextmanager
def bad_sequences(*numbers: int) -> Iterator[None]:
    """Sequences that raise the loss of their step by 100 nats, and its gradients a thousandfold."""
    with (
        patch.object(TorchEngine, "gradients", raised(TorchEngine.gradients, numbers)),
        patch.object(ReproducibleEngine, "gradients", raised(ReproducibleEngine.gradients, numbers)),
    ):
        yield


def raised(gradients, numbers):
    def changed(self, batches):
        loss, stats = gradients(self, batches)
        if any(batch.layout.sequence in numbers for batch in batches):
            for parameter in self.model.parameters():
                parameter.grad *= 1000
            return loss + 100, stats
        return loss, stats

    return changed


BAD_STEP_11 = partial(bad_sequences, 20)
"""Step 11 reads sequences 20 and 21."""
SKIPPING = (*OVERRIDES, "spikes.policy=skip", "checkpoint.every=1", "evaluation.every=5")
BAD_FROM_STEP_11 = partial(bad_sequences, *range(20, 30))


@pytest.fixture(scope="module")
def skipping(ranks, workplace) -> Path:
    """A run that skips step 11, with a checkpoint after each step, and evaluations at steps 5, 10 and 14."""
    out = workplace / "skipping"
    assert ranks.run(train, workplace, out, SKIPPING, "auto", BAD_STEP_11, size=2) == [0, 0]
    return out


def stored(out: Path, step: int) -> dict:
    return trainer_state(out, step)["spikes"]


def trainer_state(out: Path, step: int) -> dict:
    return json.loads((out / "checkpoints" / f"step-{step:08d}" / "trainer.json").read_text())["state"]


def test_a_skipped_step_is_recorded_and_changes_nothing(skipping):
    found = metrics(skipping)
    assert [(each.step, each.action) for each in found.spikes] == [(11, "skipped")]
    assert found.spikes[0].loss == losses(skipping)[10] > 100
    assert [step.step for step in found.steps] == list(range(1, 15))
    before, after = (tensors(skipping / "checkpoints" / f"step-{step:08d}") for step in (10, 11))
    assert before.keys() == after.keys()
    assert all(torch.equal(x, before[name]) for name, x in after.items())
    assert [stored(skipping, step)["skipped"] for step in (10, 11, 14)] == [0, 1, 1]
    assert [stored(skipping, step)["in_a_row"] for step in (10, 11, 12)] == [0, 1, 0]
    assert stored(skipping, 14)["losses"] == [loss for n, loss in enumerate(losses(skipping), 1) if n > 5 and n != 11]


def test_the_parameters_after_a_skipped_step_have_the_held_out_loss_of_those_before(skipping):
    heldout = {each.step: {"loss": each.loss, "sequences": 8, "stage": None} for each in metrics(skipping).evaluations}
    assert list(heldout) == [5, 10, 14]
    assert trainer_state(skipping, 11)["heldout_loss"] == heldout[10]
    for step in (1, 5, 10, 12, 14):
        assert trainer_state(skipping, step)["heldout_loss"] == heldout.get(step)


@pytest.mark.parametrize("step", [9, 11])
def test_a_resumed_run_skips_the_same_steps_bit_for_bit(ranks, skipping, workplace, tmp_path, step):
    """Resumed before the spike, which without the window in the checkpoint would be none, and right after it."""
    out = interrupted_copy(skipping, tmp_path / "out", step)
    ranks.run(train, workplace, out, SKIPPING, "auto", BAD_STEP_11, size=2)
    assert metrics(out).spikes == metrics(skipping).spikes
    assert losses(out) == losses(skipping)
    assert stored(out, 14) == stored(skipping, 14)
    there = tensors(skipping / "checkpoints" / "step-00000014")
    assert all(torch.equal(x, there[name]) for name, x in tensors(out / "checkpoints" / "step-00000014").items())


def test_a_reproducible_run_skips_the_same_steps_on_any_number_of_processes(ranks, workplace, tmp_path):
    overrides = (*OVERRIDES, "spikes.policy=skip", "parallel.reproducible=2", "train.steps=12", "train.clip=none")
    for cp in (1, 2):
        ranks.run(train, workplace, tmp_path / f"{cp}", (*overrides, f"parallel.cp={cp}"), "auto", BAD_STEP_11, size=cp)
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    assert [each.step for each in one.spikes] == [11]
    assert two.spikes == one.spikes
    assert losses(tmp_path / "2") == losses(tmp_path / "1")


def test_a_spike_is_reported_and_applied_by_default(ranks, workplace, tmp_path):
    overrides = (*OVERRIDES, *ONE_RANK, "logging.every=5", "train.steps=12")
    ranks.run(train, workplace, tmp_path / "out", overrides, "auto", BAD_STEP_11, size=1)
    found = metrics(tmp_path / "out")
    assert (found.spikes[0].step, found.spikes[0].action) == (11, "reported")
    assert [step.step for step in found.steps] == [5, 10, 12]
    before, after = (tensors(tmp_path / "out" / "checkpoints" / f"step-{step:08d}") for step in (10, 12))
    assert not any(torch.equal(x, before[name]) for name, x in after.items() if name.startswith("model.embedding"))


def test_a_run_that_goes_on_spiking_stops_and_leaves_the_checkpoints_from_before(ranks, workplace, tmp_path):
    out = tmp_path / "out"
    overrides = [*OVERRIDES, "spikes.policy=skip", "spikes.max_skips=3", "checkpoint.every=1", "checkpoint.keep=2"]
    messages = ranks.run(mistake, workplace, out, overrides, "auto", BAD_FROM_STEP_11, size=2)
    assert messages == [messages[0]] * 2
    assert messages[0].startswith("step 13: loss 10")
    assert (
        ", the last of 3 spikes in a row. Training stopped without saving this step. Resume with --resume "
        in (messages[0])
    )
    assert f"--resume {out}/checkpoints/step-00000009, and with a lower optimizer.lr" in messages[0]
    assert checkpoints(out) == [f"step-{step:08d}" for step in (9, 10, 11, 12)]
    assert [(each.step, each.action) for each in metrics(out).spikes] == [
        (11, "skipped"),
        (12, "skipped"),
        (13, "stopped"),
    ]


def test_a_run_that_diverges_stops_before_it_saves(ranks, workplace, tmp_path):
    """A learning rate of 10 from step 11 on: with `checkpoint.keep = 2` the next checkpoints would displace the good
    ones."""
    out = tmp_path / "out"
    overrides = [*OVERRIDES, "spikes.policy=stop", "checkpoint.keep=2", "train.steps=10"]
    assert ranks.run(train, workplace, out, overrides, size=2) == [0, 0]
    overrides = [*overrides, "train.steps=40", "optimizer.lr=10", "train.clip=none"]
    messages = ranks.run(mistake, workplace, out, overrides, size=2)
    (spike,) = metrics(out).spikes
    assert spike.action == "stopped"
    assert spike.loss > 50
    assert messages == [messages[0]] * 2
    assert messages[0].startswith(f"step {spike.step}: loss {spike.loss:.4g} (usual {spike.usual_loss:.4g}, limit ")
    assert f"Resume with --resume {out}/checkpoints/step-00000010" in messages[0]
    assert checkpoints(out)[-2:] == ["step-00000008", "step-00000010"]


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_a_norm_that_is_not_finite_still_ends_the_run(ranks, workplace, tmp_path, policy):
    overrides = [*OVERRIDES, f"spikes.policy={policy}"]
    for text in ranks.run(mistake, workplace, tmp_path / "out", overrides, "auto", infinite_norm, size=2):
        assert re.match(r"step 1: the loss is \d\.\d+ and the grad norm inf\. Training stopped without saving", text)


@contextmanager
def infinite_norm() -> Iterator[None]:
    with patch.object(TorchEngine, "_norm", lambda self, gradients: torch.tensor(math.inf, dtype=torch.float64)):
        yield


def test_without_spikes_all_policies_train_the_same(ranks, workplace, tmp_path):
    for policy in ("report", "skip", "stop"):
        overrides = (*OVERRIDES, *ONE_RANK, f"spikes.policy={policy}", "train.steps=10", "checkpoint.every=10")
        ranks.run(train, workplace, tmp_path / policy, overrides, "auto", nullcontext, size=1)
    expected = tensors(tmp_path / "report" / "checkpoints" / "step-00000010")
    for policy in ("skip", "stop"):
        found = tensors(tmp_path / policy / "checkpoints" / "step-00000010")
        assert all(torch.equal(x, expected[name]) for name, x in found.items())
