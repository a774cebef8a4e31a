"""Every mixer of longctx as Megatron's `self_attention`: tensor parallel over heads, over context-parallel ranks.

A rank has the mixer's heads for its place in the tensor-parallel group (`longctx.mixers.tensor_parallel`), takes the
sequence whole from Megatron's sequence parallelism, if that is on, and gives it back in slices. Megatron's zigzag batch
is taken as it comes, and so are packed batches. The projections are the mixer's own: it projects what is sent to other
ranks first, and of a mixture of heads only what is read.
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

from longctx.adapters.megatron.checkpoints import sharded
from longctx.adapters.megatron.layouts import Groups, LayoutBatch, attention_schedule, placed
from longctx.adapters.megatron.losses import attach, mean_over_batches
from longctx.adapters.megatron.optimizers import count_both_dtypes
from longctx.layers.basic import Linear
from longctx.layers.output import Output
from longctx.mixers import MIXERS, Cache, Mixer, MixerConfig
from longctx.mixers.head_mixture import HeadsMixConfig
from longctx.mixers.tensor_parallel import divide, divisions
from longctx.moe.report import RouterReport
from longctx.parallel.collectives import all_reduce
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Axis


def default_mixer(letter: str, config: TransformerConfig) -> MixerConfig:
    """The mixer of a letter of `model.layers` with as many heads, of the same width, as Megatron's attention has; a
    Mamba-2 layer as Megatron's own (`mamba_num_heads`, `mamba_head_dim`, `mamba_state_dim`, `mamba_num_groups`).

    Raises ValueError where there is no such letter.
    """
    if letter not in MIXERS:
        raise ValueError(f"pattern: there is no mixer {letter!r}; there are {', '.join(sorted(MIXERS))}")
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
    """A mixer in the place of `self_attention` in `TransformerLayerSubmodules`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        mixer: MixerConfig | str,
        heads: HeadsMixConfig | None = None,
        attn_mask_type: Any = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **newer: Any,
    ) -> None:
        """`mixer`: its configuration, or its letter (`default_mixer`); `heads`: which of its heads a token reads, all
        where None. `layer_number` counts from 1 over all pipeline stages.

        Raises ValueError where heads do not divide over the tensor-parallel ranks.
        """
        del attn_mask_type, newer  # every mixer is causal
        super().__init__(config=config)
        self.groups, self.layer_number = Groups.of(config, pg_collection), layer_number
        chosen = default_mixer(mixer, config) if isinstance(mixer, str) else mixer
        self.schedule = attention_schedule(cp_comm_type)
        self.report: RouterReport | None = None
        """What the mixer's router, if it has one, said of the last batch."""
        with torch.device("cpu"):
            self.mixer = chosen.build(config.hidden_size, layer_number - 1, config.num_layers, config.layernorm_epsilon)
            if heads is not None:
                _route(self.mixer, chosen, heads, config.hidden_size)
            self.mixer.to(torch.promote_types(config.params_dtype, torch.float32))
            if config.perform_initialization:
                initialise(self.mixer, config)
        self._divide(self.groups.tp)
        self.to(config.params_dtype)
        if not config.use_cpu_initialization:
            self.to(torch.cuda.current_device())

    def _divide(self, tp: Axis) -> None:
        self.shares = divisions(self.mixer)
        """How heads divide parameters, with the lengths of all ranks together."""
        divide(self.mixer, tp)
        if tp.size == 1:
            return
        for name, parameter in self.mixer.named_parameters():
            if name in self.shares:
                set_tensor_model_parallel_attributes(parameter, True, self.shares[name].dim, 1)
            else:
                # Each rank's gradient is that of its own heads.
                parameter.register_hook(lambda grad: all_reduce(grad.contiguous(), tp.group))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TokenMixer":
        """As in every module, but that decays and routers stay in float32 where a model becomes one of half precision:
        a rounded decay is another rate of forgetting."""
        kept = [(module, name, x.detach().clone()) for module, name, x in self._exact()]
        super()._apply(fn, recurse)
        for module, name, value in kept:
            now = getattr(module, name)
            if now.dtype in (torch.bfloat16, torch.float16):
                now.data = value.to(now.device)
                count_both_dtypes()
        return self

    def _exact(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Parameters and buffers that half precision would change the meaning of."""
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
        """`[s, b, h]` to the same and no bias; s is a rank's part, over tp too under sequence parallelism.

        Positions are the mixer's own (of the layout), so Megatron's rotary tables are not read. Raises ValueError for
        inference by dynamic batches, and for an attention bias.
        """
        del attention_mask, positions  # causal, within documents
        if attention_bias is not None:
            raise ValueError("attention_bias: a mixer takes none")
        tp, context = self.groups.tp, inference_context or inference_params
        if self.config.sequence_parallel and tp.size > 1:
            x = gather_from_sequence_parallel_region(hidden_states, group=tp.group)
        elif tp.size > 1:
            x = copy_to_tensor_model_parallel_region(hidden_states, group=tp.group)
        else:
            x = hidden_states
        x = x.transpose(0, 1)
        out = self._train(x, packed_seq_params) if context is None else self._generate(x, context)
        out = out.transpose(0, 1).contiguous()
        if self.config.sequence_parallel and tp.size > 1:
            out = reduce_scatter_to_sequence_parallel_region(out, group=tp.group)
        elif tp.size > 1:
            out = reduce_from_tensor_model_parallel_region(out, group=tp.group)
        return out, None

    def _train(self, x: Tensor, packed: PackedSeqParams | None) -> Tensor:
        where = placed(x.shape[1], packed, self.groups, self.schedule)
        (x,) = where.taken(x)
        mixed = Output.of(self.mixer(x, where.layout))
        out, report = where.given(mixed.out), mixed.report
        if report is None:
            return out
        self.report = report._replace(loss=report.loss.detach())
        if not self.training:
            return out
        if isinstance(packed, LayoutBatch):
            factor = packed.weight
        else:
            factor = mean_over_batches(self.config, self.groups.cp.size, where.layout.length * len(x))
        return attach(out, report.loss, self.config, factor)

    def _generate(self, x: Tensor, context: Any) -> Tensor:
        """The next tokens of the documents of a static inference context, which holds what layers remember."""
        if not context.is_static_batching() or self.groups.cp.size > 1:
            raise ValueError("inference: a mixer generates by static batches on one context-parallel rank")
        held: dict[int, Cache] = context.__dict__.setdefault("_longctx_memories", {})
        if context.sequence_len_offset == 0:
            held[self.layer_number] = self.mixer.new_cache()
        cache = held[self.layer_number]
        layout = Layout((0, x.shape[1]), past_tokens=cache.tokens)
        with torch.no_grad():
            return Output.of(self.mixer(x, layout, cache)).out

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Every parameter, those that heads divide part by part, so that it loads on any number of ranks."""
        return sharded(self.mixer, self.shares, f"{prefix}mixer.", sharded_offsets, metadata, self.groups.tp)


def _route(mixer: Mixer, config: MixerConfig, heads: HeadsMixConfig, dim: int) -> None:
    routable = config.routable()
    if routable is None:
        raise ValueError(f"heads: those of {config.name} cannot be routed")
    problems = heads.problems(config.name, *routable)
    if problems:
        raise ValueError("heads: " + "; ".join(problems))
    mixer.mix_heads(heads, dim, routable[0])


@torch.no_grad()
def initialise(mixer: Mixer, config: TransformerConfig) -> None:
    """Matrices by `init_method` and `output_layer_init_method`, whole, from the generator that all tensor-parallel
    ranks have alike; decays, convolutions and norms as longctx begins them."""
    for name, module in mixer.named_modules():
        if isinstance(module, Linear):
            method = config.output_layer_init_method if name == "out" else config.init_method
            method(module.weight)
        elif getattr(module, "init_std", None) is not None:
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=config.init_method_std)
