"""The torch engine: FSDP2 over the mesh, AdamW, and the loss of one step exactly as one rank would have it.

A step's loss is the summed negative log likelihood of all its tokens on all ranks, divided by the number of labels
among them. Each rank divides its own sum by that global number, and gradients are *summed* over ranks (FSDP2 divides
them by default), so that the result does not depend on how tokens lie over ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from longctx.kernels.loss import IGNORE
from longctx.model.config import ModelConfig
from longctx.model.decoder import Block, Decoder
from longctx.model.initialise import initialise
from longctx.parallel.collectives import all_reduce
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh
from longctx.train.config import OptimizerConfig, TrainConfig


@dataclass(frozen=True)
class Batch:
    """This rank's part of one sequence: tokens and labels `[1, T_local]` int64 on the device."""

    tokens: Tensor
    labels: Tensor
    layout: Layout


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: the mean loss over all ranks' labels (nats), and the gradient's norm before clipping."""

    loss: float
    grad_norm: float


class TorchEngine:
    """The model and its optimizer on the ranks of a mesh."""

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
        self.device = torch.device(mesh.device_type, torch.cuda.current_device() if mesh.device_type == "cuda" else 0)
        with torch.device("meta"):
            decoder = Decoder(model, vocab_size).to(dtype)
        for block in decoder.blocks:
            assert isinstance(block, Block)
            block.recompute = train.activation_checkpointing == "block"
            block.ffn.tile = None if train.ffn_tile == "none" else train.ffn_tile
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
        # Decays are exponentials of parameters: rounded to bf16 a head would forget at another rate.
        gates = [m for m in decoder.modules() if getattr(m, "full_precision", False) and policy.param_dtype is not None]
        for module in (*gates, *decoder.blocks, decoder):
            fully_shard(module, mesh=self.mesh.shard, mp_policy=exact if module in gates else policy)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)
            # gloo knows no scaled sums, and NCCL's would multiply by 1.
            module.set_force_sum_reduction_for_comms(True)

    def _adamw(self) -> torch.optim.AdamW:
        config = self.optimizer_config
        exempt = {id(m.bias) for m in self.model.modules() if isinstance(getattr(m, "bias", None), torch.Tensor)}
        matrices = [p for p in self.model.parameters() if p.ndim >= 2 and id(p) not in exempt]
        vectors = [p for p in self.model.parameters() if p.ndim < 2 or id(p) in exempt]
        return torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    @property
    def parameters(self) -> int:
        """Trained numbers, over all ranks, each counted once."""
        return sum(p.numel() for p in self.model.parameters())

    def gradients(self, batches: Sequence[Batch]) -> float:
        """Accumulate the gradients of the mean loss over all labels in all ranks' `batches`; that loss, in nats.

        Every rank has to give equally many batches.
        """
        labels = torch.tensor(float(sum(int((b.labels != IGNORE).sum()) for b in batches)), dtype=torch.float64)
        labels = all_reduce(labels.to(self.device)).clamp(min=1)
        summed = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            loss, _ = self.model(
                batch.tokens, batch.layout, batch.labels, loss_tile=self.config.loss_tile, scale=1 / labels
            )
            loss.backward()
            summed += loss.detach()
        return all_reduce(summed).item()

    def step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """One optimizer step over all ranks' `batches` at the learning rate `lr`."""
        loss = self.gradients(batches)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.config.clip != "none":
            clip_grads_with_norm_(parameters, self.config.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(loss, norm.item())

    @torch.no_grad()
    def losses(self, batch: Batch) -> Tensor:
        """Each token's negative log likelihood `[1, T_local]` (nats, float32), 0 where there is no label."""
        nll: Tensor = self.model(batch.tokens, batch.layout, batch.labels, loss_tile=self.config.loss_tile)[1]
        return nll

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's whole gradient, gathered: every rank has to walk through all of them."""
        for name, parameter in self.model.named_parameters():
            assert isinstance(parameter.grad, DTensor)
            yield name, parameter.grad.full_tensor()
