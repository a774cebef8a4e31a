"""`engine = "deepspeed"` in a recipe: its runs are the torch engine's, and what it does not have is refused."""

import subprocess
import sys
from contextlib import contextmanager

import pytest

pytest.importorskip("deepspeed", reason="needs the extra: pip install -e '.[deepspeed]'")

from longctx.adapters import deepspeed as adapter
from longctx.errors import UserError
from longctx.recipe import load
from tests.adapters.deepspeed.training import fresh, linear_as_it_was
from tests.train.runs import metrics, mistake, train, write_workplace

STEPS = ["train.steps=8", "checkpoint.every=4", "evaluation.every=8", "evaluation.sequences=3", "checkpoint.keep=9"]
MODEL = ["model.layers=LES", "model.depth=4", "model.gated_deltanet.heads=2", *STEPS]
MIXTURE = [*MODEL, 'model.ffn=["swiglu","moe"]', "model.moe.experts=4", "model.moe.active=2", "model.moe.hidden=8"]
MIXTURE += ["model.moe.bias_rate=0.01"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return write_workplace(tmp_path_factory.mktemp("deepspeed"))


@contextmanager
def process():
    """As if begun anew."""
    fresh()
    with linear_as_it_was():
        yield


def run(workplace, out, overrides=(), resume="auto"):
    train(workplace, out, ["engine=deepspeed", *overrides], resume, process)


@pytest.fixture(scope="module")
def built_in(ranks, workplace):
    """Runs of eight steps of the torch engine on one rank, saved after four."""
    for name, model in (("dense", MODEL), ("mixture", MIXTURE)):
        ranks.run(train, workplace, workplace / name, [*model, "parallel.cp=1"], size=1)
    return workplace


def curve(out):
    found = metrics(out)
    return [(step.loss, step.grad_norm) for step in found.steps], [each.loss for each in found.evaluations]


RUNS = {
    f"zero {stage}, {name}": (size, name, [*model, *overrides, f"deepspeed.zero_stage={stage}"])
    for stage, size, name, model, overrides in (
        (0, 2, "mixture", MIXTURE, []),
        (1, 2, "dense", MODEL, ["deepspeed.offload=optimizer"]),
        (2, 2, "mixture", MIXTURE, ["train.activation_checkpointing=block"]),
        (2, 4, "dense", MODEL, ["parallel.cp=4", "parallel.ulysses=2", "parallel.attention=ulysses-ring"]),
        (3, 4, "mixture", MIXTURE, ["train.ffn_tile=9"]),
        (3, 2, "dense", MODEL, ["deepspeed.offload=parameters", "parallel.cp=1"]),
    )
}


@pytest.mark.parametrize(("size", "name", "overrides"), RUNS.values(), ids=RUNS)
def test_a_run_is_the_torch_engines(ranks, built_in, tmp_path, size, name, overrides):
    ranks.run(run, built_in, tmp_path / "run", overrides, size=size)
    (steps, evaluations), (wanted, wanted_evaluations) = curve(tmp_path / "run"), curve(built_in / name)
    for (loss, norm), (wanted_loss, wanted_norm) in zip(steps, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=1e-5)
        assert norm == pytest.approx(wanted_norm, rel=2e-3)  # as far as two ranks of the torch engine are
    assert evaluations == pytest.approx(wanted_evaluations, rel=1e-5)
    assert metrics(tmp_path / "run").runs[0].parameters == metrics(built_in / name).runs[0].parameters


def test_it_resumes_from_the_torch_engines_checkpoint_and_the_other_way_round(ranks, built_in, tmp_path):
    half = built_in / "mixture" / "checkpoints" / "step-00000004"
    ranks.run(run, built_in, tmp_path / "a", [*MIXTURE, "deepspeed.zero_stage=3"], str(half), size=2)
    wanted = curve(built_in / "mixture")[0][4:]
    assert [loss for loss, _ in curve(tmp_path / "a")[0]] == pytest.approx([loss for loss, _ in wanted], rel=1e-5)
    ranks.run(run, built_in, tmp_path / "b", MIXTURE, size=2)
    half = tmp_path / "b" / "checkpoints" / "step-00000004"
    ranks.run(train, built_in, tmp_path / "c", [*MIXTURE, "parallel.cp=1"], str(half), size=2)
    assert [loss for loss, _ in curve(tmp_path / "c")[0]] == pytest.approx([loss for loss, _ in wanted], rel=1e-5)


def test_the_scale_of_gradients_is_reported_and_nothing_else_is(tmp_path, workplace):
    """In processes of its own, as users start it."""
    command = [sys.executable, "-m", "longctx", "train", str(workplace / "tiny.toml"), "--out", str(tmp_path / "run")]
    command += ["--nproc", "2", "engine=deepspeed", "deepspeed.zero_stage=3", f"data.path={workplace / 'corpus'}"]
    done = subprocess.run([*command, "train.steps=2"], capture_output=True, text=True, check=False, timeout=250)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    note = "DeepSpeed, ZeRO stage 3: gradients are 0.5 times their sum over ranks, as measured; the loss is"
    assert said.count(note) == 1, said
    for word in ("WARNING", "Warning", "INFO", "built successfully", "ninja"):
        assert word not in said, said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine=deepspeed", "parallel.dp_replicate=2"], "ZeRO shards over all ranks: use dp_shard"),
        (
            ["engine=deepspeed", "parallel.tp=2"],
            "engine = 'deepspeed' does not support tp above 1; use engine = 'megatron'",
        ),
        (
            ["engine=deepspeed", *MIXTURE, "parallel.ep=2"],
            "engine = 'deepspeed' does not support expert parallelism; use engine = 'torch'",
        ),
        (
            ["engine=deepspeed", "train.precision=bf16", "deepspeed.zero_stage=0"],
            "stage 0 with train.precision = 'bf16' accumulates gradients in bf16; use stage 1, 2 or 3",
        ),
        (["engine=deepspeed", "deepspeed.offload=parameters"], "'parameters' needs zero_stage 3 or higher, not 2"),
        (
            ["engine=deepspeed", "deepspeed.offload=optimizer", "deepspeed.zero_stage=0"],
            "'optimizer' needs zero_stage 1 or higher, not 0",
        ),
        (["deepspeed.zero_stage=3"], "this table is for engine = 'deepspeed', but engine = 'torch'; remove it"),
    ],
)
def test_what_it_does_not_have_is_refused(workplace, overrides, message):
    with pytest.raises(UserError) as caught:
        load(workplace / "tiny.toml", overrides)
    assert message in str(caught.value)


