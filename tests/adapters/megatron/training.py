"""Steps of training with Megatron-Core's own schedules, data parallelism, optimizer and distributed checkpoints."""

import multiprocessing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.adapters.megatron.cases import LENGTH, VOCABULARY, Run, gpt, parallel, rows_of
from tests.adapters.megatron.shim import on_cpu

MICRO_BATCHES = 2


@dataclass(frozen=True)
class Training:
    """A run of some steps, from the beginning or from a checkpoint."""

    run: Run
    steps: int
    begin: int = 0
    load: Path | None = None
    save: Path | None = None
    pp: int = 1
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the model's configuration."""
    distributed: bool = False
    """Whether the optimizer's state is divided over data- and context-parallel ranks."""


def batch(step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels of a micro-batch, `[1, LENGTH]`."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    x, labels = (torch.randint(0, VOCABULARY, (1, LENGTH), generator=generator) for _ in range(2))
    return x, labels


def _data(run: Run, step: int) -> Any:
    from megatron.core import parallel_state

    world, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    rows = rows_of(run, parallel_state.get_context_parallel_rank())
    for number in range(MICRO_BATCHES // world):
        yield rows, *(each[:, rows] for each in batch(step, number * world + rank))


def _forward(data: Any, model: Any) -> Any:
    rows, x, labels = next(data)
    out = model(x, rows[None], None)

    def loss_of(logits: torch.Tensor) -> Any:
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum") / LENGTH
        return each, {"loss": each.detach().clone()}  # the schedule divides it in place

    return out, loss_of


def trained(spec: Any, training: Training) -> list[float]:
    """The loss of each step over all ranks, whose optimizer steps Megatron makes."""
    with on_cpu():
        return _trained(spec, training)


def _trained(spec: Any, training: Training) -> list[float]:
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    run = training.run
    parallel(run, pipeline_model_parallel_size=training.pp)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    changes = {"pipeline_model_parallel_size": training.pp, **training.changes}
    model = gpt(run, spec, pre_process=first, post_process=last, **changes)
    if training.distributed:
        model = model.float()  # in which it keeps its parts
    config = model.config
    ddp = DistributedDataParallel(
        config, DistributedDataParallelConfig(use_distributed_optimizer=training.distributed), model
    )
    options = OptimizerConfig(
        optimizer="adam", lr=0.01, weight_decay=0.1, clip_grad=0.5,
        params_dtype=torch.float32, use_distributed_optimizer=training.distributed,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(options, [ddp])
    config.finalize_model_grads_func = finalize_model_grads
    if training.load is not None:
        _load(training.load, model, optimizer)
    losses = []
    for step in range(training.begin, training.begin + training.steps):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        found = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=_data(run, step),
            model=[ddp],
            num_microbatches=MICRO_BATCHES // parallel_state.get_data_parallel_world_size(),
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        done, _, _ = optimizer.step()
        assert done
        total = torch.tensor(sum(each["loss"].item() for each in found) / MICRO_BATCHES, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        losses.append(total.item() / run.tp)
    if training.save is not None:
        _save(training.save, model, optimizer)
    parallel_state.destroy_model_parallel()
    return losses


def _state(model: Any, optimizer: Any, loading: bool) -> dict[str, Any]:
    parts = model.sharded_state_dict()
    return {"model": parts, "optimizer": optimizer.sharded_state_dict(parts, is_loading=loading)}


def may_start_processes() -> None:
    """Megatron writes checkpoints in processes of its own, which the tests' ranks, being daemons, may not start."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def _save(folder: Path, model: Any, optimizer: Any) -> None:
    from megatron.core import dist_checkpointing

    may_start_processes()
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(_state(model, optimizer, False), str(folder))


def _load(folder: Path, model: Any, optimizer: Any) -> None:
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(_state(model, optimizer, True), str(folder))
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
