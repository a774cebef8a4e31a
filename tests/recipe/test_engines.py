"""What an engine does not have is told with the recipe's other mistakes, before anything runs."""

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
        "model.ffn: engine = 'megatron' has dense feed-forwards ('swiglu')",
    ),
    "no feed-forward": (["model.ffn=none"], "model.ffn: engine = 'megatron' has dense feed-forwards"),
    "parallel blocks": (["model.block=parallel"], "model.block: engine = 'megatron' has sequential blocks"),
    "factors of the stream": (
        ["model.residual.softmax=[2.0, 1.0]"],
        "model.residual: engine = 'megatron' adds to the stream without factors",
    ),
    "other norms": (["model.norm=zero_centered_rms"], "model.norm: engine = 'megatron' has norms 'rms'"),
    "either kind of heads": (
        ["parallel.tp=2", 'model.heads.mixers=["softmax"]', "model.heads.active=1", "model.heads.shared=2"],
        "parallel.tp: model.softmax: kv_heads 2, of 2 shared and 2 routed heads, does not divide over 2 ranks",
    ),
    "attention experts": (
        ["parallel.tp=2", "model.layers=LAS", "model.depth=3", "model.attention_experts={experts = 2, heads = 4}"],
        "parallel.tp: model.attention_experts: the heads of AttentionExperts are not divided",
    ),
    "tiles": (["train.ffn_tile=8"], "train.ffn_tile: engine = 'megatron' has Megatron's feed-forwards"),
    "whole copies": (["parallel.dp_replicate=2"], "parallel.dp_replicate: engine = 'megatron' has one kind"),
    "experts over ranks": (["parallel.ep=2"], "parallel.ep: 2 ranks for experts, and no layer of the model has any"),
    "layers": (["parallel.pp=3"], "parallel.pp: 4 layers (model.depth) do not divide over 3 ranks"),
    "heads": (["parallel.tp=4"], "parallel.tp: model.softmax: kv_heads 2 does not divide over 4 ranks"),
    "hidden channels": (["parallel.tp=2", "model.swiglu.hidden=11"], "the feed-forward is 11 wide, which 2 ranks"),
    "balanced stages": (["parallel.pp=2", "parallel.layout=balanced"], "parallel.layout: a pipeline takes batches of"),
    "balanced slices": (
        ["parallel.tp=4", "parallel.layout=balanced", "model.softmax.kv_heads=4"],
        "parallel.layout: 'balanced' does not promise a rank a number of tokens that tp = 4 divides",
    ),
    "slices": (
        ["parallel.tp=2", "data.sequence_length=63"],
        "data.sequence_length: a rank has 63 tokens of 63, which 2 tensor-parallel ranks do not divide",
    ),
    "ulysses of a rank's heads": (
        ["parallel.tp=2", "parallel.cp=4", "parallel.attention=ulysses"],
        "parallel.attention: 'ulysses' divides heads over 4 ranks, and of model.softmax a rank has 2",
    ),
    "ulysses of the shared heads": (
        [
            *("engine=torch", "parallel.cp=2", "parallel.attention=ulysses", "model.softmax.kv_heads=4"),
            *('model.heads.mixers=["softmax"]', "model.heads.shared=1", "model.heads.active=1"),
        ],
        "divides heads over 2 ranks, and of model.softmax a rank has 1 shared heads and 3 key/value heads of routed",
    ),
    "ulysses of the routed heads": (
        [
            *("parallel.tp=2", "parallel.cp=4", "parallel.ulysses=2", "parallel.attention=ulysses-ring"),
            *('model.heads.mixers=["softmax"]', "model.heads.active=1"),
        ],
        "divides heads over 2 ranks, and of model.softmax a rank has 1 key/value heads of routed ones",
    ),
    "ulysses": (
        ["engine=torch", "parallel.cp=8", "parallel.attention=ulysses"],
        "parallel.attention: 'ulysses' divides heads over 8 ranks, and of model.softmax a rank has 4",
    ),
    "another engine's table": (
        ["engine=torch", "megatron.sequence_parallel=false"],
        "megatron: this table is the engine 'megatron''s, and engine is 'torch'; remove it",
    ),
    "tensor parallelism": (["engine=torch", "parallel.tp=2"], "parallel.tp: engine = 'torch' has no tp"),
    "a pipeline": (["engine=deepspeed", "parallel.pp=2"], "parallel.pp: engine = 'deepspeed' has no pp"),
}


@pytest.mark.parametrize(("overrides", "said"), MISTAKES.values(), ids=MISTAKES)
def test_what_an_engine_does_not_have_is_refused_by_its_key(source, overrides, said):
    with pytest.raises(UserError) as caught:
        load(source, overrides)
    assert said in str(caught.value)


def test_parameters_of_two_dtypes_need_the_distributed_optimizer(source):
    source.write_text(RECIPE.replace('"LS"', '"LSM"') + "[model.mamba2]\nheads = 4\nhead_dim = 4\n")
    overrides = ["train.precision=bf16", "megatron.distributed_optimizer=false"]
    with pytest.raises(UserError, match=r"model.mamba2 has parameters in float32 beside those in bf16"):
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
