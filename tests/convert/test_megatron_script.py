"""Arguments and spec for Megatron's own training script."""

from longctx.convert.megatron_script import script_arguments, script_spec
from longctx.mixers.head_mixture import HeadMixtureConfig
from longctx.mixers.softmax import SoftmaxConfig
from tests.model.cases import hybrid


def test_which_options_megatrons_script_needs():
    softmax = SoftmaxConfig(heads=6, kv_heads=2, head_dim=4, rope_theta=5e5, window=5)
    assert script_arguments(hybrid(softmax=softmax, tie_embeddings=False)) == (
        "--num-layers 3 --hidden-size 12 --ffn-hidden-size 10 --swiglu --disable-bias-linear --normalization RMSNorm "
        "--norm-epsilon 1e-05 --num-attention-heads 6 --kv-channels 4 --group-query-attention --num-query-groups 2 "
        "--position-embedding-type rope --rotary-base 500000 --window-size 4,0 --untie-embeddings-and-output-weights"
    )


def test_the_spec_says_the_options_of_every_mixer_that_is_not_megatrons_own():
    softmax = SoftmaxConfig(heads=6, kv_heads=2, head_dim=4, rope_theta=5e5, window=5)
    assert (
        script_spec(hybrid(softmax=softmax))
        == """\
from longctx.adapters.megatron.specs import layer_spec
from longctx.mixers.lightning import LightningConfig

mine = layer_spec(
    'LS',
    mixers={
        'L': LightningConfig(heads=3),
    },
)"""
    )
    routed = hybrid(softmax=softmax, heads=HeadMixtureConfig(mixers=("softmax",), shared=3, active=1))
    assert "'S': SoftmaxConfig(heads=6, kv_heads=2, head_dim=4, rope_theta=500000.0, window=5)," in script_spec(routed)
    assert "heads=HeadMixtureConfig(mixers=('softmax',), active=1, shared=3)," in script_spec(routed)
    assert "mixers={" not in script_spec(hybrid(layers="S", lightning=None))
    assert script_arguments(routed).endswith("--num-attention-heads 3 --kv-channels 4 --position-embedding-type none")
