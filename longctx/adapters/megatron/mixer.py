"""longctx mixers as Megatron's `self_attention`: tensor parallel over heads, context parallel over the sequence.

A tensor-parallel rank holds its shard of the mixer's heads (`longctx.mixers.tensor_parallel`). With Megatron's sequence
parallelism the input is all-gathered and the output reduce-scattered. Megatron's zigzag batches and packed sequences
(THD) are accepted as they are. The projections are the mixer's own: it projects first what is sent to other ranks, and
in a mixture of heads only active heads.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from longctx.adapters.megatron.checkpoints import mixer_sharded_state_dict
from longctx.adapters.megatron.layouts import Groups, LayoutPackedSeqParams, attention_schedule, batch_layout
from longctx.adapters.megatron.losses import attach_auxiliary_loss, auxiliary_loss_scale
from longctx.adapters.megatron.optimizers import fix_bucket_padding, fix_mixed_dtype_groups
from longctx.layers.basic import Linear
from longctx.layers.output import Output
from longctx.mixers import MIXERS, Cache, Mixer, MixerConfig
from longctx.mixers.head_mixture import HeadMixtureConfig
from longctx.mixers.tensor_parallel import head_shares, shard_heads
from longctx.moe.report import RouterReport
from longctx.parallel.collectives import all_reduce
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Axis


def default_mixer(letter: str, config: TransformerConfig) -> MixerConfig:
    """Return the mixer config of a letter of `model.layers`, with the head count and width of Megatron's attention.

    Mamba-2 takes Megatron's `mamba_num_heads`, `mamba_head_dim`, `mamba_state_dim` and `mamba_num_groups`. Raises
    ValueError for an unknown letter.
    """
    if letter not in MIXERS:
        raise ValueError(f"pattern: unknown mixer {letter!r}: expected one of {', '.join(sorted(MIXERS))}")
    kind = MIXERS[letter]
    options = {"heads": config.num_attention_heads, "head_dim": config.kv_channels}
    if letter == "M":
        options = {
            "heads": config.mamba_num_heads or 2 * config.hidden_size // config.mamba_head_dim,
            "head_dim": config.mamba_head_dim,
            "state_dim": config.mamba_state_dim,
            "groups": config.mamba_num_groups,
        }
    elif "kv_heads" in kind.model_fields:
        options["kv_heads"] = config.num_query_groups
    return kind.model_validate(options)


class TokenMixer(MegatronModule):  # type: ignore[misc]
    """A longctx mixer as `self_attention` of `TransformerLayerSubmodules`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        mixer: MixerConfig | str,
        heads: HeadMixtureConfig | None = None,
        attn_mask_type: Any = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **newer: Any,
    ) -> None:
        """`mixer`: its config, or its letter (`default_mixer`). `heads`: a mixture of its heads; None: all heads are
        active. `layer_number` counts from 1 over all pipeline stages.

        Raises ValueError if heads are not divisible by the tensor-parallel ranks.
        """
        del attn_mask_type, newer  # every mixer is causal
        super().__init__(config=config)
        fix_bucket_padding()
        self.groups, self.layer_number = Groups.from_collection(config, pg_collection), layer_number
        table = default_mixer(mixer, config) if isinstance(mixer, str) else mixer
        self.schedule = attention_schedule(cp_comm_type)
        self.report: RouterReport | None = None
        """The report of the mixer's head router, if it has one, for the latest batch."""
        with torch.device("cpu"):
            self.mixer = table.build(config.hidden_size, layer_number - 1, config.num_layers, config.layernorm_epsilon)
            if heads is not None:
                _add_head_router(self.mixer, table, heads, config.hidden_size)
            self.mixer.to(torch.promote_types(config.params_dtype, torch.float32))
            if config.perform_initialization:
                init_weights(self.mixer, config)
        self._shard_heads(self.groups.tp)
        self.to(config.params_dtype)
        if not config.use_cpu_initialization:
            self.to(torch.cuda.current_device())

    def _shard_heads(self, tp: Axis) -> None:
        self.shares = head_shares(self.mixer)
        """Tensor-parallel shards of the parameters, with full lengths."""
        shard_heads(self.mixer, tp)
        if tp.size == 1:
            return
        for name, parameter in self.mixer.named_parameters():
            if name in self.shares:
                set_tensor_model_parallel_attributes(parameter, True, self.shares[name].dim, 1)
            else:
                # A replicated parameter's gradient has only the contribution of this rank's heads.
                parameter.register_hook(lambda grad: all_reduce(grad.contiguous(), tp.group))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TokenMixer":
        """`nn.Module._apply`, except that decays and routers stay in float32 when the model is cast to half precision:
        a rounded decay is another decay rate."""
        values = [(module, name, x.detach().clone()) for module, name, x in self._full_precision_tensors()]
        super()._apply(fn, recurse)
        for module, name, value in values:
            tensor = getattr(module, name)
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.data = value.to(tensor.device)
                fix_mixed_dtype_groups()
        return self

    def _full_precision_tensors(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Yield the parameters and buffers that stay in float32."""
        for module in self.mixer.modules():
            buffers = module.named_buffers(recurse=False)
            parameters = module.named_parameters(recurse=False) if getattr(module, "full_precision", False) else ()
            for name, tensor in (*buffers, *parameters):
                if tensor.is_floating_point():
                    yield module, name, tensor

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        attention_bias: Tensor | None = None,
        inference_params: Any = None,
        **positions: Any,
    ) -> tuple[Tensor, None]:
        """Compute the mixer, `[s, b, h]` to the same, and no bias; s is sharded over cp, and over tp with sequence
        parallelism.

        Positions come from the layout, so Megatron's rotary tables are ignored. Raises ValueError for dynamic-batching
        inference, and for an attention bias.
        """
        del attention_mask, positions  # causal within documents
        if attention_bias is not None:
            raise ValueError("attention_bias: not supported")
        tp, context = self.groups.tp, inference_context or inference_params
        if self.config.sequence_parallel and tp.size > 1:
            x = gather_from_sequence_parallel_region(hidden_states, group=tp.group)
        elif tp.size > 1:
            x = copy_to_tensor_model_parallel_region(hidden_states, group=tp.group)
        else:
            x = hidden_states
        x = x.transpose(0, 1)
        out = self._over_ranks(x, packed_seq_params) if context is None else self._decode(x, context)
        out = out.transpose(0, 1).contiguous()
        if self.config.sequence_parallel and tp.size > 1:
            out = reduce_scatter_to_sequence_parallel_region(out, group=tp.group)
        elif tp.size > 1:
            out = reduce_from_tensor_model_parallel_region(out, group=tp.group)
        return out, None

    def _over_ranks(self, x: Tensor, packed: PackedSeqParams | None) -> Tensor:
        batch = batch_layout(x.shape[1], packed, self.groups, self.schedule)
        (x,) = batch.to_layout(x)
        mixed = Output.of(self.mixer(x, batch.layout))
        out, report = batch.to_megatron(mixed.out), mixed.report
        if report is None:
            return out
        self.report = report._replace(loss=report.loss.detach())
        if not self.training:
            return out
        if isinstance(packed, LayoutPackedSeqParams):
            factor = packed.auxiliary_loss_scale
        else:
            factor = auxiliary_loss_scale(self.config, self.groups.cp.size, batch.layout.length * len(x))
        return attach_auxiliary_loss(out, report.loss, self.config, factor)

    def _decode(self, x: Tensor, context: Any) -> Tensor:
        """Compute the next tokens (prefill or decode) of a static inference context, which holds the layers' caches."""
        if not context.is_static_batching() or self.groups.cp.size > 1:
            raise ValueError("inference: mixers support only static batching, on one context-parallel rank")
        caches: dict[int, Cache] = context.__dict__.setdefault("_longctx_caches", {})
        if context.sequence_len_offset == 0:
            caches[self.layer_number] = self.mixer.new_cache()
        cache = caches[self.layer_number]
        layout = Layout((0, x.shape[1]), past_tokens=cache.tokens)
        with torch.no_grad():
            return Output.of(self.mixer(x, layout, cache)).out

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return every parameter, fused ones by projection, so that it loads with any parallel sizes."""
        return mixer_sharded_state_dict(
            self.mixer, self.shares, f"{prefix}mixer.", sharded_offsets, metadata, self.groups.tp
        )


def _add_head_router(mixer: Mixer, config: MixerConfig, heads: HeadMixtureConfig, dim: int) -> None:
    routable = config.routable()
    if routable is None:
        raise ValueError(f"heads: {config.name} does not support routed heads")
    problems = heads.problems(config.name, *routable)
    if problems:
        raise ValueError("heads: " + "; ".join(problems))
    mixer.add_head_router(heads, dim, routable[0])


@torch.no_grad()
def init_weights(mixer: Mixer, config: TransformerConfig) -> None:
    """Initialise matrices by Megatron's `init_method` and `output_layer_init_method`; decays, convolutions and norms
    keep longctx's initialisation.

    Full matrices, before sharding, from the random generator that has the same state on all tensor-parallel ranks.
    """
    for name, module in mixer.named_modules():
        if isinstance(module, Linear):
            method = config.output_layer_init_method if name == "out" else config.init_method
            method(module.weight)
        elif getattr(module, "init_std", None) is not None:
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=config.init_method_std)
