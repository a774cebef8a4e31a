"""Weights to begin with: where they may lie, what is told of damaged ones, and a run that begins with them."""

import multiprocessing
import os
import shutil
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longctx.checkpoint.checksums import seal, unseal
from longctx.checkpoint.lazy_tensors import LazyTensor
from longctx.checkpoint.weights import find_weights, write_weights
from longctx.data.staging import staging
from longctx.errors import UserError
from tests.combinations import mostly_slow
from tests.convert.cases import save
from tests.model.cases import VOCABULARY, hybrid
from tests.train.runs import checkpoints, losses, metrics, mistake, tensors, train, write_workplace

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # checkpoints read by one process

HOW = "with train.init=DIR"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return write_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="module")
def trained(ranks, workplace) -> Path:
    """10 steps on 2 ranks, with checkpoints of steps 5 and 10."""
    ranks.run(train, workplace, workplace / "trained", ["train.steps=4"], size=2)
    return workplace / "trained"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("written") / "weights")


@pytest.fixture
def copy(written, tmp_path) -> Path:
    """To be damaged."""
    return shutil.copytree(written, tmp_path / "weights")


# Where they may lie


def test_of_a_run_the_newest_checkpoint_is_taken(trained):
    assert find_weights(trained, HOW).path == trained / "checkpoints/step-00000004"
    earlier = trained / "checkpoints/step-00000002"
    assert (find_weights(earlier, HOW).path, find_weights(earlier, HOW).step) == (earlier, 2)


def test_a_tensor_is_read_alone(trained):
    weights = find_weights(trained, HOW)
    there = tensors(weights.path)
    assert {f"model.{name}" for name in weights.shapes} == {name for name in there if name.startswith("model.")}
    for name, shape in weights.shapes.items():
        assert weights.read(name).shape == shape
        assert torch.equal(weights.read(name), there[f"model.{name}"])


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (3, 7), (0, None)], ids=["one", "across ranks", "all"])
def test_rows_of_a_tensor_that_ranks_have_written_are_read_alone(trained, begin, end):
    weights = find_weights(trained, HOW)
    for name, shape in weights.shapes.items():
        if len(shape) > 1:
            assert torch.equal(weights.read_rows(name, begin, end or shape[0]), weights.read(name)[begin:end]), name


def test_what_is_written_in_pieces_is_read_whole(tmp_path):
    whole = torch.arange(7 * 3 * 2.0).view(7, 3, 2)
    asked = []

    def make(begin, end):
        asked.append((begin, end))
        return whole[begin:end].clone()

    write_weights(tmp_path, {"w": LazyTensor(whole.shape, make, rows=3)}, {"vocab_size": 5}, {})
    assert asked == [(0, 3), (3, 6), (6, 7)]
    assert torch.equal(find_weights(tmp_path, HOW).read("w"), whole)
    assert torch.equal(find_weights(tmp_path, HOW).read_rows("w", 2, 7), whole[2:7])


def test_another_model_is_reported_by_every_difference(written):
    weights = find_weights(written, HOW)
    weights.check(hybrid(), VOCABULARY)
    with pytest.raises(UserError, match=r"of another model: dim: 12, expected 18; vocab_size: 29, expected 64\."):
        weights.check(hybrid(dim=18), 64)


def test_tensors_that_are_not_the_configurations_are_reported(copy):
    said = unseal((copy / "weights.json").read_text())
    said["model"]["tie_embeddings"] = False
    (copy / "weights.json").write_text(seal(said))
    with pytest.raises(
        UserError, match=r"of another model: head\.weight: none, expected \[29, 12\]\. Use other weights"
    ):
        find_weights(copy, HOW).check(hybrid(tie_embeddings=False), VOCABULARY)


# Damage: told before anything is built


