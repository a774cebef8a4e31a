"""Engine construction: the recipe's engine with the recipe's sizes, and frameworks that are missing or not tested."""

import sys
from types import SimpleNamespace
from typing import get_args

import pytest
import torch.distributed as dist

from longctx.errors import UserError
from longctx.parallel.mesh import Mesh
from longctx.recipe import Recipe
from longctx.recipe.tables import ParallelConfig
from longctx.train import build_engine as module
from longctx.train.build_engine import CHECKPOINT_FORMATS, build_engine
from tests.convert.cases import recipe
from tests.model.cases import VOCABULARY, hybrid

FRAMEWORKS = {"deepspeed": ("deepspeed", "deepspeed"), "megatron": ("megatron.core", "megatron-core")}
"""Module and package by engine."""


def of_engine(engine, **tables):
    return recipe(hybrid()).model_copy(update={"engine": engine, **tables})


@pytest.fixture(autouse=True)
def _fresh_adapters(monkeypatch):
    """The adapters are imported again, and check the version again."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in list(sys.modules):
        if name.startswith(tuple(f"longctx.adapters.{engine}" for engine in FRAMEWORKS)):
            monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("engine", FRAMEWORKS)
def test_a_missing_framework_is_a_user_error_with_the_extra_to_install(engine, monkeypatch):
    framework, package = FRAMEWORKS[engine]
    monkeypatch.setitem(sys.modules, framework, None)
    with pytest.raises(UserError) as caught:
        build_engine(of_engine(engine), "cpu", VOCABULARY)
    message = f"engine: '{engine}': {package} is not installed: pip install -e '.[{engine}]'"
    assert str(caught.value) == message


@pytest.mark.parametrize("version", ["0.1", "99.0"])
@pytest.mark.parametrize("engine", FRAMEWORKS)
def test_a_version_that_was_not_tested_is_a_user_error_with_those_that_were(engine, version, monkeypatch):
    framework, package = FRAMEWORKS[engine]
    monkeypatch.setitem(sys.modules, framework, SimpleNamespace(__version__=version))
    with pytest.raises(UserError) as caught:
        build_engine(of_engine(engine), "cpu", VOCABULARY)
    message = str(caught.value)
    beginning = f"engine: '{engine}': this is {package} {version}, and longctx was tested with {package} "
    assert message.startswith(beginning)
    assert message.endswith(f": pip install -e '.[{engine}]'")


def test_the_torch_engine_has_the_recipes_tables_and_a_mesh_of_all_ranks(monkeypatch):
    built = {}

    def mesh(device_type, **sizes):
        built.update(device_type=device_type, sizes=sizes)
        return "mesh"

    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 12)
    monkeypatch.setattr(Mesh, "build", mesh)
    monkeypatch.setattr(module, "TorchEngine", lambda *arguments, **options: (arguments, options))
    run = of_engine("torch", parallel=ParallelConfig(dp_replicate=2, cp=3, ulysses=3, ep=2))
    arguments, options = build_engine(run, "cpu", VOCABULARY)
    assert built["device_type"] == "cpu"
    # dp_shard is the rest: 12 / (2 * 3).
    assert built["sizes"] == {"dp_replicate": 2, "dp_shard": 2, "cp": 3, "ulysses": 3, "ep": 2}
    assert arguments == (run.model, run.train, run.optimizer, "mesh")
    assert options == {"vocab_size": VOCABULARY, "seed": run.seed}


def test_other_import_errors_are_raised_unchanged(monkeypatch):
    def engine(*arguments, **options):
        raise ImportError("libcuda.so is missing")

    monkeypatch.setattr(module, "_mesh", lambda recipe, device_type: None)
    monkeypatch.setattr(module, "TorchEngine", engine)
    with pytest.raises(ImportError, match=r"^libcuda\.so is missing$"):
        build_engine(of_engine("torch"), "cpu", VOCABULARY)


def test_every_engine_has_a_checkpoint_format():
    assert CHECKPOINT_FORMATS.keys() == set(get_args(Recipe.model_fields["engine"].annotation))
