"""Checkpoints of the engine `deepspeed` are the torch engine's: a run changes engine and ranks and goes on."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("deepspeed", reason="needs the extra: pip install -e '.[deepspeed]'")


from longctx.checkpoint.restricted import METADATA
from longctx.checkpoint.retention import RetentionPolicy
from longctx.checkpoint.save import Checkpointer
from longctx.checkpoint.storage import Reader
from longctx.checkpoint.trainer_state import TrainerState
from longctx.checkpoint.weights import find_weights, stored_config
from longctx.errors import UserError
from tests.adapters.deepspeed.training import RATES, Run, batches_of, deepspeed_engine, torch_engine
from tests.checkpoint.payloads import spoil
from tests.model.cases import VOCABULARY, model_of

ENGINES = {"torch": torch_engine, "deepspeed": deepspeed_engine}
STEPS = 3


def leg(name, run, source, target, first, steps):
    """Some steps of a training: its losses from the step `first` on, from and to a folder of checkpoints."""
    with ENGINES[name](run) as engine:
        if source is not None:
            engine.load(source)
        results = [engine.step(batches_of(run, engine.mesh, n), RATES[n % 3]) for n in range(first, first + steps)]
        if target is not None:
            checkpointer = Checkpointer(target, RetentionPolicy(1), timeout=60)
            state = TrainerState(first + steps, 0, 0, "", stored_config(model_of(run.experts), VOCABULARY))
            engine.save(checkpointer, state)
            checkpointer.close()
        return [(r.loss, r.grad_norm) for r in results]


def newest(folder):
    return folder / sorted(path.name for path in folder.iterdir())[-1]


def relay(ranks, folder, legs):
    """Losses and norms of a training whose engine and ranks change every `STEPS` steps."""
    source, steps = None, []
    for number, (name, run) in enumerate(legs):
        target = folder / str(number)
        steps += ranks.run(leg, name, run, source, target, STEPS * number, STEPS, size=run.ranks)[0]
        source = newest(target)
    return steps


def shared(sequences, **fields):
    """A run with so many sequences in a step, however many ranks share them."""
    run = Run(**fields)
    return replace(run, accumulation=sequences // run.dp)


ONE = shared(2, experts="token")
TWO, FOUR = replace(ONE, dp=2, accumulation=1), replace(ONE, dp=2, cp=2, accumulation=1)
RELAYS = {
    "zero 0": [
        ("deepspeed", replace(TWO, stage=0)),
        ("torch", replace(ONE, cp=2)),
        ("deepspeed", replace(ONE, stage=0)),
    ],
    "zero 1": [("torch", TWO), ("deepspeed", replace(FOUR, stage=1)), ("torch", TWO)],
    "zero 2": [("torch", TWO), ("deepspeed", replace(FOUR, stage=2)), ("torch", ONE)],
    "zero 3": [("torch", TWO), ("deepspeed", replace(FOUR, stage=3)), ("torch", TWO)],
    "zero 3, then 1": [("deepspeed", replace(TWO, stage=3)), ("deepspeed", replace(FOUR, stage=1)), ("torch", FOUR)],
    "zero 2, optimizer offloaded": [
        ("torch", TWO),
        ("deepspeed", replace(ONE, cp=2, stage=2, offload="optimizer")),
        ("deepspeed", replace(ONE, stage=1, offload="optimizer")),
    ],
    "zero 3, parameters offloaded": [
        ("torch", TWO),
        ("deepspeed", replace(ONE, cp=2, stage=3, offload="parameters")),
        ("deepspeed", replace(TWO, stage=2)),
    ],
}


@pytest.mark.parametrize("legs", [pytest.param(legs, id=name) for name, legs in RELAYS.items()])
def test_a_run_changes_engine_and_ranks(ranks, tmp_path, legs):
    got = relay(ranks, tmp_path, legs)
    want = ranks.run(leg, "torch", ONE, None, None, 0, 3 * STEPS, size=1)[0]
    for (loss, norm), (wanted_loss, wanted_norm) in zip(got, want, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=2e-5)
        assert norm == pytest.approx(wanted_norm, rel=5e-3)
    assert got[0] == pytest.approx(want[0], rel=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_masters_are_kept_whole(ranks, tmp_path, stage):
    """Three steps, saved, and three more are six: exactly, since rounding to bf16 would be seen."""
    run = Run(stage=stage, dp=2, precision="bf16")
    whole = ranks.run(leg, "deepspeed", run, None, None, 0, 6, size=2)[0]
    first = ranks.run(leg, "deepspeed", run, None, tmp_path, 0, 3, size=2)[0]
    then = ranks.run(leg, "deepspeed", run, newest(tmp_path), None, 3, 3, size=2)[0]
    assert first + then == whole


def names_and_shapes(path):
    entries = Reader(path).read_metadata().state_dict_metadata
    return {name: (type(entry).__name__, getattr(entry, "size", None)) for name, entry in entries.items()}


def test_a_checkpoint_has_the_torch_engines_tensors_in_rows_on_all_ranks(ranks, tmp_path):
    ranks.run(leg, "torch", TWO, None, tmp_path / "torch", 0, 1, size=2)
    want = names_and_shapes(newest(tmp_path / "torch"))
    for stage in range(4):
        folder = tmp_path / str(stage)
        ranks.run(leg, "deepspeed", replace(TWO, stage=stage), None, folder, 0, 1, size=2)
        assert names_and_shapes(newest(folder)) == want
        metadata = Reader(newest(folder)).read_metadata().state_dict_metadata
        assert len(metadata["model.embedding.weight"].chunks) == 2
        assert len(metadata["optimizer.state.embedding.weight.exp_avg"].chunks) == 2


def losses_from_weights(run, path):
    with deepspeed_engine(run) as engine:
        engine.load_weights(find_weights(path, "with train.init=DIR"))
        assert engine._state.steps == 0
        return [engine.losses(batch).nll for batch in batches_of(run, engine.mesh, 0)]


@pytest.mark.parametrize("stage", range(4))
def test_a_run_starts_from_weights(ranks, tmp_path, stage):
    ranks.run(leg, "torch", TWO, None, tmp_path, 0, 2, size=2)
    run = replace(TWO, stage=stage)
    want = ranks.run(losses_after, TWO, newest(tmp_path), size=2)
    got = ranks.run(losses_from_weights, run, newest(tmp_path), size=2)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def losses_after(run, path):
    with torch_engine(run) as engine:
        engine.load(path)
        return [engine.losses(batch).nll for batch in batches_of(run, engine.mesh, 0)]


def damaged(run, path):
    with deepspeed_engine(run) as engine, pytest.raises(UserError, match="cannot be read") as caught:
        engine.load(path)
    return str(caught.value)


def test_a_checkpoint_of_another_model_is_an_error_on_every_rank(ranks, tmp_path):
    ranks.run(leg, "torch", replace(TWO, experts=None), None, tmp_path, 0, 1, size=2)
    assert len(ranks.run(damaged, TWO, newest(tmp_path), size=2)) == 2


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("where", [METADATA, "model", "optimizer.state"])
def test_a_payload_does_not_run(ranks, tmp_path, stage, where):
    ranks.run(leg, "deepspeed", TWO, None, tmp_path / "saved", 0, 1, size=2)
    path, mark = newest(tmp_path / "saved"), tmp_path / "mark"
    spoil(path, mark, where)
    for said in ranks.run(damaged, replace(TWO, stage=stage), path, size=2):
        assert "io.open" in said
    assert not mark.exists()
