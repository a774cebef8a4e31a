"""What trains a model on ranks, and the torch engine: FSDP2 over the mesh, AdamW, and the loss of one step exactly as
one rank would have it.

A step's loss is the summed negative log likelihood of all its tokens on all ranks, divided by the number of labels
among them, and each router's losses, divided by the number of sequences. Each rank divides its own sum by that global
number, and gradients are *summed* over ranks (FSDP2 divides them by default), so that the result does not depend on how
tokens lie over ranks.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_

from longctx.checkpoint.save import Checkpointer, TrainerState, load_tensors
from longctx.checkpoint.weights import Weights
from longctx.engines.base import Batch, StepResult
from longctx.engines.router_stats import Routing
from longctx.engines.step import accumulate, balance, decayed, save_memory
from longctx.model.config import ModelConfig
from longctx.model.decoder import Decoder, Losses
from longctx.model.initialise import initialise
from longctx.model.moe import Experts
from longctx.parallel.collectives import all_reduce
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh
from longctx.recipe.tables import OptimizerConfig, TrainConfig


class TorchEngine:
    """The model and its optimizer on the ranks of a mesh."""

    notes: Sequence[str] = ()

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
        """Build, shard and initialise. `dtype`: of the parameters, float32, or float64 to verify with."""
        self.mesh, self.config, self.optimizer_config = mesh, train, optimizer
        self.device = mesh.device
        with torch.device("meta"):
            decoder = Decoder(model, vocab_size).to(dtype)
        save_memory(decoder, train)
        self._shard(decoder)
        decoder.to_empty(device=self.device)
        initialise(decoder, seed)
        self.model = decoder
        self.optimizer = self._adamw()

    def _shard(self, decoder: Decoder) -> None:
        policy = MixedPrecisionPolicy()
        if self.config.precision == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        # Decays are exponentials of parameters: rounded to bf16 a head would forget at another rate. A router's choice
        # is as fine as its logits.
        full = [m for m in decoder.modules() if getattr(m, "full_precision", False) and list(m.parameters())]
        full = full if policy.param_dtype is not None else []
        divided = [m for m in decoder.modules() if isinstance(m, Experts)] if self.mesh.ep.size > 1 else []
        for experts in divided:
            self._divide(experts)
        for module in (*full, *divided, *decoder.blocks, decoder):
            if module in divided:
                # By rows of the matrices: the experts are divided over ep already.
                fully_shard(
                    module, mesh=self.mesh.expert_shard, mp_policy=policy, shard_placement_fn=lambda _: Shard(1)
                )
            else:
                fully_shard(module, mesh=self.mesh.shard, mp_policy=exact if module in full else policy)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)
            # gloo knows no scaled sums, and NCCL's would multiply by 1.
            module.set_force_sum_reduction_for_comms(True)

    def _divide(self, experts: Experts) -> None:
        """Leave this rank of the ep axis its own experts."""
        assert self.mesh.expert_axis is not None
        experts.axis = self.mesh.ep
        for name, parameter in list(experts.named_parameters(recurse=False)):
            part = distribute_tensor(parameter.detach(), self.mesh.expert_axis, [Shard(0)], src_data_rank=None)
            setattr(experts, name, nn.Parameter(part))

    def _adamw(self) -> torch.optim.AdamW:
        config = self.optimizer_config
        decays = {id(self.model.get_parameter(name)) for name in decayed(self.model)}
        groups = []
        # Fused over the parameters of a group, which have to lie on one mesh.
        for parameters in self._by_mesh(self.model.parameters()):
            matrices = [p for p in parameters if id(p) in decays]
            vectors = [p for p in parameters if id(p) not in decays]
            groups += [
                {"params": some, "weight_decay": decay}
                for some, decay in ((matrices, config.weight_decay), (vectors, 0.0))
                if some
            ]
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)

    @staticmethod
    def _by_mesh(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
        """Parameters in groups that lie on one mesh each."""
        found: dict[object, list[Tensor]] = {}
        for parameter in parameters:
            found.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
        return list(found.values())

    @property
    def parameters(self) -> int:
        """Trained numbers, over all ranks, each counted once."""
        return sum(p.numel() for p in self.model.parameters())

    def gradients(self, batches: Sequence[Batch]) -> tuple[float, Routing]:
        """As `accumulate` does it."""

        def forward(batch: Batch, scale: float) -> Losses:
            losses: Losses = self.model(
                batch.tokens, batch.layout, batch.labels, loss_tile=self.config.loss_tile, scale=scale
            )
            return losses

        return accumulate(batches, self.mesh, self.device, forward, Tensor.backward)

    def _norm(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """The norm of all gradients together, float64, over whatever mesh each lies.

        In one collective: a number stands on as many ranks as there are copies of the model, and on no others.
        """
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients if g is not None]
        squares = torch.stack([n.double() for n in torch._foreach_norm(local)]).square().sum()
        return (all_reduce(squares) / self.mesh.dp_replicate).sqrt()

    def step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """As in `Engine`."""
        loss, routing = self.gradients(batches)
        routing.check_finite()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = self._norm([p.grad for p in parameters])
        if self.config.clip != "none":
            for some in self._by_mesh(parameters):
                clip_grads_with_norm_(some, self.config.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        balance(self.model, routing)
        return StepResult(loss, norm.item(), routing)

    @torch.no_grad()
    def losses(self, batch: Batch) -> Losses:
        """As in `Engine`."""
        self.model.eval()
        losses: Losses = self.model(batch.tokens, batch.layout, batch.labels, loss_tile=self.config.loss_tile)
        self.model.train()
        return losses

    def attention_schedules(self, layout: Layout, dtype: torch.dtype) -> dict[str, str]:
        """As in `Engine`."""
        return self.model.attention_schedules(layout, dtype)

    def flops(self, layout: Layout) -> int:
        """As in `Engine`."""
        return self.model.flops(layout)

    def load_weights(self, weights: Weights) -> None:
        """As in `Engine`."""
        weights.load_into(self.model)

    def _tensors(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, checkpointer: Checkpointer, state: TrainerState) -> None:
        """As in `Engine`; written in the background, while training goes on."""
        checkpointer.save(self._tensors(), state)

    def load(self, path: Path) -> None:
        """As in `Engine`."""
        tensors = self._tensors()
        load_tensors(path, tensors)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"]
        )

    def close(self) -> None:
        """Nothing is held."""

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's whole gradient, gathered: every rank has to walk through all of them."""
        for name, parameter in self.model.named_parameters():
            assert isinstance(parameter.grad, DTensor)
            yield name, parameter.grad.full_tensor()
