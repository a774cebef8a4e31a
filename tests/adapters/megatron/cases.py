"""A small GPT of Megatron-Core on ranks, with its gradients as one rank would have them."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from tests.adapters.megatron.shim import on_cpu

warnings.filterwarnings("ignore", module="megatron")
warnings.filterwarnings("ignore", message="Apex is not installed")

VOCABULARY, LENGTH, LAYERS = 64, 48, 4
BOUNDS = (0, 8, 32, 40, 48)
"""Documents that divide into two chunks for each of 4 ranks."""

EXPERTS = (
    ("num_moe_experts", 4),
    ("moe_router_topk", 2),
    ("moe_ffn_hidden_size", 16),
    ("moe_router_dtype", "fp64"),
    ("moe_token_dispatcher_type", "alltoall"),
    ("moe_router_load_balancing_type", "none"),
    ("moe_grouped_gemm", False),
)
"""More of the configuration, for Megatron's own experts."""


@dataclass(frozen=True)
class Run:
    """How ranks share the work, and what the model is."""

    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    packed: bool = False
    batch: int = 1
    comm: str | None = None
    levels: tuple[int, ...] | None = None
    options: tuple[tuple[str, Any], ...] = ()
    """More of the configuration."""
    own: bool = field(default=False)
    """Whether attention is Megatron's own."""

    @property
    def ranks(self) -> int:
        """Of the whole group."""
        return self.tp * self.cp

    def __str__(self) -> str:
        flags = [name for name in ("sequence_parallel", "packed") if getattr(self, name)]
        return "-".join([f"tp{self.tp}cp{self.cp}", *flags, *([self.comm] if self.comm else [])])


def config_of(run: Run, **changes: Any) -> Any:
    """Megatron's configuration, in float64."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    options = {
        "num_layers": LAYERS,
        "hidden_size": 32,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 4,
        "ffn_hidden_size": 24,
        "use_cpu_initialization": True,
        "params_dtype": torch.float64,
        "pipeline_dtype": torch.float64,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "transformer_impl": "local",
        "tensor_model_parallel_size": run.tp,
        "context_parallel_size": run.cp,
        "sequence_parallel": run.sequence_parallel,
        "cp_comm_type": run.comm,
        "hierarchical_context_parallel_sizes": list(run.levels) if run.levels else None,
        "mamba_num_groups": 4,
        "mamba_head_dim": 4,
        "mamba_state_dim": 6,
        "mamba_num_heads": 8,
    }
    return TransformerConfig(**options | dict(run.options) | changes)


def parallel(run: Run, **more: Any) -> None:
    """Megatron's groups for a run, over all ranks of the default group."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    levels = list(run.levels) if run.levels else None
    parallel_state.destroy_model_parallel()
    parallel_state._HIERARCHICAL_CONTEXT_PARALLEL_GROUPS = None  # which it leaves as they were
    parallel_state.initialize_model_parallel(
        run.tp, context_parallel_size=run.cp, hierarchical_context_parallel_sizes=levels, **more
    )
    torch.manual_seed(5)
    model_parallel_cuda_manual_seed(5)


def gpt(
    run: Run,
    spec: Any,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    **changes: Any,
) -> Any:
    """The model, or a pipeline stage of it; the same weights for every run."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    from longctx.adapters.megatron.specs import block_spec

    config = config_of(run, **changes)
    chosen = get_gpt_layer_local_spec(normalization="RMSNorm") if run.own else block_spec(spec, config, vp_stage)
    torch.manual_seed(7)
    return GPTModel(
        config,
        chosen,
        VOCABULARY,
        LENGTH,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        parallel_output=False,
        vp_stage=vp_stage,
    ).to(torch.bfloat16 if config.bf16 else torch.float64)


def tokens(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels of the whole sequence, `[batch, LENGTH]`."""
    generator = torch.Generator().manual_seed(1)
    x, labels = (torch.randint(0, VOCABULARY, (batch, LENGTH), generator=generator) for _ in range(2))
    return x, labels


