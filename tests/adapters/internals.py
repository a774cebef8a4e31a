"""Canaries for internals of the adapters' frameworks, by name (what a canary is: `tests/packaging/internals.py`).

Nothing here imports a framework before a canary runs: the tests of packaging read the names without them.
"""

from enum import Enum
from typing import Any

from tests.packaging.internals import Canary, begins, each, exists, has, holds, needs_nothing, sets, takes

CORE = "megatron.core"
STATE = f"{CORE}.parallel_state"
MAPPINGS = f"{CORE}.tensor_parallel.mappings"
LAYER = f"{CORE}.transformer.transformer_layer"
UTILS = "deepspeed.utils"
ZERO = "deepspeed.runtime.zero"
MODELS = "transformers.models"

_GROUPS = "take Megatron's process groups as a mesh"
_SHARDS = "save sharded parameters under names of their own"
_REGIONS = "pass hidden states between sequence- and tensor-parallel ranks"
_STATES = "read and write one full tensor of ZeRO's state"


def is_none_before_training(calculator: Any) -> None:
    assert calculator is None or hasattr(calculator, "get")


def is_an_enumeration_with(*names: str) -> Any:
    def check(found: Any) -> None:
        assert issubclass(found, Enum)
        has(*names)(found)

    return check


def is_a_table_of_operators(table: Any) -> None:
    assert isinstance(table["deepspeed_shm_comm"], bool)


