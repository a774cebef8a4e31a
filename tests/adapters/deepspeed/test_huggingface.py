"""Models of transformers over ranks under DeepSpeed: the gradients of the untouched model on one rank."""

import pytest
import torch

pytest.importorskip("deepspeed", reason="needs the extra: pip install -e '.[deepspeed]'")
pytest.importorskip("transformers", reason="needs the extra: pip install -e '.[huggingface]'")

from longctx.adapters.deepspeed import gradients_of, initialize
from longctx.adapters.huggingface import parallelize
from longctx.parallel.mesh import Mesh
from tests.adapters.deepspeed.training import fresh, linear_as_it_was
from tests.adapters.huggingface.test_models import PACKED, batch, documents, model_of, untouched

pytestmark = pytest.mark.usefixtures("plain_torch")


def config_of(stage):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10_000},
        "zero_allow_untested_optimizer": True,
    }


def trained(kind, stage, dp, cp):
    """The loss and the gradients of two steps over packed documents, each data-parallel rank with a row of its own."""
    from deepspeed.utils import safe_get_full_grad

    fresh()
    mesh = Mesh.build("cpu", dp_shard=dp, cp=cp)
    with linear_as_it_was():
        gradients = gradients_of(stage, mesh)
        model = parallelize(model_of(kind), mesh, gradients=gradients)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        engine, *_ = initialize(model, mesh, config=config_of(stage), optimizer=optimizer)
        x, labels = batch()
        labels, positions = documents(x, labels, PACKED)
        mine = slice(None) if dp == 1 else slice(mesh.dp.rank, mesh.dp.rank + 1)
        losses = []
        for _ in range(2):
            loss = engine(input_ids=x[mine], labels=labels[mine], position_ids=positions[mine]).loss
            engine.backward(loss)
            found = {name: safe_get_full_grad(p).clone() for name, p in model.named_parameters()}
            losses.append((loss.item(), found))
            engine.step()
        engine.destroy()
    return gradients, losses


CASES = [
    *(("llama", stage, 1, 2) for stage in (0, 1, 2, 3)),
    *(("llama", stage, 2, 2) for stage in (1, 3)),
    *((kind, stage, 1, 2) for kind in ("qwen3_next", "minimax", "mamba2") for stage in (1, 3)),
    ("qwen3_next", 3, 2, 2),
]


@pytest.mark.parametrize(("kind", "stage", "dp", "cp"), CASES)
def test_a_model_under_zero_is_the_untouched_one(ranks, kind, stage, dp, cp):
    _, want, gradients = untouched(kind, True, wide=False)
    answers = ranks.run(trained, kind, stage, dp, cp, size=dp * cp)
    # Rows have equally many labels: the mean over ranks is that over labels.
    losses = [answer[1][0][0] for answer in answers]
    assert sum(losses) / len(losses) == pytest.approx(want, rel=1e-5)
    for said, steps in answers:
        assert said == ("mean" if stage == 3 else "sum")
        assert steps[1][0] < steps[0][0], "a step makes the loss less"
        assert set(gradients) <= set(steps[0][1])
        for name, found in steps[0][1].items():
            ref = gradients.get(name, torch.zeros_like(found))
            assert (found - ref).norm() <= 3e-5 * ref.norm(), name


def refusals():
    import deepspeed

    fresh()
    mesh = Mesh.build("cpu", cp=2)
    said = []
    with linear_as_it_was():
        gradients_of(3, mesh)
        alone = torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)
        model = deepspeed.zero.Init(module=torch.nn.Linear(2, 3), data_parallel_group=alone).module
        for arguments in ({}, {"mpu": None}):
            with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is looked at below
                initialize(model, mesh, config=config_of(3), **arguments)
            said.append(str(caught.value))
    return said


def test_what_would_drift_apart_is_refused(ranks):
    for divided, mpu in ranks.run(refusals, size=2):
        assert divided.startswith("initialize: weight is partitioned over 1 of 2 ranks: build the model outside")
        assert mpu == "initialize: mpu: the groups come from the mesh; leave mpu out"


def dtypes(stage):
    fresh()
    mesh = Mesh.build("cpu", cp=2)
    with linear_as_it_was():
        model = parallelize(model_of("llama"), mesh, gradients=gradients_of(stage, mesh))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        config = config_of(stage) | {"bf16": {"enabled": True}}
        engine, *_ = initialize(model, mesh, config=config, optimizer=optimizer)
        found = {parameter.dtype for parameter in model.parameters()}
        engine.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_in_bf16_parameters_are_in_bf16(ranks, stage):
    assert ranks.run(dtypes, stage, size=2) == [{torch.bfloat16}] * 2