@pytest.mark.parametrize("damage", ["cut", "missing"])
@pytest.mark.parametrize("name", ["__0_0.distcp", "__0_7.distcp", ".metadata", "weights.json"])
def test_a_file_that_is_missing_or_cut_short(copy, name, damage):
    file = copy / name
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 10)
    else:
        file.unlink()
    with pytest.raises(UserError) as caught:
        find_weights(copy, HOW)
    assert str(copy) in str(caught.value)
    assert (name in str(caught.value)) or (name, damage) == ("weights.json", "missing")


def test_bytes_that_changed(copy):
    size = (copy / ".metadata").stat().st_size
    (copy / ".metadata").write_bytes(b"\0" * size)
    with pytest.raises(UserError, match=r"weights cannot be read: \.metadata: "):
        find_weights(copy, HOW).check(hybrid(), VOCABULARY)


def test_a_damaged_checkpoint_names_the_others(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    os.truncate(run / "checkpoints/step-00000004/__1_0.distcp", 100)
    with pytest.raises(UserError, match=r"Use another checkpoint with train\.init=DIR \(available: .*step-00000002\)"):
        find_weights(run, HOW)


def test_what_holds_no_weights_is_reported_with_what_does(workplace):
    with pytest.raises(UserError, match=r"nowhere: no such directory\. Use weights with train\.init=DIR: a "):
        find_weights(workplace / "nowhere", HOW)
    with pytest.raises(UserError, match=r"corpus has no weights\. Use weights with train\.init=DIR: a checkpoint, "):
        find_weights(workplace / "corpus", HOW)


def write_and_be_killed(out):
    """Write half of a tensor, and die of SIGKILL."""

    def make(begin, end):
        if begin:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(end - begin, 3)

    with staging(out) as folder:
        write_weights(folder, {"w": LazyTensor(torch.Size([4, 3]), make, rows=2)}, {"vocab_size": 5}, {})


def test_a_writer_that_is_killed_leaves_nothing_that_is_taken_for_weights(tmp_path):
    out = tmp_path / "out"
    writer = multiprocessing.get_context("forkserver").Process(target=write_and_be_killed, args=(out,))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert not out.exists()
    (left,) = tmp_path.glob("out.partial-*")
    assert list(left.glob("*.distcp"))
    with pytest.raises(UserError, match="is incomplete: its writer was stopped"):
        find_weights(left, HOW)
    save(tmp_path / "other")
    (tmp_path / "other").rename(tmp_path / "step-00000003.partial")
    with pytest.raises(UserError, match="is incomplete: its writer was stopped"):
        find_weights(tmp_path / "step-00000003.partial", HOW)


# A run that begins with them


RANKS = {
    "1 rank": (1, ["parallel.cp=1"]),
    "2 ranks": (2, []),
    "4 ranks, replicated": (4, ["parallel.cp=2", "parallel.dp_replicate=2"]),
}


@pytest.fixture(scope="module")
def started(ranks, workplace, trained):
    """`started(how)`: the run of 4 steps, with a checkpoint of each, that begins with the weights on these ranks."""

    @cache
    def run(how):
        size, overrides = RANKS[how]
        options = [f"train.init={trained}", "train.steps=4", "checkpoint.every=1", *overrides]
        ranks.run(train, workplace, workplace / f"begun on {how}", options, size=size)
        return workplace / f"begun on {how}"

    return run


@pytest.mark.parametrize("how", mostly_slow(RANKS, "1 rank", "4 ranks, replicated"))
def test_a_run_starts_from_weights_and_nothing_else(started, trained, how):
    """Step, data, schedule and optimizer are a new run's: what two updates give shows the last."""
    run = started(how)
    found = metrics(run).steps
    assert [step.step for step in found] == [1, 2, 3, 4]
    assert found[0].tokens == 2 * 64
    assert found[0].lr == pytest.approx(3e-3 / 2)
    assert losses(run)[0] < losses(trained)[0] - 0.3
    # AdamW's first update is of the size of the learning rate, whatever the gradient's: its means begin at 0.
    before = tensors(trained / "checkpoints/step-00000004")["model.blocks.0.ffn.down.weight"]
    after = tensors(run / "checkpoints/step-00000001")["model.blocks.0.ffn.down.weight"]
    assert (after - before * (1 - 0.1 * 1.5e-3)).abs().median().item() == pytest.approx(1.5e-3, rel=1e-2)


@pytest.mark.parametrize("how", mostly_slow(["2 ranks", "4 ranks, replicated"], "4 ranks, replicated"))
def test_ranks_change_nothing(started, how):
    assert losses(started("1 rank")) == pytest.approx(losses(started(how)), rel=1e-5)


def test_the_recipe_keeps_it_and_a_run_that_resumes_does_not_look_at_it(ranks, trained, workplace, tmp_path):
    init = shutil.copytree(trained, tmp_path / "init")
    ranks.run(train, workplace, tmp_path / "whole", [f"train.init={init}", "train.steps=4"], size=2)
    assert f'init = "{init}"' in (tmp_path / "whole/recipe.toml").read_text()
    out = shutil.copytree(tmp_path / "whole", tmp_path / "out")
    shutil.rmtree(out / "checkpoints/step-00000004")
    shutil.rmtree(init)
    ranks.run(train, workplace, out, [f"train.init={init}", "train.steps=4"], size=2)
    assert checkpoints(out) == ["step-00000002", "step-00000004"]
    assert losses(out) == losses(tmp_path / "whole")


# Mistakes: on every rank, in the same words, before anything is written


def refused(ranks, workplace, out, *arguments) -> str:
    messages = ranks.run(mistake, workplace, out, *arguments, size=2)
    assert messages[0] == messages[1]
    assert not out.exists()
    return messages[0]


def test_mistakes_are_reported_on_every_rank(ranks, trained, workplace, tmp_path):
    out = tmp_path / "out"
    assert "/nowhere: no such directory" in refused(ranks, workplace, out, ["train.init=/nowhere"])
    told = refused(ranks, workplace, out, [f"train.init={trained}", "model.dim=32"])
    assert "step-00000004 has the weights of another model: dim: 16, expected 32" in told
    cut = shutil.copytree(trained / "checkpoints/step-00000004", tmp_path / "cut")
    os.truncate(cut / "__0_0.distcp", 100)
    told = refused(ranks, workplace, out, [f"train.init={cut}"])
    assert f"checkpoint {cut} is damaged: __0_0.distcp has 100 bytes" in told


def test_what_is_not_there_on_one_machine_is_reported_on_every_rank(ranks, workplace, trained, tmp_path):
    told = ranks.run(with_weights_of_its_own, workplace, tmp_path / "out", [trained, Path("/nowhere")], size=2)
    assert told[0] == told[1]
    assert "/nowhere: no such directory" in told[0]


def test_other_weights_on_one_machine_are_reported_on_every_rank(ranks, workplace, trained, tmp_path):
    both = [trained, trained / "checkpoints/step-00000002"]
    told = ranks.run(with_weights_of_its_own, workplace, tmp_path / "out", both, size=2)
    assert told[0] == told[1] == (
        "train.init: rank 1 sees different weights than rank 0; copy the same weights to every machine"
    )  # fmt: skip


def with_weights_of_its_own(workplace: Path, out: Path, weights: list[Path]) -> str:
    return mistake(workplace, out, [f"train.init={weights[dist.get_rank()]}"])


def test_tensors_that_cannot_be_read_stop_all_ranks(ranks, workplace, trained, tmp_path):
    spoilt = shutil.copytree(trained / "checkpoints/step-00000004", tmp_path / "spoilt")
    size = (spoilt / "__1_0.distcp").stat().st_size
    (spoilt / "__1_0.distcp").write_bytes(b"\0" * size)
    told = refused(ranks, workplace, tmp_path / "out", [f"train.init={spoilt}"])
    assert told.startswith(f"{spoilt} is damaged: __1_0.distcp has the checksum ")
    told = refused(ranks, workplace, tmp_path / "out", [f"train.init={spoilt}", "checkpoint.verify=sizes"])
    assert told.startswith(f"{spoilt} cannot be read: rank ")
