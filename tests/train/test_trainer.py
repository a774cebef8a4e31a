"""Training on ranks: a resumed run repeats the uninterrupted one, options change what runs."""

import io
import math
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from hashlib import sha256
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from longctx.checkpoint.save import Checkpointer
from longctx.engines.torch_engine import TorchEngine
from longctx.kernels.native import library
from longctx.model import ffn
from longctx.model.decoder import Block
from longctx.parallel.rank_errors import RankError
from longctx.recipe import load
from longctx.train.display import PlainDisplay
from longctx.train.run_record import read_record
from longctx.train.start import find_start
from longctx.train.stop_signal import note_stop
from longctx.train.trainer import _Trainer
from tests.train.runs import (
    checkpoints,
    interrupted_copy,
    losses,
    metrics,
    mistake,
    tensors,
    train,
    write_workplace,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # checkpoints read by one process

CP2 = ("parallel.cp=2",)
DP2 = ("parallel.cp=1", "parallel.dp_shard=2", "train.sequences_per_step=4")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return write_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="module")
def uninterrupted(ranks, workplace) -> Path:
    """8 uninterrupted steps on 2 context-parallel ranks, 2 sequences accumulated in each; checkpoints at 2, 4, 6, 8."""
    ranks.run(train, workplace, workplace / "uninterrupted", ["evaluation.every=4"], "auto", nullcontext, True, size=2)
    return workplace / "uninterrupted"


# A run from its start to its end


def test_a_run_learns_and_leaves_what_it_promises(uninterrupted, workplace):
    found = metrics(uninterrupted)
    assert [step.step for step in found.steps] == list(range(1, 9))
    assert found.steps[-1].loss < found.steps[0].loss - 0.5
    assert [evaluation.step for evaluation in found.evaluations] == [4, 8]
    assert found.evaluations[1].loss < found.evaluations[0].loss
    assert found.runs[0].mesh == {"dp_replicate": 1, "dp_shard": 1, "cp": 2, "ep": 1, "tp": 1, "pp": 1}
    assert found.runs[0].native == library.loaded()
    assert found.steps[-1].tokens == 8 * 2 * 64
    run = found.runs[0]
    assert (run.name, run.directory) == ("tiny", str(uninterrupted))
    assert (run.sequence_length, run.tokens_per_step) == (64, 128)
    # Every schedule was reckoned with, and one was chosen.
    (layers, chosen) = next(iter(found.runs[0].attention.items()))
    assert layers.startswith("layer 1")
    assert all(f"{name} " in chosen for name in ("ring", "all-gather", "ulysses", "; alternatives:"))
    assert checkpoints(uninterrupted) == [f"step-{step:08d}" for step in (2, 4, 6, 8)]
    for picture in ("loss.png", "loss_by_position.png"):
        assert (uninterrupted / "pictures" / picture).read_bytes().startswith(b"\x89PNG")


def test_the_recipe_beside_the_checkpoints_is_the_one_that_ran(uninterrupted, workplace):
    overrides = [f"data.path={workplace / 'corpus'}", "evaluation.every=4"]
    assert load(uninterrupted / "recipe.toml") == load(workplace / "tiny.toml", overrides)


def test_the_record_beside_the_checkpoints_says_what_produced_them(uninterrupted, workplace):
    (start,) = read_record(uninterrupted).starts
    assert start["recipe"]["sha256"] == sha256((uninterrupted / "recipe.toml").read_bytes()).hexdigest()
    assert start["parallel"] == {"ranks": 2, **metrics(uninterrupted).runs[0].mesh, "layout": "zigzag"}
    assert start["corpus"]["path"] == str(workplace / "corpus")
    assert start["resumed_from"] is None