@contextmanager
def of_version(version):
    import deepspeed

    before, modules = deepspeed.__version__, [name for name in sys.modules if name.startswith(adapter.__name__)]
    taken = {name: sys.modules.pop(name) for name in modules}
    deepspeed.__version__ = version
    try:
        yield
    finally:
        deepspeed.__version__ = before
        sys.modules.update(taken)


def refused(workplace, out, version):
    return mistake(workplace, out, ["engine=deepspeed"], around=lambda: of_version(version))


@pytest.mark.parametrize("version", ["0.18.2", "0.20.0"])
def test_another_version_is_refused(ranks, workplace, tmp_path, version):
    for said in ranks.run(refused, workplace, tmp_path / "run", version, size=2):
        assert said == (
            f"engine: 'deepspeed': this is deepspeed {version}, and longctx was tested with deepspeed 0.19.8 to 0.19: "
            "pip install -e '.[deepspeed]'"
        )


@contextmanager
def missing():
    with of_version("0.19.8"):
        taken = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "deepspeed"}
        sys.modules["deepspeed"] = None
        try:
            yield
        finally:
            sys.modules.update(taken)


def without(workplace, out):
    return mistake(workplace, out, ["engine=deepspeed"], around=missing)


def test_without_it_the_extra_is_named(ranks, workplace, tmp_path):
    for said in ranks.run(without, workplace, tmp_path / "run", size=2):
        assert said == "engine: 'deepspeed': deepspeed is not installed: pip install -e '.[deepspeed]'"
