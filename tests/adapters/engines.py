"""One recipe on each engine, from the same weights and data."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.train.runs import train_recipe


@dataclass(frozen=True)
class Engine:
    """An engine, and how its ranks share the work."""

    name: str
    ranks: int
    overrides: tuple[str, ...]


ALONE = Engine("torch, 1 rank", 1, ("parallel.cp=1",))
"""What the others are compared with."""
OTHERS = (
    Engine("torch, cp 2", 2, ("parallel.cp=2",)),
    Engine("DeepSpeed, ZeRO 2, cp 2", 2, ("engine=deepspeed", "deepspeed.zero_stage=2", "parallel.cp=2")),
    Engine("DeepSpeed, ZeRO 3, cp 4", 4, ("engine=deepspeed", "deepspeed.zero_stage=3", "parallel.cp=4")),
    Engine("Megatron, cp 2", 2, ("engine=megatron", "parallel.cp=2")),
    Engine("Megatron, tp 2, cp 2", 4, ("engine=megatron", "parallel.tp=2", "parallel.cp=2")),
    Engine("Megatron, pp 2, cp 2", 4, ("engine=megatron", "parallel.pp=2", "parallel.cp=2")),
)


def run(engine: Engine, recipe: Path | str, out: Path, overrides: Sequence[str], resume: str = "never") -> None:
    """On a rank: train a recipe."""
    around: AbstractContextManager[None] = nullcontext()
    if "engine=megatron" in engine.overrides:
        from tests.adapters.megatron.training import may_start_processes

        may_start_processes()
        around = _megatron()
    elif "engine=deepspeed" in engine.overrides:
        around = _deepspeed()
    train_recipe(recipe, out, [*overrides, *engine.overrides], resume, lambda: around)


@contextmanager
def _megatron() -> Iterator[None]:
    if torch.cuda.is_available():
        yield
        return
    from tests.adapters.megatron.shim import on_cpu

    with on_cpu():
        yield


@contextmanager
def _deepspeed() -> Iterator[None]:
    from tests.adapters.deepspeed.training import fresh, linear_as_it_was

    fresh()
    with linear_as_it_was():
        yield