def test_a_run_that_is_done_is_left_alone(ranks, uninterrupted, workplace, tmp_path):
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    ranks.run(train, workplace, out, size=2)
    assert (out / "run.json").read_bytes() == (uninterrupted / "run.json").read_bytes()
    assert (out / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
    assert checkpoints(out) == checkpoints(uninterrupted)


# Resuming


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (2, CP2),
        pytest.param(2, DP2, marks=pytest.mark.slow),
        (4, ("parallel.dp_replicate=2", "parallel.cp=2", "parallel.layout=contiguous")),
    ],
    ids=["cp 2, accumulating", "dp 2, accumulating", "4 ranks, replicated"],
)
def test_resumed_on_the_same_ranks_every_number_is_the_same(ranks, uninterrupted, workplace, tmp_path, size, overrides):
    steps = 8
    if overrides != CP2:  # `uninterrupted` has those
        steps, overrides = 4, (*overrides, "train.steps=4")
        uninterrupted = tmp_path / "whole"
        ranks.run(train, workplace, uninterrupted, overrides, size=size)
    out = interrupted_copy(uninterrupted, tmp_path / "out", steps // 2)
    ranks.run(train, workplace, out, overrides, size=size)
    found, expected = metrics(out), metrics(uninterrupted)
    assert [run.step for run in found.runs] == [0, steps // 2]
    first, second = (start["resumed_from"] for start in read_record(out).starts)
    assert (first, second["step"]) == (None, steps // 2)
    # With the speeds that were measured at first, not with those of the second start.
    assert found.runs[0].attention == found.runs[1].attention
    for name in ("step", "loss", "lr", "grad_norm", "tokens"):
        assert [getattr(step, name) for step in found.steps] == [getattr(step, name) for step in expected.steps]
    last = f"step-{steps:08d}"
    there = tensors(uninterrupted / "checkpoints" / last)
    for name, tensor in tensors(out / "checkpoints" / last).items():
        assert torch.equal(tensor, there[name]), name


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (1, ("parallel.cp=1",)),
        pytest.param(2, ("parallel.layout=contiguous",), marks=pytest.mark.slow),
        pytest.param(2, ("parallel.cp=1", "parallel.dp_shard=2"), marks=pytest.mark.slow),
        pytest.param(2, ("parallel.cp=1", "parallel.dp_replicate=2"), marks=pytest.mark.slow),
        pytest.param(4, ("parallel.cp=4",), marks=pytest.mark.slow),
        (4, ("parallel.cp=2", "parallel.dp_shard=2")),
    ],
    ids=["1 rank", "contiguous", "dp_shard 2", "dp_replicate 2", "cp 4", "dp_shard 2, cp 2"],
)
def test_resumed_on_other_ranks_every_number_is_the_same_to_rounding(
    ranks, uninterrupted, workplace, tmp_path, size, overrides
):
    out = interrupted_copy(uninterrupted, tmp_path / "out", 6)
    ranks.run(train, workplace, out, overrides, size=size)
    assert losses(out)[:6] == losses(uninterrupted)[:6]
    assert losses(out)[6:] == pytest.approx(losses(uninterrupted)[6:], rel=1e-5)
    there = tensors(uninterrupted / "checkpoints" / "step-00000008")
    for name, tensor in tensors(out / "checkpoints" / "step-00000008").items():
        if name.startswith("model."):
            assert torch.linalg.vector_norm(tensor - there[name]) <= 1e-4 * torch.linalg.vector_norm(there[name]), name


def test_a_resumed_run_reads_the_sequences_that_follow(ranks, uninterrupted, workplace, tmp_path):
    """The losses above would not show it on a corpus whose sequences are all alike."""
    reads = ranks.run(train, workplace, tmp_path / "first", ["train.steps=3"], "auto", sequences_read, size=2)
    out = interrupted_copy(uninterrupted, tmp_path / "out", 6)
    again = ranks.run(train, workplace, out, ["parallel.cp=1", "parallel.dp_shard=2"], "auto", sequences_read, size=2)
    assert reads == [[0, 1, 2, 3, 4, 5]] * 2
    assert again == [[12, 14], [13, 15]]


@contextmanager
def sequences_read() -> Iterator[list[int]]:
    """The numbers of the sequences of which batches are made for steps."""
    numbers: list[int] = []
    numbers_of = _Trainer._numbers

    def noted(self, cursor):
        found = numbers_of(self, cursor)
        if numbers[-len(found) :] != list(found):  # asked for ahead of the step, and again at the step
            numbers.extend(found)
        return found

    with patch.object(_Trainer, "_numbers", noted):
        yield numbers


def test_a_mix_resumes_with_the_sequences_that_follow_on_any_ranks(ranks, workplace, tmp_path):
    corpus = workplace / "corpus"
    mix = f'[{{path="{corpus}",weight=3,max_document=500}},{{path="{corpus}",weight=1,min_document=501}}]'
    overrides = (f"data.mix={mix}", "train.steps=4", "evaluation.every=4", "evaluation.sequences=3")
    ranks.run(train, workplace, tmp_path / "whole", (*overrides, "parallel.cp=1"), size=1)
    for size in (2, 1):
        out = interrupted_copy(tmp_path / "whole", tmp_path / f"resumed-{size}", 2)
        ranks.run(train, workplace, out, (*overrides, f"parallel.cp={size}"), size=size)
        exact = {"rel": 0, "abs": 0} if size == 1 else {"rel": 1e-5}
        assert losses(out) == pytest.approx(losses(tmp_path / "whole"), **exact)
        found, expected = metrics(out), metrics(tmp_path / "whole")
        assert found.evaluations[-1].loss == pytest.approx(expected.evaluations[-1].loss, **exact)
        assert found.runs[0].unigram_loss == expected.runs[0].unigram_loss
    other = f"data.mix={mix.replace('weight=3', 'weight=2')}"
    (told,) = ranks.run(mistake, workplace, out, [*overrides, other, "parallel.cp=1"], size=1)
    assert "was trained on other data, or with another mix, seed, shuffle_window or sequence_length" in told


def test_going_back_to_an_earlier_checkpoint_gives_up_the_later_ones(ranks, uninterrupted, workplace, tmp_path):
    """Else the next start would take a checkpoint of the attempt that was given up for the newest."""
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    back = str(out / "checkpoints" / "step-00000002")
    overrides = ["checkpoint.every=3", "optimizer.lr=1e-4", "train.steps=5", "schedule.warmup=0"]
    ranks.run(train, workplace, out, overrides, back, size=2)
    assert checkpoints(out) == ["step-00000002", "step-00000003", "step-00000005"]
    assert losses(out)[:2] == losses(uninterrupted)[:2]
    assert len(losses(out)) == 5


def test_a_checkpoint_of_another_run_begins_a_new_one(ranks, uninterrupted, workplace, tmp_path):
    start = str(uninterrupted / "checkpoints" / "step-00000006")
    ranks.run(train, workplace, tmp_path / "out", [], start, size=2)
    assert [step.step for step in metrics(tmp_path / "out").steps] == [7, 8]
    assert [step.loss for step in metrics(tmp_path / "out").steps] == losses(uninterrupted)[6:]


def test_sigterm_saves_at_the_end_of_the_step_even_where_one_rank_alone_gets_it(
    ranks, uninterrupted, workplace, tmp_path
):
    out = tmp_path / "out"
    assert ranks.run(train, workplace, out, [], "auto", sigterm_on_rank_1_in_step_3, size=2) == [143, 143]
    assert checkpoints(out) == ["step-00000002", "step-00000003"]
    assert not (out / "pictures").exists()
    assert ranks.run(train, workplace, out, size=2) == [0, 0]
    assert losses(out) == losses(uninterrupted)


def test_the_step_at_which_it_stops_is_reported_whatever_logging_leaves_out(ranks, workplace, tmp_path):
    out = tmp_path / "out"
    ranks.run(train, workplace, out, ["logging.every=5"], "auto", sigterm_on_rank_1_in_step_3, size=2)
    assert [step.step for step in metrics(out).steps] == [3]


@contextmanager
def sigterm_on_rank_1_in_step_3() -> Iterator[None]:
    """What is shown ends with the line of the stop: not with that of a step, which the display held back."""
    step_of, shown = _Trainer._step, io.StringIO()
    display = PlainDisplay(Console(file=shown))

    def step(self, number, average):
        if number == 3 and self.mesh.cp.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of(self, number, average)

    with patch.object(_Trainer, "_step", step), patch("longctx.train.reporter.make_display", lambda: display):
        yield
    if dist.get_rank() == 0:
        *_, step_line, last = shown.getvalue().splitlines()
        assert step_line.startswith("step 3/8 ")
        assert last.startswith("Stopped by a signal after step 3. Checkpoint: ")


def test_a_run_that_is_stopped_before_its_first_step_says_that_it_can_go_on(ranks, workplace, tmp_path):
    out = tmp_path / "out"
    ranks.run(train, workplace, out, [], "auto", sigterm_on_rank_1_at_its_start, size=2)
    assert (out / "stopped").read_text() == "before the first step\n"
    assert not (out / "checkpoints").exists()


@contextmanager
def sigterm_on_rank_1_at_its_start() -> Iterator[None]:
    """It comes while the data are opened, where only a launcher that notes it keeps the rank alive."""
    start, shown = find_start, io.StringIO()
    display = PlainDisplay(Console(file=shown))

    def signalled(*arguments):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return start(*arguments)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    note_stop()
    display_made = patch("longctx.train.reporter.make_display", lambda: display)
    with patch("longctx.train.trainer.find_start", signalled), display_made:
        yield
    signal.signal(signal.SIGTERM, before)
    if dist.get_rank() == 0:
        assert shown.getvalue().splitlines()[-1] == "Stopped by a signal before the first step. Rerun the command."


def test_a_signal_that_comes_while_a_step_ends_counts_at_the_end_of_the_next(ranks, workplace, tmp_path):
    out = tmp_path / "out"
    ranks.run(train, workplace, out, [], "auto", sigterm_on_rank_1_after_its_row_of_step_3, size=2)
    assert (out / "stopped").read_text() == "after step 4\n"


@contextmanager
def sigterm_on_rank_1_after_its_row_of_step_3() -> Iterator[None]:
    """Rank 1 has said that it got no signal, and waits for what the others say."""
    gather_of = _Trainer._gather

    def gather(self, *values):
        rows = gather_of(self, *values)
        if self.done == 3 and dist.get_rank() == 1 and len(values) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return rows

    with patch.object(_Trainer, "_gather", gather):
        yield


STAGES = 'stage=[{ name = "a", train = { steps = 3 } }, { name = "b", train = { steps = 2 } }]'


def test_a_signal_that_comes_in_the_last_save_of_a_stage_stops_the_run_before_the_next(ranks, workplace, tmp_path):
    out = tmp_path / "out"
    ranks.run(train, workplace, out, [STAGES], "auto", sigterm_on_rank_1_in_the_save_after_step_3, size=2)
    assert (out / "stopped").read_text() == "after step 3\n"


@contextmanager
def sigterm_on_rank_1_in_the_save_after_step_3() -> Iterator[None]:
    save_of = _Trainer._save

    def save(self):
        if self.done == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        save_of(self)

    with patch.object(_Trainer, "_save", save):
        yield


# Experts


EXPERTS = (
    'model.ffn=["moe", "swiglu"]',
    "model.moe={experts = 4, active = 2, hidden = 8, bias_rate = 1e-3, z = 1e-3}",
    "evaluation.every=4",
)


@pytest.fixture(scope="module")
def expert_parallel(ranks, workplace) -> Path:
    """8 steps with experts that are sharded over 2 context-parallel ranks."""
    overrides = [*EXPERTS, "parallel.ep=2"]
    ranks.run(train, workplace, workplace / "expert_parallel", overrides, "auto", nullcontext, True, size=2)
    return workplace / "expert_parallel"


def test_a_run_reports_how_its_experts_are_chosen(expert_parallel):
    found = metrics(expert_parallel)
    assert found.steps[-1].loss < found.steps[0].loss - 0.5
    assert found.runs[0].mesh["ep"] == 2
    for step in found.steps:
        (router,) = (step.routers[name] for name in ["blocks.0.ffn"])
        assert list(step.routers) == ["blocks.0.ffn"]
        assert 1 <= router.imbalance <= 2
        assert 0 < router.entropy <= math.log(4) + 1e-6
        assert router.dropped == 0
    first, second = found.evaluations
    assert first.fluctuation == {}
    assert 0 < second.fluctuation["blocks.0.ffn"] < 1
    assert (expert_parallel / "pictures" / "routing.png").read_bytes().startswith(b"\x89PNG")
    bias = tensors(expert_parallel / "checkpoints" / "step-00000008")["model.blocks.0.ffn.bias"]
    assert 0 < bias.abs().max() <= 8 * 1.001e-3


@pytest.mark.parametrize(
    "extra",
    [
        (),
        pytest.param(("train.precision=bf16",), marks=pytest.mark.slow),
        pytest.param((*EXPERTS, 'model.heads={mixers = ["lightning"], active = 1}'), marks=pytest.mark.slow),
    ],
    ids=["dense", "bf16", "experts"],
)
def test_reproducible_runs_are_equal_to_the_bit_wherever_they_stop_and_resume(ranks, workplace, tmp_path, extra):
    overrides = ("parallel.reproducible=4", "train.steps=3", "checkpoint.every=1", *extra)
    whole, second, stopped = (tmp_path / name for name in ("whole", "second", "stopped"))
    ranks.run(train, workplace, whole, (*overrides, "parallel.cp=1"), size=1)
    ranks.run(train, workplace, tmp_path / "first", (*overrides, "parallel.cp=4"), size=4)
    interrupted_copy(tmp_path / "first", second, 1)
    ranks.run(train, workplace, second, (*overrides, "parallel.cp=1", "parallel.dp_shard=2"), size=2)
    interrupted_copy(second, stopped, 2)
    ranks.run(train, workplace, stopped, (*overrides, "parallel.cp=2"), size=2)
    for name in ("loss", "grad_norm"):
        assert [getattr(s, name) for s in metrics(stopped).steps] == [getattr(s, name) for s in metrics(whole).steps]
    there = tensors(whole / "checkpoints" / "step-00000003")
    found = tensors(stopped / "checkpoints" / "step-00000003")
    assert found.keys() == there.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, there[name])] == []


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        pytest.param(2, ["parallel.ep=2"], marks=pytest.mark.slow),
        pytest.param(1, ["parallel.cp=1"], marks=pytest.mark.slow),
        (4, ["parallel.ep=4", "parallel.dp_shard=2"]),
        pytest.param(4, ["parallel.ep=2", "parallel.dp_replicate=2"], marks=pytest.mark.slow),
    ],
    ids=["the same", "1 rank", "ep 4", "ep 2, dp_replicate 2"],
)
def test_experts_are_laid_out_anew_over_other_ranks(ranks, expert_parallel, workplace, tmp_path, size, overrides):
    out = interrupted_copy(expert_parallel, tmp_path / "out", 6)
    ranks.run(train, workplace, out, [*EXPERTS, *overrides], size=size)
    assert losses(out)[6:] == (
        losses(expert_parallel)[6:]
        if overrides == ["parallel.ep=2"]
        else pytest.approx(losses(expert_parallel)[6:], rel=1e-5)
    )
    there = tensors(expert_parallel / "checkpoints" / "step-00000008")
    for name, tensor in tensors(out / "checkpoints" / "step-00000008").items():
        if name.startswith("model."):
            assert torch.linalg.vector_norm(tensor - there[name]) <= 1e-4 * torch.linalg.vector_norm(there[name]), name