def rows_of(run: Run, rank: int) -> torch.Tensor:
    """The tokens that Megatron gives a context-parallel rank."""
    bounds = BOUNDS if run.packed else (0, LENGTH)
    parts = []
    for begin, end in pairwise(bounds):
        chunks = torch.arange(begin, end).chunk(2 * run.cp) if run.cp > 1 else [torch.arange(begin, end)]
        parts += [chunks[rank], chunks[2 * run.cp - 1 - rank]] if run.cp > 1 else chunks
    return torch.cat(parts)


def packed_params(run: Run) -> Any:
    """The documents of a packed batch, as Megatron tells them."""
    from megatron.core.packed_seq_params import PackedSeqParams

    if not run.packed:
        return None
    cu = torch.tensor(BOUNDS, dtype=torch.int32)
    longest = int(cu.diff().max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def losses(run: Run, model: Any) -> torch.Tensor:
    """The losses of this rank's tokens, `[batch, LENGTH / cp]`."""
    from megatron.core import parallel_state

    rows = rows_of(run, parallel_state.get_context_parallel_rank())
    x, labels = (each[:, rows] for each in tokens(run.batch))
    mask = None
    if run.own and not run.packed:
        mask = torch.ones(1, 1, LENGTH, LENGTH).tril() < 0.5
    logits = model(x, rows[None].expand(run.batch, -1), mask, packed_seq_params=packed_params(run))
    # Megatron's own loss is in float32.
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


@dataclass
class Answer:
    """What one rank has."""

    tp: int
    cp: int
    losses: torch.Tensor
    gradients: dict[str, torch.Tensor]
    divided: dict[str, Any]
    """How tensor-parallel ranks divide a parameter: a Share, or a dim; nothing where each has all of it."""


def trained(runs: list[Run], spec: Any, around: Callable[[Any], None] | None = None) -> list[Answer]:
    """Forward and backward of each run, on every rank."""
    from megatron.core import parallel_state

    from longctx.adapters.megatron.mixer import TokenMixer

    answers = []
    with on_cpu():
        for run in runs:
            parallel(run)
            model = gpt(run, spec)
            if around is not None:
                around(model)
            found = losses(run, model)
            # As its schedules and its data parallelism do: times cp, and then the mean over those ranks.
            (found.sum() * run.cp / (run.batch * LENGTH)).backward()
            divided = {}
            for name, module in model.named_modules():
                if isinstance(module, TokenMixer):
                    divided |= {f"{name}.mixer.{each}": share for each, share in module.shares.items()}
            for name, p in model.named_parameters():
                if getattr(p, "tensor_model_parallel", False) and name not in divided:
                    divided[name] = p.partition_dim
                if run.sequence_parallel and getattr(p, "sequence_parallel", False):
                    dist.all_reduce(p.grad, group=parallel_state.get_tensor_model_parallel_group())
            answers.append(
                Answer(
                    parallel_state.get_tensor_model_parallel_rank(),
                    parallel_state.get_context_parallel_rank(),
                    found.detach(),
                    {name: p.grad for name, p in model.named_parameters()},
                    divided,
                )
            )
            parallel_state.destroy_model_parallel()
    return answers


def gathered(run: Run, answers: list[Answer]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The losses of all tokens, and the gradients of the whole parameters."""
    found = torch.zeros(run.batch, LENGTH, dtype=torch.float64)
    for answer in answers:
        if answer.tp == 0:
            found[:, rows_of(run, answer.cp)] = answer.losses
    gradients = {}
    for name in answers[0].gradients:
        each = [sum(a.gradients[name] for a in answers if a.tp == rank) / run.cp for rank in range(run.tp)]
        how = answers[0].divided.get(name) if run.tp > 1 else None
        if how is None:
            gradients[name] = each[0]
        else:
            gradients[name] = torch.cat(each, how) if isinstance(how, int) else how.join(each)
    return found, gradients