MEGATRON = {
    f"{CORE}.dist_checkpointing.save": Canary(
        "write Megatron's checkpoints", each(begins("sharded_state_dict", "checkpoint_dir"), takes("content_metadata"))
    ),
    f"{CORE}.dist_checkpointing.load": Canary(
        "read Megatron's checkpoints", begins("sharded_state_dict", "checkpoint_dir")
    ),
    f"{CORE}.dist_checkpointing.load_content_metadata": Canary(
        "refuse checkpoints of other settings", begins("checkpoint_dir")
    ),
    f"{CORE}.dist_checkpointing.core.CheckpointingException": Canary("report what cannot be read", exists),
    f"{CORE}.dist_checkpointing.mapping.ShardedTensor": Canary(
        _SHARDS,
        lambda found: each(begins("key", "data", "rank_offsets"), takes("replica_id", "prepend_axis_num"))(
            found.from_rank_offsets
        ),
    ),
    f"{CORE}.dist_checkpointing.mapping.ShardedTensorFactory": Canary(
        _SHARDS, begins("key", "data", "build_fn", "merge_fn", "replica_id")
    ),
    f"{CORE}.distributed.DistributedDataParallel": Canary(
        "reduce gradients", each(begins("config", "ddp_config", "module"), has("zero_grad_buffer"))
    ),
    f"{CORE}.distributed.DistributedDataParallelConfig": Canary(
        "reduce gradients in float32", takes("grad_reduce_in_fp32", "use_distributed_optimizer")
    ),
    f"{CORE}.distributed.finalize_model_grads": Canary("divide gradients by the labels", begins("model", "num_tokens")),
    f"{CORE}.extensions.transformer_engine.TENorm": Canary(
        "norm the input of a mixer under TransformerEngine", begins("config", "hidden_size", "eps")
    ),
    f"{CORE}.models.gpt.gpt_layer_specs.get_gpt_layer_local_spec": Canary(
        "begin with Megatron's own layer", takes("num_experts", "moe_grouped_gemm", "qk_layernorm", "normalization")
    ),
    f"{CORE}.models.gpt.gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec": Canary(
        "begin with TransformerEngine's layer", takes("num_experts", "moe_grouped_gemm", "qk_layernorm")
    ),
    f"{CORE}.models.gpt.gpt_model.GPTModel": Canary(
        "build the model of a recipe",
        each(takes("config", "transformer_layer_spec", "vocab_size", "pre_process", "post_process"), has("forward")),
    ),
    f"{CORE}.num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR": Canary(
        "know whether a script of Megatron's has set the micro-batches of a step", is_none_before_training
    ),
    f"{CORE}.num_microbatches_calculator.get_num_microbatches": Canary(
        "average auxiliary losses over micro-batches", needs_nothing
    ),
    f"{CORE}.optimizer.OptimizerConfig": Canary(
        "set up Adam",
        takes("optimizer", "lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad", "params_dtype"),
    ),
    f"{CORE}.optimizer.get_megatron_optimizer": Canary("set up Adam", begins("config", "model_chunks")),
    f"{CORE}.optimizer.distrib_optimizer.DistributedOptimizer": Canary(
        "number parameters of two dtypes", each(sets("model_fp32_groups"), sets("model_param_group_index_map"))
    ),
    f"{CORE}.optimizer.distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states": Canary(
        "keep the step count when a checkpoint is loaded", begins("model_param", "tensors")
    ),
    f"{CORE}.optimizer.optimizer.Float16OptimizerWithFloat16Params": Canary(
        "refuse to save parameters of two dtypes", each(has("sharded_state_dict"), sets("fp32_from_fp32_groups"))
    ),
    f"{CORE}.packed_seq_params.PackedSeqParams": Canary(
        "read the documents of a batch", holds("qkv_format", "cu_seqlens_q", "cu_seqlens_q_padded", "local_cp_size")
    ),
    f"{STATE}.initialize_model_parallel": Canary(
        "make Megatron's process groups for a recipe",
        takes(
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "hierarchical_context_parallel_sizes",
            "distributed_timeout_minutes",
        ),
    ),
    f"{STATE}.destroy_model_parallel": Canary("end a run", needs_nothing),
    f"{STATE}.get_context_parallel_group": Canary(_GROUPS, needs_nothing),
    f"{STATE}.get_data_parallel_group": Canary(_GROUPS, takes("with_context_parallel")),
    f"{STATE}.get_hierarchical_context_parallel_groups": Canary(_GROUPS, needs_nothing),
    f"{STATE}.get_pipeline_model_parallel_group": Canary(_GROUPS, needs_nothing),
    f"{STATE}.get_pipeline_model_parallel_last_rank": Canary("broadcast the loss from the last stage", needs_nothing),
    f"{STATE}.get_pipeline_model_parallel_rank": Canary("number layers over all stages", needs_nothing),
    f"{STATE}.get_tensor_model_parallel_group": Canary(_GROUPS, needs_nothing),
    f"{STATE}.is_pipeline_first_stage": Canary("build the embedding where it belongs", needs_nothing),
    f"{STATE}.is_pipeline_last_stage": Canary("build the head where it belongs", needs_nothing),
    f"{CORE}.pipeline_parallel.get_forward_backward_func": Canary("run Megatron's pipeline schedule", needs_nothing),
    f"{CORE}.process_groups_config.ProcessGroupCollection": Canary(
        _GROUPS, lambda found: takes("required_pgs")(found.use_mpu_process_groups)
    ),
    f"{CORE}.tensor_parallel.layers.set_tensor_model_parallel_attributes": Canary(
        "mark sharded parameters", begins("tensor", "is_parallel", "dim", "stride")
    ),
    f"{MAPPINGS}.copy_to_tensor_model_parallel_region": Canary(_REGIONS, takes("group")),
    f"{MAPPINGS}.gather_from_sequence_parallel_region": Canary(_REGIONS, takes("group")),
    f"{MAPPINGS}.reduce_from_tensor_model_parallel_region": Canary(_REGIONS, takes("group")),
    f"{MAPPINGS}.reduce_scatter_to_sequence_parallel_region": Canary(_REGIONS, takes("group")),
    f"{CORE}.tensor_parallel.random.model_parallel_cuda_manual_seed": Canary("seed Megatron", begins("seed")),
    f"{CORE}.transformer.enums.AttnMaskType": Canary(
        "refuse masks that are not causal", is_an_enumeration_with("causal", "padding_causal", "no_mask")
    ),
    f"{CORE}.transformer.module.Float16Module": Canary("compute in bfloat16", begins("config", "module")),
    f"{CORE}.transformer.module.MegatronModule": Canary("be a module of Megatron's", begins("config")),
    f"{CORE}.transformer.moe.router.TopKRouter": Canary(
        "route by similarity or attention", each(has("gating", "routing"), takes("config", "pg_collection"))
    ),
    f"{CORE}.transformer.spec_utils.ModuleSpec": Canary(
        "put mixers into Megatron's layers", holds("module", "params", "submodules")
    ),
    f"{CORE}.transformer.torch_norm.WrappedTorchNorm": Canary(
        "replace norms that know no sequence parallelism", exists
    ),
    f"{CORE}.transformer.transformer_block.TransformerBlockSubmodules": Canary(
        "give a block its layers", holds("layer_specs", "layer_norm")
    ),
    f"{CORE}.transformer.transformer_block.get_num_layers_to_build": Canary(
        "give a stage its layers", begins("config", "vp_stage", "pp_rank")
    ),
    f"{CORE}.transformer.transformer_config.TransformerConfig": Canary(
        "honour Megatron's settings or refuse them",
        holds("calculate_per_token_loss", "window_size", "window_attn_skip_freq", "moe_layer_freq", "transformer_impl"),
    ),
    f"{LAYER}.TransformerLayer": Canary(
        "be a layer of Megatron's",
        begins("config", "submodules", "layer_number", "hidden_dropout", "pg_collection", "vp_stage"),
    ),
    f"{LAYER}.TransformerLayer._forward_mlp": Canary("pass attention to the router of its layer", exists),
    f"{LAYER}.TransformerLayerSubmodules": Canary(
        "put mixers into Megatron's layers", holds("input_layernorm", "self_attention", "pre_mlp_layernorm", "mlp")
    ),
    f"{LAYER}.get_transformer_layer_offset": Canary(
        "number layers over all stages", begins("config", "vp_stage", "pp_rank")
    ),
    f"{CORE}.transformer.utils.is_layer_window_attention": Canary(
        "know which layers have a window", begins("window_size", "window_attn_skip_freq", "layer_number")
    ),
}