@contextmanager
def logits_that_are_no_numbers_in_step_3(layer: str) -> Iterator[None]:
    step_of = TorchEngine.step

    def step(self, batches, lr):
        self.steps_done = getattr(self, "steps_done", 0) + 1
        if self.steps_done == 3:
            with torch.no_grad():
                self.model.get_submodule(layer).router.weight.mul_(float("nan"))
        return step_of(self, batches, lr)

    with patch.object(TorchEngine, "step", step):
        yield


@contextmanager
def a_token_that_is_no_number_in_step_3() -> Iterator[None]:
    """Token 5 is NaN in the embedding's output, in the step and when it is looked for."""
    step_of, taken, embed = TorchEngine.step, Counter[str](), torch.nn.functional.embedding

    def step(self, batches, lr):
        taken["steps"] += 1
        return step_of(self, batches, lr)

    def spoiled(*arguments, **options):
        out = embed(*arguments, **options)
        if taken["steps"] == 3:
            out = out.clone()
            out[:, 5] = float("nan")
        return out

    with patch.object(TorchEngine, "step", step), patch("torch.nn.functional.embedding", spoiled):
        yield


def test_a_loss_that_is_no_number_is_named_by_its_sequence_document_and_token(ranks, workplace, tmp_path):
    overrides = ["parallel.cp=1", "train.sequences_per_step=1"]
    (message,) = ranks.run(
        mistake, workplace, tmp_path / "out", overrides, "auto", a_token_that_is_no_number_in_step_3, size=1
    )
    start = "step 3: the loss is nan and the grad norm nan. Not finite from there on: sequence 2, document 0, token 5 "
    assert message.startswith(f"{start}(counted from 0). Training stopped")


