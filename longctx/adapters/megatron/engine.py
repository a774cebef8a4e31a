"""Megatron engine (`engine = "megatron"` in a recipe): Megatron-Core's model, parallelism, optimizer and checkpoints.

Data, layouts, mixers and the tiled loss are longctx's, so a step is that of the torch engine: gradients are summed over
ranks and divided by the number of labels of the whole step (Megatron's `calculate_per_token_loss`).
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

from longctx.adapters.megatron.language_model import build_language_model, transformer_config
from longctx.adapters.megatron.layouts import LayoutPackedSeqParams
from longctx.adapters.megatron.optimizers import initialized_moments, load_optimizer
from longctx.adapters.megatron.weights import mark_tensor_parallel, set_parameters
from longctx.checkpoint.read import RESUME, suggest_alternative
from longctx.checkpoint.restricted import check_entries
from longctx.checkpoint.save import Checkpointer
from longctx.checkpoint.trainer_state import TrainerState
from longctx.checkpoint.weights import Weights
from longctx.engines.base import Batch, StepResult
from longctx.engines.router_stats import ONE_STAGE, RouterStats
from longctx.errors import UserError
from longctx.kernels.loss import IGNORE
from longctx.layers.router import Router
from longctx.mixers.head_mixture import HeadRouter
from longctx.model.decoder import Decoder, Losses
from longctx.model.initialise import initial_value
from longctx.moe.report import RouterReport
from longctx.parallel.attention.cost_model import ScheduleChoice
from longctx.parallel.collectives import all_gather_dict, all_reduce
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh
from longctx.recipe import Recipe
from longctx.recipe.tables import MegatronConfig

_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Format of a distributed optimizer's checkpoint that loads with any number of ranks."""
_FIXED_KEYS = ("megatron.distributed_optimizer", "train.precision")
"""Recipe keys that a resumed run cannot change."""


