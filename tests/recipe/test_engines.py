"""Options that an engine does not support are reported with the recipe's other mistakes, before anything runs."""

import pytest

from longctx.errors import UserError
from longctx.recipe import load

RECIPE = """
name = "engines"
engine = "megatron"
[model]
layers = "LS"
depth = 4
dim = 16
lightning.heads = 4
softmax = { heads = 4, kv_heads = 2 }
[data]
path = "nowhere"
sequence_length = 96
[train]
steps = 4
[checkpoint]
every = 2
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "engines.toml"
    path.write_text(RECIPE)
    return path


MISTAKES = {
    "experts": (
        ["model.ffn=moe", "model.moe.experts=4", "model.moe.active=2", "model.moe.hidden=8"],
        "model.ffn: engine = 'megatron' supports only dense feed-forwards ('swiglu')",
    ),
    "no feed-forward": (["model.ffn=none"], "model.ffn: engine = 'megatron' supports only dense feed-forwards"),
    "parallel blocks": (["model.block=parallel"], "model.block: engine = 'megatron' supports only 'sequential' blocks"),
    "factors of the stream": (
        ["model.residual.softmax=[2.0, 1.0]"],
        "model.residual: engine = 'megatron' has no factors on the residual stream",
    ),
    "other norms": (["model.norm=zero_centered_rms"], "model.norm: engine = 'megatron' supports only norm 'rms'"),
    "either kind of heads": (
        ["parallel.tp=2", 'model.heads.mixers=["softmax"]', "model.heads.active=1", "model.heads.shared=2"],
        "parallel.tp: model.softmax: kv_heads 2 (2 shared and 2 routed heads) does not divide over 2 ranks",
    ),
    "attention experts": (
        ["parallel.tp=2", "model.layers=LAS", "model.depth=3", "model.attention_experts={experts = 2, heads = 4}"],
        "parallel.tp: model.attention_experts: AttentionExperts does not support tensor parallelism",
    ),
    "tiles": (["train.ffn_tile=8"], "train.ffn_tile: engine = 'megatron' uses Megatron's feed-forwards"),
    "virtual ranks": (["parallel.reproducible=4"], "parallel.reproducible: engine = 'megatron' does not support"),
    "whole copies": (["parallel.dp_replicate=2"], "parallel.dp_replicate: engine = 'megatron' has no replicas"),
    "experts over ranks": (["parallel.ep=2"], "parallel.ep: ep = 2, but no layer of the model has experts"),
    "layers": (["parallel.pp=3"], "parallel.pp: 4 layers (model.depth) are not a multiple of pp = 3"),
    "heads": (["parallel.tp=4"], "parallel.tp: model.softmax: kv_heads 2 does not divide over 4 ranks"),
    "hidden channels": (
        ["parallel.tp=2", "model.swiglu.hidden=11"],
        "the feed-forward width 11 (model.swiglu.hidden) is not a multiple of tp = 2",
    ),
    "balanced stages": (
        ["parallel.pp=2", "parallel.layout=balanced"],
        "parallel.layout: pipeline parallelism needs batches of",
    ),
    "balanced slices": (
        ["parallel.tp=4", "parallel.layout=balanced", "model.softmax.kv_heads=4"],
        "parallel.layout: 'balanced' does not guarantee a multiple of tp = 4 tokens per rank",
    ),
    "slices": (
        ["parallel.tp=2", "data.sequence_length=63"],
        "data.sequence_length: a rank has 63 of 63 tokens, which is not a multiple of tp = 2",
    ),
    "ulysses of a rank's heads": (
        ["parallel.tp=2", "parallel.cp=4", "parallel.attention=ulysses"],
        "parallel.attention: 'ulysses' splits heads over 4 ranks, but model.softmax has 2",
    ),
    "ulysses of the shared heads": (
        [
            *("engine=torch", "parallel.cp=2", "parallel.attention=ulysses", "model.softmax.kv_heads=4"),
            *('model.heads.mixers=["softmax"]', "model.heads.shared=1", "model.heads.active=1"),
        ],
        "splits heads over 2 ranks, but model.softmax has 1 shared heads and 3 key/value heads of routed",
    ),
    "ulysses of the routed heads": (
        [
            *("parallel.tp=2", "parallel.cp=4", "parallel.ulysses=2", "parallel.attention=ulysses-ring"),
            *('model.heads.mixers=["softmax"]', "model.heads.active=1"),
        ],
        "splits heads over 2 ranks, but model.softmax has 1 key/value heads of routed ones",
    ),
    "ulysses": (
        ["engine=torch", "parallel.cp=8", "parallel.attention=ulysses"],
        "parallel.attention: 'ulysses' splits heads over 8 ranks, but model.softmax has 4",
    ),
    "another engine's table": (
        ["engine=torch", "megatron.sequence_parallel=false"],
        "megatron: this table is for engine = 'megatron', but engine = 'torch'; remove it",
    ),
    "tensor parallelism": (["engine=torch", "parallel.tp=2"], "parallel.tp: engine = 'torch' does not support tp"),
    "optimizer states of another run": (
        ["train.init=runs/first", "train.init_optimizer=true"],
        "train.init_optimizer: engine = 'megatron' reads optimizer states only of its own checkpoints",
    ),
    "spikes that are skipped": (
        ["spikes.policy=skip"],
        "spikes.policy: 'skip' needs engine = 'torch': with 'megatron' the gradient norm is known only after",
    ),
    "spikes that DeepSpeed skips": (
        ["engine=deepspeed", "spikes.policy=skip"],
        "spikes.policy: 'skip' needs engine = 'torch': with 'deepspeed' the gradient norm is known only after",
    ),
    "a pipeline": (["engine=deepspeed", "parallel.pp=2"], "parallel.pp: engine = 'deepspeed' does not support pp"),
}


@pytest.mark.parametrize(("overrides", "said"), MISTAKES.values(), ids=MISTAKES)
def test_what_an_engine_does_not_have_is_refused_by_its_key(source, overrides, said):
    with pytest.raises(UserError) as caught:
        load(source, overrides)
    assert said in str(caught.value)


def test_parameters_of_two_dtypes_need_the_distributed_optimizer(source):
    source.write_text(RECIPE.replace('"LS"', '"LSM"') + "[model.mamba2]\nheads = 4\nhead_dim = 4\n")
    overrides = ["train.precision=bf16", "megatron.distributed_optimizer=false"]
    with pytest.raises(UserError, match=r"model.mamba2 has float32 parameters beside bf16 ones"):
        load(source, overrides)
    load(source, overrides[:1])
    load(source, overrides[1:])


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.tp=2", "parallel.pp=2", "parallel.cp=2"],
        ["parallel.cp=2", "parallel.attention=ulysses"],
        ["parallel.tp=2", "data.sequence_length=63", "megatron.sequence_parallel=false"],
        ["engine=deepspeed", "deepspeed.zero_stage=3", "parallel.cp=4"],
    ],
)
def test_what_an_engine_has_is_taken(source, overrides):
    load(source, overrides)