ATTENTION_EXPERTS = (
    "model.layers=LSA",
    "model.depth=3",
    "model.block=parallel",
    "model.attention_experts={experts = 3, heads = 2}",
)


@pytest.mark.parametrize(
    ("layer", "overrides"),
    [
        pytest.param("blocks.1.ffn", ["model.ffn=moe", EXPERTS[1], "parallel.ep=2"], marks=pytest.mark.slow),
        ("blocks.2.mixer", [*ATTENTION_EXPERTS, "model.ffn=moe", EXPERTS[1]]),
    ],
)
def test_logits_that_are_no_numbers_stop_all_ranks_with_layer_and_step(ranks, workplace, tmp_path, layer, overrides):
    around = partial(logits_that_are_no_numbers_in_step_3, layer)
    messages = ranks.run(mistake, workplace, tmp_path / "out", overrides, "auto", around, size=2)
    for message in messages:
        assert message.startswith(f"step 3: {layer}: the router's logits are not all finite numbers. Training stopp")
    assert len(losses(tmp_path / "out")) == 2


def test_a_run_reports_how_even_the_weights_of_attention_experts_are(ranks, workplace, tmp_path):
    ranks.run(train, workplace, tmp_path / "out", [*ATTENTION_EXPERTS, "train.steps=4", "evaluation.every=2"], size=2)
    found = metrics(tmp_path / "out")
    assert found.steps[-1].loss < found.steps[0].loss - 0.5
    for step in found.steps:
        assert list(step.routers) == ["blocks.2.mixer"]
        assert 1 <= step.routers["blocks.2.mixer"].imbalance < 3
        assert 0 < step.routers["blocks.2.mixer"].entropy <= math.log(3) + 1e-6
        assert step.routers["blocks.2.mixer"].dropped == 0
    # Of a token the expert of largest weight is what may change.
    assert 0 < found.evaluations[1].fluctuation["blocks.2.mixer"] < 1