class MegatronEngine:
    """`longctx.engines.base.Engine` with Megatron-Core."""

    startup_messages: Sequence[str] = ()

    def __init__(self, recipe: Recipe, device_type: str, vocab_size: int, dtype: torch.dtype = torch.float32) -> None:
        """Build the model over the ranks of the default process group, on `cpu` or `cuda`. `dtype`: of the parameters
        with precision fp32; float64 for verification.

        Raises UserError if CUDA is missing, Megatron's device is another than the ranks', or the vocabulary is not
        divisible by tp.
        """
        try:
            device = torch.cuda.current_device()
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"engine: 'megatron' needs GPUs: Megatron-Core calls CUDA, and this machine has none ({error}); "
                "engine = 'torch' also trains on CPUs"
            ) from error
        self.device = torch.device(device)
        if self.device.type != device_type:
            raise UserError(
                f"train.device: engine = 'megatron' computes on {self.device.type}, but the ranks on {device_type}: "
                "set train.device = 'cuda', with one GPU per rank of a machine"
            )
        self.recipe, self.options = recipe, recipe.megatron or MegatronConfig()
        if vocab_size % recipe.parallel.tp:
            raise UserError(
                f"parallel.tp: a vocabulary of {vocab_size} rows is not divisible by {recipe.parallel.tp} ranks: set "
                "model.vocab_size to a multiple"
            )
        self.mesh = _build_mesh(recipe, self.device.type)
        with torch.device("meta"):
            self._meta_model = Decoder(recipe.model, vocab_size)
        has_routers = any(isinstance(module, HeadRouter | Router) for module in self._meta_model.modules())
        self._router_stages = self.mesh.pp if has_routers else ONE_STAGE
        bf16 = recipe.train.precision == "bf16"
        config = _transformer_config(recipe, self.options, torch.bfloat16 if bf16 else dtype)
        self.model = build_language_model(
            recipe.model,
            vocab_size,
            recipe.data.sequence_length,
            config,
            first=parallel_state.is_pipeline_first_stage(),
            last=parallel_state.is_pipeline_last_stage(),
        ).to(self.device)
        self.model.loss_tile = recipe.train.loss_tile
        mark_tensor_parallel(self.model, self.mesh.tp.size)
        set_parameters(self.model, self.mesh.tp, lambda name: initial_value(self._meta_model, name, recipe.seed))
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
            # The norm is also reported without clipping.
            clip_grad=math.inf if clip == "none" else clip,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            use_distributed_optimizer=self.options.distributed_optimizer,
        )

    @property
    def parameters(self) -> int:
        """As in `Engine`."""
        return sum(p.numel() for p in self._meta_model.parameters())

    def step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """As in `Engine`."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        labels = self._sum_over_tokens(sum(int((batch.labels != IGNORE).sum()) for batch in batches))
        sequences = self.mesh.dp.size * sum(len(batch.tokens) for batch in batches)
        # Megatron divides all gradients by the labels; auxiliary losses are means over sequences.
        nlls, reports = self._run(batches, float(labels.clamp(min=1)) / sequences, forward_only=False)
        loss = self._broadcast_from_last_stage(self._sum_over_tokens(sum(float(nll.double().sum()) for nll in nlls)))
        router_stats = RouterStats()
        for batch_reports in reports:
            router_stats.add(batch_reports)
        router_stats.sum_over_ranks(self.device, self.mesh.tokens, self._router_stages)
        router_stats.check_finite()
        for group in self.optimizer.param_groups:
            # As Megatron's `OptimizerParamScheduler`.
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.recipe.optimizer.weight_decay * group.get("wd_mult", 1.0)
        _, norm, _ = self.optimizer.step()
        return StepResult(float(loss / labels.clamp(min=1)), float(norm), router_stats)

    def _sum_over_tokens(self, x: float) -> Tensor:
        """Sum over the ranks that hold the tokens of a step, dp x cp."""
        return all_reduce(torch.tensor(x, dtype=torch.float64, device=self.device), self.mesh.tokens)

    def _run(
        self, batches: Sequence[Batch], auxiliary_loss_scale: float, *, forward_only: bool
    ) -> tuple[list[Tensor], list[dict[str, RouterReport]]]:
        """Run Megatron's pipeline schedule over a step's micro-batches.

        Returns the negative log likelihoods of each micro-batch's tokens (on the last stage) and the reports of this
        stage's routers per micro-batch. `auxiliary_loss_scale`: factor of the routers' losses per sequence.
        """
        reports: list[dict[str, RouterReport]] = []

        def forward_step(batches: Iterator[Batch], model: Any) -> Any:
            batch = next(batches)
            packed = LayoutPackedSeqParams(batch.layout, auxiliary_loss_scale * len(batch.tokens))
            out = model(batch.tokens, None, None, labels=batch.labels, packed_seq_params=packed)
            reports.append(self._reports())

            def loss_func(out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                total, nll = out
                return total, (batch.labels != IGNORE).sum().int(), {"nll": nll}

            return out, loss_func

        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[self.ddp],
            num_microbatches=len(batches),
            seq_length=batches[0].layout.local_length * self.mesh.cp.size,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return [result["nll"] for result in results], reports

    def _reports(self) -> dict[str, RouterReport]:
        """Return the latest reports of this stage's routers, by layer name in the built-in model."""
        reports = {f"blocks.{layer.layer_number - 1}.mixer": layer.self_attention.report for layer in self._layers}
        return {name: report for name, report in reports.items() if report is not None}

    @property
    def _layers(self) -> Sequence[Any]:
        layers: Sequence[Any] = self.model.decoder.layers
        return layers

    def _broadcast_from_last_stage(self, x: Tensor) -> Tensor:
        """Return the last pipeline stage's `x` on every stage."""
        if self.recipe.parallel.pp > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(x, src=last, group=parallel_state.get_pipeline_model_parallel_group())
        return x

    @torch.no_grad()
    def losses(self, batch: Batch) -> Losses:
        """As in `Engine`."""
        self.ddp.eval()
        nlls, reports = self._run([batch], 0.0, forward_only=True)
        self.ddp.train()
        wide = torch.promote_types(self.model.config.params_dtype, torch.float32)
        nll = nlls[0] if nlls else torch.empty(batch.labels.shape, dtype=wide, device=self.device)
        nll = self._broadcast_from_last_stage(nll.contiguous())
        return Losses(nll.sum(), nll, reports[0])

    def attention_schedules(self, layout: Layout, dtype: torch.dtype) -> dict[str, ScheduleChoice]:
        """As in `Engine`."""
        schedules: dict[str, ScheduleChoice] = {}
        for layer in self._layers:
            schedule = layer.self_attention.mixer.describe_schedule(layout, dtype)
            if schedule is not None:
                schedules[str(layer.layer_number - 1)] = schedule
        return all_gather_dict(schedules, self.mesh.pp)

    def flops(self, layout: Layout) -> int:
        """As in `Engine`; tensor-parallel ranks and pipeline stages have equal shares."""
        return self._meta_model.flops(layout) // (self.mesh.tp.size * self.recipe.parallel.pp)

    def load_weights(self, weights: Weights) -> None:
        """As in `Engine`."""
        set_parameters(self.model, self.mesh.tp, weights.read)
        self.optimizer.reload_model_params()

    def _sharded_state_dict(self, *, loading: bool) -> dict[str, Any]:
        metadata = {**_RESHARDABLE, "dp_cp_group": self.mesh.tokens}
        model = self.model.sharded_state_dict(metadata=metadata)
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer}

    def _content_metadata(self) -> dict[str, Any]:
        """Return the checkpoint metadata that has to match for the optimizer state to load."""
        distributed = self.options.distributed_optimizer
        precision = "any" if distributed else self.recipe.train.precision
        return {**_RESHARDABLE, "megatron.distributed_optimizer": distributed, "train.precision": precision}

    def save(self, checkpointer: Checkpointer, state: TrainerState) -> None:
        """As in `Engine`; blocks until it is written."""
        checkpointer.save_with(self._write, state)

    def _write(self, folder: Path) -> None:
        state_dict = self._sharded_state_dict(loading=False)
        dist_checkpointing.save(state_dict, str(folder), content_metadata=self._content_metadata())

    def load(self, path: Path) -> None:
        """As in `Engine`."""
        try:
            check_entries(path)
        except UserError as error:
            advice = suggest_alternative(path, RESUME)
            raise UserError(f"checkpoint {path} cannot be read: {error}. {advice}") from error
        saved, own = dist_checkpointing.load_content_metadata(str(path)) or {}, self._content_metadata()
        for key in _FIXED_KEYS:
            if saved.get(key) != own[key]:
                raise UserError(
                    f"checkpoint {path} is from a run with {key} = {saved.get(key)}, but this run has {own[key]}: the "
                    "optimizer state cannot be loaded. Restore the key, or start another run from the checkpoint's "
                    "weights (longctx convert from-megatron, train.init)"
                )
        with initialized_moments(self.optimizer):
            state_dict = self._sharded_state_dict(loading=True)
        try:
            loaded = dist_checkpointing.load(state_dict, str(path))
        except (CheckpointingException, CheckpointException) as error:
            advice = suggest_alternative(path, RESUME)
            raise UserError(f"checkpoint {path} cannot be read: {error}. {advice}") from error
        self.model.load_state_dict(loaded["model"])
        load_optimizer(self.optimizer, loaded["optimizer"])
        for group in self.optimizer.param_groups:
            # The checkpoint's replaced the recipe's; lr and weight_decay are set at each step.
            group["betas"], group["eps"] = self.recipe.optimizer.betas, self.recipe.optimizer.eps

    def close(self) -> None:
        """Destroy Megatron's process groups, which are global."""
        parallel_state.destroy_model_parallel()


def _build_mesh(recipe: Recipe, device_type: str) -> Mesh:
    """Initialise Megatron's process groups for a recipe and return them as a mesh."""
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
    return Mesh.from_groups(
        device_type,
        dp=parallel_state.get_data_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        tokens=parallel_state.get_data_parallel_group(with_context_parallel=True),
        **levels,
    )


def _transformer_config(recipe: Recipe, options: MegatronConfig, dtype: torch.dtype) -> Any:
    parallel, train = recipe.parallel, recipe.train
    recompute: dict[str, Any] = {}
    if train.activation_checkpointing == "block":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
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
        **recompute,
    )
