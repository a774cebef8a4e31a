"""The engine `deepspeed` of a recipe: ZeRO over all ranks, and the loss of one step exactly as one rank would have it.

As in the torch engine each rank divides its own sum by the global number of labels, and gradients are to be summed over
ranks. DeepSpeed averages them, in a way that depends on the stage: what it makes of them is measured
(`longctx.adapters.deepspeed.probe`), and the loss is multiplied by the reciprocal.
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

from longctx.adapters.deepspeed.groups import Groups
from longctx.adapters.deepspeed.partitions import MOMENTS, Partitions, gradient
from longctx.adapters.deepspeed.precise import PreciseParameters
from longctx.adapters.deepspeed.probe import TOLERANCE, gradient_scale
from longctx.adapters.deepspeed.runtime import Wrapped, Zero, begin, partition
from longctx.checkpoint.save import Checkpointer, TrainerState, load_tensors
from longctx.checkpoint.weights import Weights
from longctx.engines.base import Batch, StepResult
from longctx.engines.router_stats import Routing
from longctx.engines.step import accumulate, balance, decayed, save_memory
from longctx.model.config import ModelConfig
from longctx.model.decoder import Decoder, Losses
from longctx.model.initialise import drawn
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh
from longctx.recipe.tables import DeepSpeedConfig, OptimizerConfig, TrainConfig


class ZeroEngine:
    """The model and its optimizer, over all ranks of a mesh of dp_shard x cp."""

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
        """Build, divide and initialise, and measure the scale of gradients."""
        self.mesh, self.config = mesh, train
        self.device = mesh.device
        begin(mesh.device_type)
        self._groups = Groups(mesh)
        # Stage 0 has no clipping of its own in all precisions, and its gradients are whole on every rank.
        clip = 0.0 if train.clip == "none" or zero.zero_stage == 0 else train.clip
        with torch.device("meta"):
            self._shape = Decoder(model, vocab_size)
            decoder = Decoder(model, vocab_size)
        zero_settings = Zero(zero.zero_stage, zero.offload, train.precision, clip)
        self._zero = replace(zero_settings, bucket=min(zero_settings.bucket, self.parameters))
        save_memory(decoder, train)
        self._materialise(decoder)
        self.model = decoder
        self.optimizer = self._adamw(optimizer)
        self._wrapped = Wrapped(decoder, self.optimizer, self._zero, self._groups)
        self._partitions = Partitions(self._wrapped)
        self._precise = PreciseParameters(decoder, self._partitions) if train.precision == "bf16" else None
        for name, parameter in decoder.named_parameters():
            self._partitions.set_weight(parameter, drawn(self._shape, name, seed).to(self.device))
        self._publish()
        self._scales: dict[int, float] = {}
        self.notes: Sequence[str] = self._measured(train.sequences_per_step // mesh.dp.size)

    def _materialise(self, decoder: Decoder) -> None:
        """Give the parameters memory, in stage 3 those of one module at a time, which are divided at once."""
        for module in reversed(list(decoder.modules())):
            module.to_empty(device=self.device, recurse=False)
            reset: Callable[[], None] | None = getattr(module, "reset_buffers", None)
            if reset is not None:
                reset()
            if self._zero.stage == 3 and list(module.parameters(recurse=False)):
                partition(module, self._zero.settings, self._zero.dtype, self._groups)

    def _adamw(self, config: OptimizerConfig) -> torch.optim.AdamW:
        decays = decayed(self._shape)
        matrices = [name for name, _ in self._shape.named_parameters() if name in decays]
        vectors = [name for name, _ in self._shape.named_parameters() if name not in decays]
        self._names = [names for names in (matrices, vectors) if names]
        """Of the parameters in each group."""
        return torch.optim.AdamW(
            [
                {
                    "params": [self.model.get_parameter(name) for name in names],
                    "weight_decay": config.weight_decay if names is matrices else 0.0,
                }
                for names in self._names
            ],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    def _publish(self) -> None:
        """After weights have changed from outside."""
        self._partitions.publish()
        if self._precise is not None:
            self._precise.refresh()

    def _scale(self, batches: int) -> float:
        """By what DeepSpeed multiplies gradients in steps of so many batches."""
        if batches not in self._scales:
            self._scales[batches] = gradient_scale(self._zero, self._groups, batches, self.device)
        return self._scales[batches]

    def _measured(self, batches: int) -> tuple[str, ...]:
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
        return sum(p.numel() for p in self._shape.parameters())

    def gradients(self, batches: Sequence[Batch]) -> tuple[float, Routing]:
        """As `accumulate` does it; in DeepSpeed's hands until the step."""
        factor, left = 1 / self._scale(len(batches)), len(batches)

        def forward(batch: Batch, scale: float) -> Losses:
            nonlocal left
            left -= 1
            self._wrapped.begin_batch(last=left == 0)
            return self._forward(batch, scale)

        def backward(whole: Tensor) -> None:
            self._wrapped.backward(whole * factor)

        return accumulate(batches, self.mesh, self.device, forward, backward)

    def _forward(self, batch: Batch, scale: float) -> Losses:
        losses: Losses = self._wrapped.engine(
            batch.tokens, batch.layout, batch.labels, loss_tile=self.config.loss_tile, scale=scale
        )
        return losses

    def step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """As in `Engine`."""
        loss, routing = self.gradients(batches)
        routing.check_finite()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = self._step()
        if self._precise is not None:
            self._precise.refresh()
        balance(self.model, routing)
        return StepResult(loss, norm, routing)

    def _step(self) -> float:
        """Clip, step and forget the gradients; their norm, NaN where DeepSpeed took no step because of it."""
        engine = self._wrapped.engine
        if self._zero.stage > 0:
            engine.step()
            norm = float(engine.get_global_grad_norm())
            return norm if engine.was_step_applied() and norm >= 0 else math.nan
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
        whole = torch.stack([n.double() for n in norms]).norm()
        if self.config.clip != "none":
            clip_grads_with_norm_(parameters, self.config.clip, whole)
        engine.step()
        return whole.item()

    @torch.no_grad()
    def losses(self, batch: Batch) -> Losses:
        """As in `Engine`."""
        self.model.eval()
        losses = self._forward(batch, 1.0)
        self.model.train()
        return losses

    def attention_schedules(self, layout: Layout, dtype: torch.dtype) -> dict[str, str]:
        """As in `Engine`."""
        return self._shape.attention_schedules(layout, dtype)

    def flops(self, layout: Layout) -> int:
        """As in `Engine`."""
        return self._shape.flops(layout)

    def load_weights(self, weights: Weights) -> None:
        """As in `Engine`."""
        tensors = self._weights(whole=False)
        weights.fill(tensors)
        self._set_weights(tensors)

    def save(self, checkpointer: Checkpointer, state: TrainerState) -> None:
        """As in `Engine`: what the torch engine would write, in the background, while training goes on."""
        checkpointer.save(self._tensors(whole=True), state)

    def load(self, path: Path) -> None:
        """As in `Engine`; the torch engine may have written it."""
        tensors = self._tensors(whole=False)
        load_tensors(path, tensors)
        self._set_weights(tensors["model"])
        states = tensors["optimizer"]["state"]
        for name, parameter in self.model.named_parameters():
            for moment in MOMENTS:
                self._partitions.set_moment(parameter, moment, states[name][moment].full_tensor())
        self._partitions.set_steps(states[name]["step"].item())

    def _weights(self, *, whole: bool) -> dict[str, Any]:
        """The tensors of the model by name, this rank's rows of them: as they are, or to be filled."""
        tensors: dict[str, Any] = {}
        buffers = dict(self._shape.named_buffers())
        for name, shape in self._shape.state_dict().items():
            if name in buffers:
                tensors[name] = self.model.get_buffer(name)
            else:
                parameter = self.model.get_parameter(name)
                tensors[name] = self._rows(shape.shape, self._partitions.weight(parameter) if whole else None)
        return tensors

    def _tensors(self, *, whole: bool) -> dict[str, Any]:
        """The state of model and optimizer as torch names it, in the same two ways."""
        self._partitions.begin_states()
        states = {}
        for name, shape in self._shape.named_parameters():
            parameter = self.model.get_parameter(name)
            states[name] = {"step": torch.tensor(self._partitions.steps)} | {
                moment: self._rows(shape.shape, self._partitions.moment(parameter, moment) if whole else None)
                for moment in MOMENTS
            }
        groups = [
            {key: value for key, value in group.items() if key != "params"} | {"params": names}
            for group, names in zip(self.optimizer.param_groups, self._names, strict=True)
        ]
        return {"model": self._weights(whole=whole), "optimizer": {"state": states, "param_groups": groups}}

    def _rows(self, shape: torch.Size, whole: Tensor | None) -> DTensor:
        """This rank's rows of a tensor, float32; of an empty one where it is not given."""
        assert self.mesh.shard is not None
        if whole is None:
            return torch.distributed.tensor.empty(
                shape, dtype=torch.float32, device_mesh=self.mesh.shard, placements=[Shard(0)]
            )
        rows = distribute_tensor(whole, self.mesh.shard, [Shard(0)], src_data_rank=None)
        mine = rows.to_local().clone()  # a view would keep the whole
        return DTensor.from_local(
            mine, self.mesh.shard, [Shard(0)], run_check=False, shape=rows.shape, stride=rows.stride()
        )

    def _set_weights(self, tensors: dict[str, Any]) -> None:
        for name, parameter in self.model.named_parameters():
            self._partitions.set_weight(parameter, tensors[name].full_tensor())
        self._publish()

    def close(self) -> None:
        """Take DeepSpeed's hooks from the model."""
        self._wrapped.engine.destroy()

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's whole gradient between `gradients` and the step: every rank has to walk through all."""
        for name, parameter in self.model.named_parameters():
            yield name, gradient(parameter)