# What an option changes


@contextmanager
def work_counted() -> Iterator[Counter[str]]:
    """How often a block is computed and in which dtype, and its feed-forward in tiles of how many tokens."""
    counts: Counter[str] = Counter()
    compute, tiled = Block._compute, ffn.tiled_swiglu

    def counted(self, x, *others):
        counts[str(x.dtype)] += 1
        return compute(self, x, *others)

    def counted_tiles(x, gate_up, down, tile, **options):
        counts[f"tiles of {tile}"] += 1
        return tiled(x, gate_up, down, tile, **options)

    with patch.object(Block, "_compute", counted), patch.object(ffn, "tiled_swiglu", counted_tiles):
        yield counts


@pytest.mark.parametrize(
    ("size", "overrides", "work", "rel"),
    [
        (2, [], {"torch.float32": 12}, 0.0),
        pytest.param(2, ["train.precision=bf16"], {"torch.bfloat16": 12}, 1e-2, marks=pytest.mark.slow),
        pytest.param(2, ["train.activation_checkpointing=block"], {"torch.float32": 24}, 0.0, marks=pytest.mark.slow),
        pytest.param(2, ["train.ffn_tile=24"], {"torch.float32": 12, "tiles of 24": 12}, 1e-6, marks=pytest.mark.slow),
        (
            4,
            ["parallel.dp_shard=2", "train.precision=bf16", "train.activation_checkpointing=block", "train.ffn_tile=8"],
            {"torch.bfloat16": 12, "tiles of 8": 12},
            1e-2,
        ),
    ],
    ids=["fp32", "bf16", "activation_checkpointing", "ffn_tile", "all of them"],
)
def test_an_option_of_training_changes_what_runs_and_not_the_losses(
    ranks, uninterrupted, workplace, tmp_path, size, overrides, work, rel
):
    """3 steps of 2 blocks over 2 sequences, which 2 data-parallel ranks divide."""
    overrides = ["train.steps=3", "schedule.kind=constant", *overrides]
    plain = workplace / "three"
    if not plain.exists():
        ranks.run(train, workplace, plain, overrides[:2], size=2)
    assert ranks.run(train, workplace, tmp_path / "out", overrides, "auto", work_counted, size=size) == [work] * size
    assert losses(tmp_path / "out") == pytest.approx(losses(plain), rel=rel, abs=0)
    if rel > 1e-5:
        assert losses(tmp_path / "out") != losses(plain)


