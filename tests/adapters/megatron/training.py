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
    afresh: bool = False
    """Whether the optimizer begins anew with what is loaded: it is another one where experts are divided."""
    save: Path | None = None
    pp: int = 1
    chunks: int = 1
    """Stages of a virtual pipeline that a rank has."""
    ep: int = 1
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
    virtual = training.chunks if training.chunks > 1 else None
    parallel(
        run,
        pipeline_model_parallel_size=training.pp,
        virtual_pipeline_model_parallel_size=virtual,
        expert_model_parallel_size=training.ep,
    )
    changes = {
        "pipeline_model_parallel_size": training.pp,
        "virtual_pipeline_model_parallel_size": virtual,
        "expert_model_parallel_size": training.ep,
        **training.changes,
    }
    models = []
    for number in range(training.chunks):
        stage = {"ignore_virtual": False, "vp_stage": number if virtual else None}
        first, last = parallel_state.is_pipeline_first_stage(**stage), parallel_state.is_pipeline_last_stage(**stage)
        chunk = gpt(run, spec, pre_process=first, post_process=last, vp_stage=stage["vp_stage"], **changes)
        models.append(chunk.float() if training.distributed else chunk)  # in which it keeps its parts
    config = models[0].config
    settings = DistributedDataParallelConfig(use_distributed_optimizer=training.distributed)
    ddps = [DistributedDataParallel(config, settings, chunk) for chunk in models]
    options = OptimizerConfig(
        optimizer="adam", lr=0.01, weight_decay=0.1, clip_grad=0.5,
        params_dtype=torch.float32, use_distributed_optimizer=training.distributed,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(options, ddps)
    config.finalize_model_grads_func = finalize_model_grads
    if training.load is not None:
        _load(training.load, models, None if training.afresh else optimizer)
    losses = []
    for step in range(training.begin, training.begin + training.steps):
        for ddp in ddps:
            ddp.zero_grad_buffer()
        optimizer.zero_grad()
        found = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=[_data(run, step) for _ in models] if virtual else _data(run, step),
            model=ddps,
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
        _save(training.save, models, optimizer)
    parallel_state.destroy_model_parallel()
    return losses


def _weights(models: list[Any]) -> dict[str, Any]:
    return {f"model{number}": model.sharded_state_dict() for number, model in enumerate(models)}


def _state(models: list[Any], optimizer: Any, loading: bool) -> dict[str, Any]:
    parts = _weights(models)
    return {**parts, "optimizer": optimizer.sharded_state_dict(parts, is_loading=loading)}


def may_start_processes() -> None:
    """Megatron writes checkpoints in processes of its own, which the tests' ranks, being daemons, may not start."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def _save(folder: Path, models: list[Any], optimizer: Any) -> None:
    from megatron.core import dist_checkpointing

    may_start_processes()
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(_state(models, optimizer, False), str(folder))


def _load(folder: Path, models: list[Any], optimizer: Any) -> None:
    from megatron.core import dist_checkpointing

    wanted = _weights(models) if optimizer is None else _state(models, optimizer, True)
    loaded = dist_checkpointing.load(wanted, str(folder))
    for number, model in enumerate(models):
        model.load_state_dict(loaded[f"model{number}"])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
