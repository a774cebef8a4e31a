"""`engine = "megatron"`: a recipe's model as Megatron-Core's, with its parallelism, its optimizer and its checkpoints.

Data, layouts, mixers and the loss in tiles are ours, so that a step is that of the built-in engine: gradients are
summed over ranks and divided by the number of labels of the whole step (Megatron's `calculate_per_token_loss`).
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from longctx.adapters.megatron.language_model import build, transformer_config
from longctx.adapters.megatron.layouts import LayoutBatch
from longctx.adapters.megatron.optimizers import load_optimizer, moments
from longctx.adapters.megatron.weights import fill, mark
from longctx.checkpoint.save import RESUME, Checkpointer, TrainerState, others
from longctx.checkpoint.weights import Weights
from longctx.engines.base import Batch, StepResult
from longctx.engines.router_stats import ONE_STAGE, Routing
from longctx.errors import UserError
from longctx.kernels.loss import IGNORE
from longctx.layers.router import Router
from longctx.mixers.head_mixture import HeadRouter
from longctx.model.decoder import Decoder, Losses
from longctx.model.initialise import drawn
from longctx.moe.report import RouterReport
from longctx.parallel.collectives import all_reduce, gather_named
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh
from longctx.recipe import Recipe
from longctx.recipe.tables import MegatronConfig

_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}
"""How a distributed optimizer is saved, so that other numbers of ranks can go on with it."""
_KINDS = ("megatron.distributed_optimizer", "train.precision")
"""Keys of recipes in which a run cannot differ from the one that it goes on with."""


class MegatronEngine:
    """As `longctx.engines.torch_engine.Engine`."""

    notes: Sequence[str] = ()

    def __init__(self, recipe: Recipe, device_type: str, vocab_size: int, dtype: torch.dtype = torch.float32) -> None:
        """Over the ranks of the default process group, which compute on `cpu` or `cuda`. `dtype`: of the parameters
        where precision is fp32; float64 to verify with.

        Raises UserError where there is no CUDA, where the ranks compute on another device than Megatron, and where the
        vocabulary does not divide.
        """
        try:
            device = torch.cuda.current_device()
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"engine: 'megatron' needs GPUs, since Megatron-Core asks CUDA for what it does, and here is none "
                f"({error}); the engine 'torch' trains on a CPU too"
            ) from error
        self.device = torch.device(device)
        if self.device.type != device_type:
            raise UserError(
                f"train.device: engine = 'megatron' computes on {self.device.type}, and the ranks on {device_type}: "
                "give train.device = 'cuda', and a GPU for every rank of a machine"
            )
        self.recipe, self.options = recipe, recipe.megatron or MegatronConfig()
        if vocab_size % recipe.parallel.tp:
            raise UserError(
                f"parallel.tp: the vocabulary has {vocab_size} rows, which {recipe.parallel.tp} ranks do not divide: "
                "give model.vocab_size"
            )
        self.mesh = _parallel(recipe, self.device.type)
        with torch.device("meta"):
            self._built_in = Decoder(recipe.model, vocab_size)
        routes = any(isinstance(module, HeadRouter | Router) for module in self._built_in.modules())
        self._routing_stages = self.mesh.pp if routes else ONE_STAGE
        bf16 = recipe.train.precision == "bf16"
        config = _config(recipe, self.options, torch.bfloat16 if bf16 else dtype)
        self.model = build(
            recipe.model,
            vocab_size,
            recipe.data.sequence_length,
            config,
            first=parallel_state.is_pipeline_first_stage(),
            last=parallel_state.is_pipeline_last_stage(),
        ).to(self.device)
        self.model.loss_tile = recipe.train.loss_tile
        mark(self.model, self.mesh.tp.size)
        fill(self.model, self.mesh.tp, lambda name: drawn(self._built_in, name, recipe.seed))
        self.ddp = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=bf16, use_distributed_optimizer=self.options.distributed_optimizer
            ),
            Float16Module(config, self.model) if bf16 else self.model,
        )
        self.optimizer = get_megatron_optimizer(self._adamw(config.params_dtype), [self.ddp])
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss

    def _adamw(self, dtype: torch.dtype) -> OptimizerConfig:
        config, clip = self.recipe.optimizer, self.recipe.train.clip
        return OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            # The norm is reported also where nothing is clipped.
            clip_grad=math.inf if clip == "none" else clip,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            use_distributed_optimizer=self.options.distributed_optimizer,
        )

    @property
    def parameters(self) -> int:
        """As in `Engine`."""
        return sum(p.numel() for p in self._built_in.parameters())

    def step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """As in `Engine`."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        labels = self._summed(sum(int((batch.labels != IGNORE).sum()) for batch in batches))
        sequences = self.mesh.dp.size * sum(len(batch.tokens) for batch in batches)
        # Megatron divides by the labels, where there are any, and a router's losses have the mean over sequences.
        found, reports = self._run(batches, float(labels.clamp(min=1)) / sequences, forward_only=False)
        loss = self._of_last_stage(self._summed(sum(float(nll.double().sum()) for nll in found)))
        routing = Routing()
        for said in reports:
            routing.add(said)
        routing.sum_over_ranks(self.device, self.mesh.tokens, self._routing_stages)
        routing.check_finite()
        for group in self.optimizer.param_groups:
            # What Megatron's scheduler does besides.
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.recipe.optimizer.weight_decay * group.get("wd_mult", 1.0)
        _, norm, _ = self.optimizer.step()
        return StepResult(float(loss / labels.clamp(min=1)), float(norm), routing)

    def _summed(self, x: float) -> Tensor:
        """Over the ranks that hold the tokens of a step."""
        return all_reduce(torch.tensor(x, dtype=torch.float64, device=self.device), self.mesh.tokens)

    def _run(
        self, batches: Sequence[Batch], weight: float, *, forward_only: bool
    ) -> tuple[list[Tensor], list[dict[str, RouterReport]]]:
        """One pass of Megatron's schedule; the negative log likelihoods of each batch's tokens, on the last stage, and
        what this stage's routers say of each batch, whose losses are multiplied with a weight."""
        reports: list[dict[str, RouterReport]] = []

        def forward_step(batches: Iterator[Batch], model: Any) -> Any:
            batch = next(batches)
            given = LayoutBatch(batch.layout, weight * len(batch.tokens))
            out = model(batch.tokens, None, None, labels=batch.labels, packed_seq_params=given)
            reports.append(self._reports())

            def loss_of(out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                total, nll = out
                return total, (batch.labels != IGNORE).sum().int(), {"nll": nll}

            return out, loss_of

        found = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[self.ddp],
            num_microbatches=len(batches),
            seq_length=batches[0].layout.local_length * self.mesh.cp.size,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return [each["nll"] for each in found], reports

    def _reports(self) -> dict[str, RouterReport]:
        """What the routers of this stage said last, by the names of their layers in the built-in model."""
        said = {f"blocks.{each.layer_number - 1}.mixer": each.self_attention.report for each in self._layers}
        return {name: report for name, report in said.items() if report is not None}

    @property
    def _layers(self) -> Sequence[Any]:
        layers: Sequence[Any] = self.model.decoder.layers
        return layers

    def _of_last_stage(self, x: Tensor) -> Tensor:
        """What the last stage of the pipeline has, on every stage."""
        if self.recipe.parallel.pp > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(x, src=last, group=parallel_state.get_pipeline_model_parallel_group())
        return x

    @torch.no_grad()
    def losses(self, batch: Batch) -> Losses:
        """As in `Engine`."""
        self.ddp.eval()
        found, reports = self._run([batch], 0.0, forward_only=True)
        self.ddp.train()
        wide = torch.promote_types(self.model.config.params_dtype, torch.float32)
        nll = found[0] if found else torch.empty(batch.labels.shape, dtype=wide, device=self.device)
        nll = self._of_last_stage(nll.contiguous())
        return Losses(nll.sum(), nll, reports[0])

    def attention_schedules(self, layout: Layout, dtype: torch.dtype) -> dict[str, str]:
        """As in `Engine`."""
        chosen = {}
        for layer in self._layers:
            schedule = layer.self_attention.mixer.describe_schedule(layout, dtype)
            if schedule is not None:
                chosen[str(layer.layer_number - 1)] = schedule
        return gather_named(chosen, self.mesh.pp)

    def flops(self, layout: Layout) -> int:
        """As in `Engine`; ranks that divide a layer or the layers have an equal share each."""
        return self._built_in.flops(layout) // (self.mesh.tp.size * self.recipe.parallel.pp)

    def load_weights(self, weights: Weights) -> None:
        """As in `Engine`."""
        fill(self.model, self.mesh.tp, weights.read)
        self.optimizer.reload_model_params()

    def _state(self, *, loading: bool) -> dict[str, Any]:
        metadata = {**_RESHARDABLE, "dp_cp_group": self.mesh.tokens}
        model = self.model.sharded_state_dict(metadata=metadata)
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer}

    def _kind(self) -> dict[str, Any]:
        """What says whether an optimizer can go on with what another has saved."""
        distributed = self.options.distributed_optimizer
        precision = "any" if distributed else self.recipe.train.precision
        return {**_RESHARDABLE, "megatron.distributed_optimizer": distributed, "train.precision": precision}

    def save(self, checkpointer: Checkpointer, state: TrainerState) -> None:
        """As in `Engine`; waits until it is written."""
        checkpointer.save_with(self._write, state)

    def _write(self, folder: Path) -> None:
        dist_checkpointing.save(self._state(loading=False), str(folder), content_metadata=self._kind())

    def load(self, path: Path) -> None:
        """As in `Engine`."""
        there, here = dist_checkpointing.load_content_metadata(str(path)) or {}, self._kind()
        for key in _KINDS:
            if there.get(key) != here[key]:
                raise UserError(
                    f"checkpoint {path} is of a run with {key} = {there.get(key)}, and this one has {here[key]}: its "
                    "optimizer cannot go on. Give it as it was, or begin another run with weights made of the "
                    "checkpoint (longctx convert from-megatron, train.init)"
                )
        with moments(self.optimizer):
            wanted = self._state(loading=True)
        try:
            loaded = dist_checkpointing.load(wanted, str(path))
        except (CheckpointingException, CheckpointException) as error:
            raise UserError(f"checkpoint {path} cannot be read: {error}. {others(path, RESUME)}") from error
        self.model.load_state_dict(loaded["model"])
        load_optimizer(self.optimizer, loaded["optimizer"])

    def close(self) -> None:
        """Ends Megatron's groups, which are global."""
        parallel_state.destroy_model_parallel()


