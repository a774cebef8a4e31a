"""DeepSpeed engine (`engine = "deepspeed"` in a recipe): ZeRO over all ranks, with the exact gradients of one rank.

As in the torch engine, each rank divides its summed loss by the global number of labels, so gradients have to be summed
over ranks. DeepSpeed averages them, over ranks that depend on the stage: the factor is measured
(`longctx.adapters.deepspeed.probe`), and the loss is multiplied by its reciprocal.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_

from longctx.adapters.deepspeed.full_precision import FullPrecisionParameters
from longctx.adapters.deepspeed.groups import Groups
from longctx.adapters.deepspeed.probe import TOLERANCE, gradient_scale
from longctx.adapters.deepspeed.runtime import DeepSpeedModel, ZeroSettings, init_distributed, partition_parameters
from longctx.adapters.deepspeed.zero_state import MOMENTS, ZeroState, full_gradient
from longctx.checkpoint.read import load_tensors
from longctx.checkpoint.save import Checkpointer
from longctx.checkpoint.trainer_state import TrainerState
from longctx.checkpoint.weights import Weights
from longctx.engines.base import Batch, StepResult
from longctx.engines.router_stats import RouterStats
from longctx.engines.step import accumulate_gradients, configure_activations, update_router_biases, weight_decay_names
from longctx.model.config import ModelConfig
from longctx.model.decoder import Decoder, Losses
from longctx.model.initialise import initial_value
from longctx.parallel.attention.cost_model import ScheduleChoice
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh
from longctx.recipe.tables import DeepSpeedConfig, OptimizerConfig, TrainConfig


class ZeroEngine:
    """`longctx.engines.base.Engine` with DeepSpeed ZeRO over all ranks of a mesh, dp_shard x cp."""

    def __init__(
        self,
        model: ModelConfig,
        train: TrainConfig,
        optimizer: OptimizerConfig,
        zero: DeepSpeedConfig,
        mesh: Mesh,
        *,
        vocab_size: int,
        seed: int,
    ) -> None:
        """Build, partition and initialise the model, and measure the gradient scale."""
        self.mesh, self.config = mesh, train
        self.device = mesh.device
        init_distributed(mesh.device_type)
        self._groups = Groups(mesh)
        # DeepSpeed does not clip in stage 0 in every precision; `_step` does, since every rank has the full gradients.
        clip = 0.0 if train.clip == "none" or zero.zero_stage == 0 else train.clip
        with torch.device("meta"):
            self._meta_model = Decoder(model, vocab_size)
            decoder = Decoder(model, vocab_size)
        settings = ZeroSettings(zero.zero_stage, zero.offload, train.precision, clip)
        self._zero = replace(settings, bucket=min(settings.bucket, self.parameters))
        configure_activations(decoder, train)
        self._materialise(decoder)
        self.model = decoder
        self.optimizer = self._adamw(optimizer)
        self._wrapped = DeepSpeedModel(decoder, self.optimizer, self._zero, self._groups)
        self._state = ZeroState(self._wrapped)
        self._full_precision = FullPrecisionParameters(decoder, self._state) if train.precision == "bf16" else None
        for name, parameter in decoder.named_parameters():
            self._state.set_weight(parameter, initial_value(self._meta_model, name, seed).to(self.device))
        self._weights_changed()
        self._scales: dict[int, float] = {}
        self.startup_messages: Sequence[str] = self._scale_message(train.sequences_per_step // mesh.dp.size)

    def _materialise(self, decoder: Decoder) -> None:
        """Allocate the parameters; in stage 3 module by module, each partitioned at once."""
        for module in reversed(list(decoder.modules())):
            module.to_empty(device=self.device, recurse=False)
            reset: Callable[[], None] | None = getattr(module, "reset_buffers", None)
            if reset is not None:
                reset()
            if self._zero.stage == 3 and list(module.parameters(recurse=False)):
                partition_parameters(module, self._zero.config, self._zero.dtype, self._groups)

    def _adamw(self, config: OptimizerConfig) -> torch.optim.AdamW:
        decays = weight_decay_names(self._meta_model)
        matrices = [name for name, _ in self._meta_model.named_parameters() if name in decays]
        vectors = [name for name, _ in self._meta_model.named_parameters() if name not in decays]
        return torch.optim.AdamW(
            [
                {
                    "params": [self.model.get_parameter(name) for name in names],
                    "weight_decay": config.weight_decay if names is matrices else 0.0,
                }
                for names in (matrices, vectors)
                if names
            ],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    def _weights_changed(self) -> None:
        """Update the copies of the master weights after a change from outside the optimizer."""
        self._state.update_lp_params()
        if self._full_precision is not None:
            self._full_precision.refresh()

    def _scale(self, batches: int) -> float:
        """Return DeepSpeed's gradient scale for steps of `batches` micro-batches, measured once."""
        if batches not in self._scales:
            self._scales[batches] = gradient_scale(self._zero, self._groups, batches, self.device)
        return self._scales[batches]

    def _scale_message(self, batches: int) -> tuple[str, ...]:
        scale = self._scale(batches)
        if abs(scale - 1) <= TOLERANCE:
            return ()
        return (
            f"DeepSpeed, ZeRO stage {self._zero.stage}: gradients are {scale:.6g} times their sum over ranks, as "
            f"measured; the loss is multiplied by {1 / scale:.6g}.",
        )

    @property
    def parameters(self) -> int:
        """As in `Engine`."""
        return sum(p.numel() for p in self._meta_model.parameters())

    def gradients(self, batches: Sequence[Batch]) -> tuple[float, RouterStats]:
        """Accumulate gradients as `accumulate_gradients`; DeepSpeed holds them until the step."""
        factor, remaining = 1 / self._scale(len(batches)), len(batches)

        def forward(batch: Batch, scale: float) -> Losses:
            nonlocal remaining
            remaining -= 1
            self._wrapped.begin_batch(last=remaining == 0)
            return self._forward(batch, scale)

        def backward(loss: Tensor) -> None:
            self._wrapped.backward(loss * factor)

        return accumulate_gradients(batches, self.mesh, self.device, forward, backward)

    def _forward(self, batch: Batch, scale: float) -> Losses:
        losses: Losses = self._wrapped.engine(
            batch.tokens, batch.layout, batch.labels, loss_tile=self.config.loss_tile, scale=scale
        )
        return losses

    def step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """As in `Engine`."""
        loss, router_stats = self.gradients(batches)
        router_stats.check_finite()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = self._step()
        if self._full_precision is not None:
            self._full_precision.refresh()
        update_router_biases(self.model, router_stats)
        return StepResult(loss, norm, router_stats)

    def _step(self) -> float:
        """Clip, step and zero the gradients; return their norm, NaN if DeepSpeed skipped the step because of it."""
        engine = self._wrapped.engine
        if self._zero.stage > 0:
            engine.step()
            norm = float(engine.get_global_grad_norm())
            return norm if engine.was_step_applied() and norm >= 0 else math.nan
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
        norm = torch.stack([n.double() for n in norms]).norm()
        if self.config.clip != "none":
            clip_grads_with_norm_(parameters, self.config.clip, norm)
        engine.step()
        return norm.item()

    @torch.no_grad()
    def losses(self, batch: Batch) -> Losses:
        """As in `Engine`."""
        self.model.eval()
        losses = self._forward(batch, 1.0)
        self.model.train()
        return losses

    def attention_schedules(self, layout: Layout, dtype: torch.dtype) -> dict[str, ScheduleChoice]:
        """As in `Engine`."""
        return self._meta_model.attention_schedules(layout, dtype)

    def flops(self, layout: Layout) -> int:
        """As in `Engine`."""
        return self._meta_model.flops(layout)

    def load_weights(self, weights: Weights) -> None:
        """As in `Engine`."""
        tensors = self._model_state(empty=True)
        weights.fill(tensors)
        self._set_weights(tensors)

    def save(self, checkpointer: Checkpointer, state: TrainerState) -> None:
        """As in `Engine`, in the torch engine's format; written in the background while training continues."""
        checkpointer.save(self._state_dict(), state)

    def load(self, path: Path) -> None:
        """As in `Engine`; the torch engine's checkpoints load too."""
        tensors = self._state_dict(empty=True)
        load_tensors(path, tensors)
        self._set_weights(tensors["model"])
        states = tensors["optimizer"]["state"]
        for name, parameter in self.model.named_parameters():
            for moment in MOMENTS:
                self._state.set_moment(parameter, moment, states[name][moment].full_tensor())
        self._state.set_steps(states[name]["step"].item())

    def _model_state(self, *, empty: bool = False) -> dict[str, Any]:
        """Return the model's tensors by name, sharded by rows: with their values, or `empty`, to be loaded into."""
        tensors: dict[str, Any] = {}
        buffers = dict(self._meta_model.named_buffers())
        for name, shape in self._meta_model.state_dict().items():
            if name in buffers:
                tensors[name] = self.model.get_buffer(name)
            else:
                parameter = self.model.get_parameter(name)
                tensors[name] = self._shard_rows(shape.shape, None if empty else self._state.weight(parameter))
        return tensors

    def _state_dict(self, *, empty: bool = False) -> dict[str, Any]:
        """Return the state of model and optimizer with torch's names: with its values, or `empty`."""
        self._state.init_moments()
        states = {}
        for name, shape in self._meta_model.named_parameters():
            parameter = self.model.get_parameter(name)
            states[name] = {"step": torch.tensor(self._state.steps)} | {
                moment: self._shard_rows(shape.shape, None if empty else self._state.moment(parameter, moment))
                for moment in MOMENTS
            }
        return {"model": self._model_state(empty=empty), "optimizer": {"state": states}}

    def _shard_rows(self, shape: torch.Size, full: Tensor | None) -> DTensor:
        """Shard a full tensor by rows over all ranks; None: an empty float32 tensor."""
        assert self.mesh.shard is not None
        if full is None:
            return torch.distributed.tensor.empty(
                shape, dtype=torch.float32, device_mesh=self.mesh.shard, placements=[Shard(0)]
            )
        rows = distribute_tensor(full, self.mesh.shard, [Shard(0)], src_data_rank=None)
        local = rows.to_local().clone()  # a view would keep the full tensor alive
        return DTensor.from_local(
            local, self.mesh.shard, [Shard(0)], run_check=False, shape=rows.shape, stride=rows.stride()
        )

    def _set_weights(self, tensors: dict[str, Any]) -> None:
        for name, parameter in self.model.named_parameters():
            self._state.set_weight(parameter, tensors[name].full_tensor())
        self._weights_changed()

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the model."""
        self._wrapped.engine.destroy()

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter's full gradient, between `gradients` and the step; every rank has to iterate over
        all."""
        for name, parameter in self.model.named_parameters():
            yield name, full_gradient(parameter)
