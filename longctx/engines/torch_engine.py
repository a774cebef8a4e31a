"""Torch engine: FSDP2 over the mesh, AdamW, expert parallelism.

Gradients are *summed* over ranks (FSDP2 averages by default), because each rank divides its loss by the global number
of labels (`longctx.engines.step`): the result does not depend on how tokens are sharded.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_

from longctx.checkpoint.read import load_tensors
from longctx.checkpoint.save import Checkpointer
from longctx.checkpoint.trainer_state import TrainerState
from longctx.checkpoint.weights import Weights
from longctx.engines.base import Batch, StepResult
from longctx.engines.router_stats import RouterStats
from longctx.engines.step import accumulate_gradients, configure_activations, update_router_biases, weight_decay_names
from longctx.model.config import ModelConfig
from longctx.model.decoder import Decoder, Losses
from longctx.model.initialise import initialise
from longctx.model.moe import Experts
from longctx.parallel.attention.cost_model import ScheduleChoice
from longctx.parallel.collectives import all_reduce
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh
from longctx.recipe.tables import OptimizerConfig, TrainConfig


class TorchEngine:
    """The model sharded with FSDP2 and its AdamW optimizer on the ranks of a mesh."""

    startup_messages: Sequence[str] = ()

    def __init__(
        self,
        model: ModelConfig,
        train: TrainConfig,
        optimizer: OptimizerConfig,
        mesh: Mesh,
        *,
        vocab_size: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Build, shard and initialise the model. `dtype` of the parameters: float32, or float64 for verification."""
        self.mesh, self.config, self.optimizer_config = mesh, train, optimizer
        self.device = mesh.device
        with torch.device("meta"):
            decoder = Decoder(model, vocab_size).to(dtype)
        configure_activations(decoder, train)
        self._shard(decoder)
        decoder.to_empty(device=self.device)
        initialise(decoder, seed)
        self.model = decoder
        self.optimizer = self._adamw()

    def _shard(self, decoder: Decoder) -> None:
        policy = MixedPrecisionPolicy()
        if self.config.precision == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fp32_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        # Decays are exponentials of parameters: rounding those to bf16 would change a head's decay rate. Top-k routing
        # needs the full precision of its logits.
        fp32_modules = [m for m in decoder.modules() if getattr(m, "full_precision", False) and list(m.parameters())]
        fp32_modules = fp32_modules if policy.param_dtype is not None else []
        ep_modules = [m for m in decoder.modules() if isinstance(m, Experts)] if self.mesh.ep.size > 1 else []
        for experts in ep_modules:
            self._shard_experts(experts)
        for module in (*fp32_modules, *ep_modules, *decoder.blocks, decoder):
            if module in ep_modules:
                # Along the rows of the matrices: dimension 0, the experts, is already sharded over ep.
                fully_shard(
                    module, mesh=self.mesh.expert_shard, mp_policy=policy, shard_placement_fn=lambda _: Shard(1)
                )
            else:
                fully_shard(module, mesh=self.mesh.shard, mp_policy=fp32_policy if module in fp32_modules else policy)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum, and NCCL's would multiply by 1.
            module.set_force_sum_reduction_for_comms(True)

    def _shard_experts(self, experts: Experts) -> None:
        """Shard the experts over the ep axis: keep only this rank's."""
        assert self.mesh.expert_axis is not None
        experts.axis = self.mesh.ep
        for name, parameter in list(experts.named_parameters(recurse=False)):
            shard = distribute_tensor(parameter.detach(), self.mesh.expert_axis, [Shard(0)], src_data_rank=None)
            setattr(experts, name, nn.Parameter(shard))

    def _adamw(self) -> torch.optim.AdamW:
        config = self.optimizer_config
        decays = {id(self.model.get_parameter(name)) for name in weight_decay_names(self.model)}
        groups = []
        # The fused kernel needs all parameters of a group on one mesh.
        for parameters in self._by_mesh(self.model.parameters()):
            matrices = [p for p in parameters if id(p) in decays]
            vectors = [p for p in parameters if id(p) not in decays]
            groups += [
                {"params": group, "weight_decay": decay}
                for group, decay in ((matrices, config.weight_decay), (vectors, 0.0))
                if group
            ]
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)

    @staticmethod
    def _by_mesh(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
        """Group parameters by their device mesh."""
        by_mesh: dict[object, list[Tensor]] = {}
        for parameter in parameters:
            by_mesh.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
        return list(by_mesh.values())

    @property
    def parameters(self) -> int:
        """As in `Engine`."""
        return sum(p.numel() for p in self.model.parameters())

    def gradients(self, batches: Sequence[Batch]) -> tuple[float, RouterStats]:
        """Accumulate gradients as `accumulate_gradients` does."""

        def forward(batch: Batch, scale: float) -> Losses:
            losses: Losses = self.model(
                batch.tokens, batch.layout, batch.labels, loss_tile=self.config.loss_tile, scale=scale
            )
            return losses

        return accumulate_gradients(batches, self.mesh, self.device, forward, Tensor.backward)

    def _norm(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Compute the global gradient norm, float64, over gradients on any mix of meshes.

        One collective: every element is on exactly `dp_replicate` ranks, so the sum over all ranks is divided by that.
        """
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients if g is not None]
        squares = torch.stack([n.double() for n in torch._foreach_norm(local)]).square().sum()
        return (all_reduce(squares) / self.mesh.dp_replicate).sqrt()

    def step(
        self, batches: Sequence[Batch], lr: float, skip: Callable[[float, float], bool] | None = None
    ) -> StepResult:
        """As in `Engine`. `skip`, called with the loss and the gradient norm before the update, says whether not to
        apply it; all ranks must get the same answer."""
        loss, router_stats = self.gradients(batches)
        router_stats.check_finite()
        if not math.isfinite(loss):
            # The parameters stay as they are, so that the trainer can find out where the loss is not finite.
            return StepResult(loss, math.nan, router_stats)
        norm = self.grad_norm()
        skipped = skip is not None and skip(loss, norm.item())
        if skipped:
            self.optimizer.zero_grad()
        else:
            self.update(lr, router_stats, norm)
        return StepResult(loss, norm.item(), router_stats, skipped)

    def grad_norm(self) -> Tensor:
        """Compute the norm of the accumulated gradients over all parameters, float64 on the device."""
        return self._norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def update(self, lr: float, router_stats: RouterStats, norm: Tensor) -> None:
        """Clip the gradients, whose norm is `norm`, and step the optimizer and the routers' biases."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.config.clip != "none":
            for on_one_mesh in self._by_mesh(parameters):
                clip_grads_with_norm_(on_one_mesh, self.config.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_router_biases(self.model, router_stats)

    @torch.no_grad()
    def losses(self, batch: Batch) -> Losses:
        """As in `Engine`."""
        self.model.eval()
        losses: Losses = self.model(batch.tokens, batch.layout, batch.labels, loss_tile=self.config.loss_tile)
        self.model.train()
        return losses

    def attention_schedules(self, layout: Layout, dtype: torch.dtype) -> dict[str, ScheduleChoice]:
        """As in `Engine`."""
        return self.model.attention_schedules(layout, dtype)

    def flops(self, layout: Layout) -> int:
        """As in `Engine`."""
        return self.model.flops(layout)

    def load_weights(self, weights: Weights) -> None:
        """As in `Engine`."""
        weights.load_into(self.model)

    def _tensors(self) -> tuple[dict[str, Any], Any]:
        """Return the tensors of model and optimizer, and the optimizer's parameter groups by names of parameters."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        groups = optimizer.pop("param_groups")
        return {"model": model, "optimizer": optimizer}, groups

    def save(self, checkpointer: Checkpointer, state: TrainerState) -> None:
        """As in `Engine`; written in the background while training continues."""
        checkpointer.save(self._tensors()[0], state)

    def load(self, path: Path) -> None:
        """As in `Engine`."""
        tensors, groups = self._tensors()
        load_tensors(path, tensors)
        optimizer = {**tensors["optimizer"], "param_groups": groups}
        set_state_dict(self.model, self.optimizer, model_state_dict=tensors["model"], optim_state_dict=optimizer)

    def close(self) -> None:
        """Do nothing: there are no external resources."""

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over every parameter's gathered gradient; collective, so every rank must exhaust the iterator."""
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is not None
            yield name, gathered(parameter.grad)

    def named_updates(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the gathered parameters (`updated NAME`) and first moments (`moment of NAME`); collective."""
        for name, parameter in self.model.named_parameters():
            yield f"updated {name}", gathered(parameter.detach())
            yield f"moment of {name}", gathered(self.optimizer.state[parameter]["exp_avg"])


def gathered(x: Tensor) -> Tensor:
    """Return a gathered tensor; collective where it is sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x