# Mistakes that show during training


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(ranks, workplace, tmp_path):
    overrides = ["optimizer.lr=1e30", "checkpoint.every=1", "schedule.warmup=0"]
    told = ranks.run(mistake, workplace, tmp_path / "out", overrides, size=2)
    assert told[0] == told[1]
    step = int(told[0].removeprefix("step ").partition(":")[0])
    assert step >= 2
    assert "lower optimizer.lr" in told[0]
    assert checkpoints(tmp_path / "out")[-1] == f"step-{step - 1:08d}"
    assert len(losses(tmp_path / "out")) == step - 1


def lose_a_rank_during_a_save(workplace: Path, out: Path) -> str:
    """On a rank: the save at the end of a run loses another rank."""
    close = Checkpointer.close

    def lose(checkpointer: Checkpointer) -> None:
        close(checkpointer)
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.7]:48354.")

    with patch.object(Checkpointer, "close", lose), pytest.raises(RankError) as caught:
        train(workplace, out, ["train.steps=2"])
    return str(caught.value)


def test_a_save_that_loses_a_rank_says_so(ranks, workplace, tmp_path):
    """It also replaces the error of a step that lost the rank."""
    for rank, message in enumerate(ranks.run(lose_a_rank_during_a_save, workplace, tmp_path / "out", size=2)):
        assert message.startswith(f"saves in progress: rank {rank} lost contact with a rank at 10.0.0.7, which died")