def _parallel(recipe: Recipe, device_type: str) -> Mesh:
    """Megatron's groups for a recipe, as our mesh."""
    parallel = recipe.parallel
    ulysses = [parallel.ulysses, parallel.cp // parallel.ulysses] if parallel.ulysses > 1 else None
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        hierarchical_context_parallel_sizes=ulysses,
        distributed_timeout_minutes=parallel.timeout / 60,
    )
    model_parallel_cuda_manual_seed(recipe.seed)
    levels: dict[str, Any] = {}
    if ulysses is not None:
        levels = dict(zip(("ulysses", "ring"), parallel_state.get_hierarchical_context_parallel_groups(), strict=True))
    return Mesh.of_groups(
        device_type,
        dp=parallel_state.get_data_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        tokens=parallel_state.get_data_parallel_group(with_context_parallel=True),
        **levels,
    )


def _config(recipe: Recipe, options: MegatronConfig, dtype: torch.dtype) -> Any:
    parallel, train = recipe.parallel, recipe.train
    recomputed: dict[str, Any] = {}
    if train.activation_checkpointing == "block":
        recomputed = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return transformer_config(
        recipe.model,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        sequence_parallel=options.sequence_parallel and parallel.tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        deterministic_mode=train.deterministic,
        **recomputed,
    )
