"""The reproducible engine: the same bits on any number of processes, and the training of the torch engine."""

from dataclasses import dataclass, replace

import pytest
import torch

from longctx.data.loader import Sequence
from longctx.engines.reproducible import ReproducibleEngine
from longctx.engines.torch_engine import TorchEngine, gathered
from longctx.errors import UserError
from longctx.kernels.loss import IGNORE
from longctx.mixers import MIXERS
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.config import ModelConfig
from longctx.parallel.mesh import Mesh
from longctx.recipe.tables import OptimizerConfig, TrainConfig
from longctx.train.batches import to_batch
from tests.mixers.cases import config_of
from tests.model.cases import VOCABULARY, hybrid, model_of

LENGTH, RANKS = 93, 4
BOUNDS = [(0, 93), (0, 5, 6, 40, 93), (0, 92, 93), (0, 46, 93)]
SEQUENCES = 2
OPTIMIZER = OptimizerConfig(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.5)


@dataclass(frozen=True)
class Run:
    """How processes share the work."""

    model: ModelConfig
    dp: int = 1
    cp: int = 1
    order: str = "zigzag"
    precision: str = "fp32"
    attention: str = "auto"
    states: str = "all-gather"
    steps: int = 2


def sequence(number):
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, VOCABULARY, (LENGTH,), generator=generator)
    labels = tokens.roll(-1)
    bounds = BOUNDS[number % len(BOUNDS)]
    labels[[end - 1 for end in bounds[1:]]] = IGNORE
    labels[: 7 * (number % 3)] = IGNORE
    return Sequence(tokens, labels, torch.tensor(bounds), number)


def train(run, ranks=RANKS):
    """Each step's loss and norm, and the parameters after all of them; by the torch engine without `ranks`."""
    mesh = Mesh.build("cpu", dp_shard=run.dp, cp=run.cp)
    options = (run.model, TrainConfig(steps=1, clip=0.05, precision=run.precision), OPTIMIZER)
    sizes = {"vocab_size": VOCABULARY, "seed": 7}
    if ranks is None:
        engine = TorchEngine(*options, mesh, **sizes)
    else:
        engine = ReproducibleEngine(*options, mesh, ranks=ranks, **sizes)
    results = []
    for step in range(run.steps):
        numbers = range(step * SEQUENCES + mesh.dp.rank, (step + 1) * SEQUENCES, mesh.dp.size)
        schedules = {"attention": run.attention, "states": run.states}
        batches = [to_batch(sequence(n), engine.mesh, run.order, engine.device, **schedules) for n in numbers]
        result = engine.step(batches, 0.01)
        results.append((result.loss, result.grad_norm, {n: s.counts for n, s in result.router_stats.layers.items()}))
    after = {name: gathered(p.detach()).clone() for name, p in engine.model.state_dict().items()}
    engine.close()
    return results, after


def same(one, other):
    (results, after), (other_results, other_after) = one, other
    assert [r[:2] for r in results] == [r[:2] for r in other_results]
    for row, other_row in zip(results, other_results, strict=True):
        assert all(torch.equal(counts, other_row[2][name]) for name, counts in row[2].items())
    different = [name for name, x in after.items() if not torch.equal(x, other_after[name])]
    assert different == []


def equal_anywhere(ranks, run, others):
    want = ranks.run(train, run, size=1)[0]
    for other in others:
        answers = ranks.run(train, other, size=other.dp * other.cp)
        for answer in answers:
            same(answer, want)
    return want


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_steps_are_equal_to_the_bit_on_any_number_of_processes(ranks, precision):
    model = hybrid(depth=2)
    others = [Run(model, dp, cp, precision=precision) for dp, cp in ((1, 2), (1, 4), (2, 2), (2, 1))]
    equal_anywhere(ranks, Run(model, precision=precision), others)


@pytest.mark.parametrize(
    "router", ["token", *(pytest.param(r, marks=pytest.mark.slow) for r in ("similarity", "attention"))]
)
def test_experts_and_mixtures_of_heads_as_well(ranks, router):
    model = model_of(router)
    equal_anywhere(ranks, Run(model), [Run(model, 1, 4), Run(model, 2, 1)])


def test_a_hybrid_of_all_mixers_as_well(ranks):
    tables = {config_of(letter).name: config_of(letter) for letter in MIXERS}
    model = hybrid(layers="".join(MIXERS), depth=len(MIXERS), **tables)
    run = Run(model, precision="bf16", steps=1)
    equal_anywhere(ranks, run, [replace(run, cp=4)])


@pytest.mark.parametrize(
    ("order", "attention", "states"),
    [
        ("balanced", "ring", "tree"),
        pytest.param("contiguous", "all-gather", "ring", marks=pytest.mark.slow),
        pytest.param("zigzag", "ulysses", "all-gather", marks=pytest.mark.slow),
    ],
)
def test_with_every_schedule(ranks, order, attention, states):
    model = hybrid(softmax=SoftmaxConfig(heads=8, kv_heads=4, head_dim=4), depth=2)
    runs = [Run(model, dp, cp, order, "fp32", attention, states, steps=1) for dp, cp in ((1, 1), (1, 2), (2, 2))]
    equal_anywhere(ranks, runs[0], runs[1:])


def test_it_trains_as_the_torch_engine_does(ranks):
    run = Run(hybrid(depth=2), cp=2)
    got, after = ranks.run(train, run, size=2)[0]
    want, other = ranks.run(train, run, None, size=2)[0]
    for step, other_step in zip(got, want, strict=True):
        assert step[:2] == pytest.approx(other_step[:2], rel=1e-5)
    for name, x in after.items():
        assert (x - other[name]).norm() <= 1e-4 * other[name].norm(), name


def on_a_gpu():
    mesh = replace(Mesh.build("cpu"), device_type="cuda")
    with pytest.raises(UserError, match="it is for CPUs, and this run is on cuda"):
        ReproducibleEngine(hybrid(), TrainConfig(steps=1), OPTIMIZER, mesh, ranks=2, vocab_size=9, seed=1)
    return True


def test_a_gpu_is_refused(ranks):
    assert ranks.run(on_a_gpu, size=1) == [True]