DEEPSPEED = {
    "deepspeed.initialize": Canary("wrap a model", takes("model", "optimizer", "config", "mpu", "dist_init_required")),
    "deepspeed.init_distributed": Canary(
        "use the process group that is there", takes("dist_backend", "auto_mpi_discovery", "verbose")
    ),
    "deepspeed.accelerator.get_accelerator": Canary(
        "compare devices", lambda found: has("device_name", "communication_backend_name")(found())
    ),
    "deepspeed.ops.__compatible_ops__": Canary("compile nothing on CPUs", is_a_table_of_operators),
    "deepspeed.zero.Init": Canary(
        "partition parameters over all ranks",
        takes("module", "data_parallel_group", "config_dict_or_path", "mpu", "dtype"),
    ),
    f"{ZERO}.partition_parameters.ZeroParamStatus": Canary(
        "know whether a parameter is gathered", is_an_enumeration_with("AVAILABLE")
    ),
    f"{ZERO}.stage_1_and_2.DeepSpeedZeroOptimizer._hp_optimizer_states_linked": Canary(
        "link parameters to their moments before the first step", sets("_hp_optimizer_states_linked"), of_objects=True
    ),
    f"{ZERO}.stage_1_and_2.DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state": Canary(
        "link parameters to their moments before the first step", needs_nothing
    ),
    f"{UTILS}.safe_get_full_fp32_param": Canary(_STATES, begins("param")),
    f"{UTILS}.safe_get_full_grad": Canary(_STATES, begins("param")),
    f"{UTILS}.safe_get_full_optimizer_state": Canary(_STATES, begins("param", "optim_state_key")),
    f"{UTILS}.safe_set_full_fp32_param": Canary(_STATES, begins("param", "value")),
    f"{UTILS}.safe_set_full_optimizer_state": Canary(_STATES, begins("param", "value", "optim_state_key")),
    f"{UTILS}.safe_set_local_fp32_param": Canary(_STATES, begins("param", "value")),
    f"{UTILS}.safe_set_local_optimizer_state": Canary(_STATES, begins("param", "value", "optim_state_key")),
}

TRANSFORMERS = {
    "transformers.AttentionInterface": Canary(
        "put attention over ranks into models", lambda found: begins("key", "value")(found.register)
    ),
    "transformers.modeling_outputs.CausalLMOutputWithPast": Canary(
        "return what a model returns", holds("loss", "logits", "past_key_values")
    ),
    f"{MODELS}.mamba2.modeling_mamba2.mamba2_chunk_scan": Canary(
        "time the scan of Mamba-2", begins("hidden_states", "dt", "A", "B", "C", "chunk_size")
    ),
    f"{MODELS}.minimax.configuration_minimax.MiniMaxConfig": Canary(
        "time the attention of MiniMax", takes("hidden_size", "num_attention_heads", "head_dim", "num_hidden_layers")
    ),
    f"{MODELS}.minimax.modeling_minimax.MiniMaxLightningAttention": Canary(
        "time the attention of MiniMax",
        each(
            begins("config", "layer_idx"),
            has("decay_factors"),
            *map(sets, ("qkv_proj", "act_fn", "norm")),
        ),
    ),
    f"{MODELS}.qwen3_next.modeling_qwen3_next.torch_chunk_gated_delta_rule": Canary(
        "time the gated delta rule of Qwen3-Next", each(begins("query", "key", "value"), takes("g", "beta"))
    ),
}

FLASH_ATTN = {
    "flash_attn.flash_attn_func": Canary(
        "compute attention with its lse", takes("softmax_scale", "causal", "return_attn_probs")
    ),
    "flash_attn.flash_attn_interface._flash_attn_backward": Canary(
        "differentiate attention by the global out and lse",
        takes("dout", "out", "softmax_lse", "dq", "dk", "dv", "window_size_left", "window_size_right", "softcap"),
    ),
}

FRAMEWORKS = MEGATRON | DEEPSPEED | TRANSFORMERS | FLASH_ATTN
"""Each is checked where its framework is installed: by `make test-adapters`, and flash_attn on GPUs."""
