"""The model's table: every mistake in one message, each with its key."""

import pytest
from pydantic import ValidationError

from longctx.mixers import MIXERS
from longctx.mixers.deltanet import GatedDeltaNetConfig
from longctx.mixers.head_mixture import HeadMixtureConfig
from longctx.mixers.lightning import LightningConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.config import ModelConfig
from longctx.model.decoder import Decoder
from longctx.model.ffn import SwigluConfig
from longctx.model.moe import MoeConfig
from tests.mixers.cases import config_of
from tests.model.cases import hybrid

MOE = MoeConfig(experts=4, active=2, hidden=3)
BY_ATTENTION = MoeConfig(experts=4, active=2, hidden=3, router="attention")
GROUPED = GatedDeltaNetConfig(heads=4, qk_heads=2, head_dim=5)
EXPERTS = {"ffn": ("swiglu", "moe"), "moe": MOE}


def mix(*mixers, active=1, **options):
    return HeadMixtureConfig(mixers=mixers, active=active, **options)


def refused(**changes):
    with pytest.raises(ValidationError) as caught:
        hybrid(**changes)
    (error,) = caught.value.errors()
    return error["msg"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": ""}, "layers: the pattern is empty; expected letters of L (lightning), "),
        ({"layers": "LXS"}, "layers: 'X' in 'LXS' is not a mixer; expected letters of L (lightning), "),
        ({"softmax": None}, "layers: S needs the table [model.softmax]"),
        ({"block": "both"}, "Input should be 'sequential', 'parallel' or 'postnorm'"),
        (
            {"ffn": "none", "swiglu": None, "block": "parallel"},
            "block: 'parallel' needs layers with a feed-forward, and",
        ),
        ({"residual": {"softmax": (2.0, 1.0)}, "block": "parallel"}, "residual: block 'parallel' has one residual"),
        (
            {"residual": {"moe": (2.0, 1.0)}},
            "residual.moe: no such layer; expected one of lightning, softmax, swiglu",
        ),
        ({"ffn": "none"}, "swiglu: no layer has ffn 'swiglu'; remove the table"),
        ({"layers": "LLS", "depth": 2}, "softmax: no S in the pattern 'LLS' over 2 layers; remove the table"),
        ({"lightning": LightningConfig(heads=5)}, "lightning.heads: 5 heads do not divide dim 12; set head_dim"),
        ({"softmax": SoftmaxConfig(heads=4, kv_heads=3)}, "softmax.kv_heads: 4 query heads are not a multiple of 3"),
        ({"ffn": "mlp"}, "ffn: unknown feed-forward 'mlp'; expected one of swiglu, moe"),
        (
            {"heads": mix("lightnin")},
            "heads.mixers: the pattern 'LS' has no 'lightnin'; expected one of lightning, softmax",
        ),
        ({"heads": mix("softmax", active=5, shared=3)}, "heads.active: 3 shared and 5 active of 6 heads of softmax"),
        (
            {"softmax": SoftmaxConfig(heads=4, kv_heads=8), "heads": mix("softmax", shared=2)},
            "softmax.kv_heads: 4 query heads are not a multiple of 8",
        ),
        ({"heads": mix("softmax", shared=2)}, "heads.shared: 2 heads are not a multiple of 3, softmax"),
        (
            {"heads": mix("lightning", router="norm")},
            "heads.router: 'norm' supports only softmax layers, not lightning",
        ),
        (
            {"ffn": ("swiglu", "moe"), "moe": BY_ATTENTION, "heads": mix("softmax")},
            "moe.router: layer 1 (from 0) has a mixture of heads ([model.heads]), and the router 'attention'",
        ),
        (
            {
                "heads": mix("softmax", router="norm"),
                "softmax": SoftmaxConfig(heads=6, head_dim=4, qk_norm="rms"),
            },
            "heads.router: 'norm' compares the norms of queries, which softmax.qk_norm makes equal",
        ),
        ({"ffn": ()}, "ffn: the list is empty; expected one or more of swiglu, moe"),
        ({"ffn": "moe"}, "swiglu: no layer has ffn 'swiglu'; remove the table"),
        ({"ffn": ("swiglu", "moe")}, "ffn: moe needs the table [model.moe]"),
        ({"moe": MOE}, "moe: no layer has ffn 'moe'; remove the table"),
        ({"ffn": ("swiglu",) * 3 + ("moe",), "moe": MOE}, "moe: no layer has ffn 'moe'; remove the table"),
        ({**EXPERTS, "moe": MoeConfig(experts=4, active=5, hidden=3)}, "moe.active: 5 of 4 experts"),
        (
            {**EXPERTS, "moe": MoeConfig(experts=4, active=2, hidden=3, groups=3)},
            "moe.groups: 3 groups do not divide 4 experts",
        ),
        (
            {**EXPERTS, "moe": MoeConfig(experts=4, active=2, hidden=3, groups=2, active_groups=3)},
            "moe.active_groups: 3 of 2 groups",
        ),
        (
            {**EXPERTS, "moe": MoeConfig(experts=4, active=3, hidden=3, groups=2)},
            "moe.active_groups: 1 groups have 2 experts, fewer than active = 3",
        ),
        (
            {**EXPERTS, "moe": MoeConfig(experts=4, active=2, hidden=3, similarity_dim=4)},
            "moe.similarity_dim: only for the router 'similarity', and this is 'token'; remove it",
        ),
        (
            {**EXPERTS, "moe": MoeConfig(experts=4, active=2, hidden=3, router="attention", temperature=0.5)},
            "moe.temperature: only for the router 'similarity', and this is 'attention'; remove it",
        ),
        (
            {**EXPERTS, "moe": MoeConfig(experts=4, active=2, hidden=3, shared_gate=True, shared_hidden=5)},
            "moe.shared_hidden: there are no shared experts (shared = 0); remove it; moe.shared_gate: there are no",
        ),
        (
            {
                "layers": "E",
                "lightning": None,
                "softmax": None,
                "gated_deltanet": GROUPED,
                "heads": mix("gated_deltanet"),
            },
            "heads.mixers: gated_deltanet does not support a mixture of heads",
        ),
        (
            {"ffn": ("swiglu", "swiglu", "moe"), "moe": BY_ATTENTION},
            "moe.router: layer 2 (from 0) is L (lightning), which has no softmax attention; the router 'attention' "
            "needs a layer S (softmax)",
        ),
    ],
)
def test_a_mistake_is_reported_with_its_key(changes, words):
    assert words in refused(**changes)


def test_all_mistakes_are_in_one_message():
    message = refused(layers="LYX", lightning=LightningConfig(heads=5), ffn="mlp")
    keys = ["layers: 'X'", "layers: 'Y'", "lightning.heads: ", "softmax: ", "ffn: "]
    places = [message.index(key) for key in keys]
    assert places == sorted(places)


def test_wrong_types_and_unknown_keys_are_reported_together():
    with pytest.raises(ValidationError) as caught:
        ModelConfig(layers="L", depth=0, dim="1.5", lightnin=LightningConfig(heads=1), norm_eps=0.0)
    assert {error["loc"] for error in caught.value.errors()} == {("depth",), ("dim",), ("lightnin",), ("norm_eps",)}


@pytest.mark.parametrize(("layers", "depth", "pattern"), [("LLLS", 6, "LLLSLL"), ("L", 3, "LLL"), ("LS", 1, "L")])
def test_the_pattern_is_repeated_over_the_depth(layers, depth, pattern):
    tables = {kind.name: config_of(letter) if letter in pattern else None for letter, kind in MIXERS.items()}
    config = hybrid(layers=layers, depth=depth, **tables)
    assert config.pattern == pattern
    assert [config.mixer(layer).letter for layer in range(depth)] == list(pattern)


def test_every_registered_mixer_has_a_table_of_its_name():
    for letter, kind in MIXERS.items():
        config = ModelConfig(layers=letter, depth=1, dim=12, **{kind.name: config_of(letter)})
        assert config.mixer(0) == config_of(letter)


@pytest.mark.parametrize(
    ("layers", "depth"), [("LLLS", 12), ("LLLLLLLS", 4), ("SL", 2), ("SSS", 1), ("LS", 1), ("LLLS", 6)]
)
@pytest.mark.parametrize("heads", [(1, None), (6, 1), (24, 8), (7, 7)], ids=str)
def test_shrunk_keeps_the_pattern_and_is_a_valid_small_model(layers, depth, heads):
    pattern = (layers * depth)[:depth]
    config = ModelConfig(
        layers=layers,
        depth=depth,
        dim=4096,
        lightning=LightningConfig(heads=heads[0], head_dim=128) if "L" in pattern else None,
        softmax=SoftmaxConfig(heads=heads[0], kv_heads=heads[1], head_dim=128) if "S" in pattern else None,
        norm_eps=1e-3,
        tie_embeddings=False,
        block="parallel",
    )
    small = config.shrunk()
    # A copy is not validated, so do it here.
    assert ModelConfig(**{key: getattr(small, key) for key in ModelConfig.model_fields}) == small
    assert small.pattern == pattern[: len(layers)]
    assert (small.norm_eps, small.tie_embeddings, small.ffn, small.block) == (1e-3, False, "swiglu", "parallel")
    assert isinstance(small.feed_forward(0), SwigluConfig)
    assert sum(p.numel() for p in Decoder(small, 128).parameters()) < 300_000


def test_feed_forwards_are_repeated_over_the_depth():
    config = hybrid(depth=5, **EXPERTS)
    assert config.feed_forwards == ("swiglu", "moe", "swiglu", "moe", "swiglu")
    assert [type(config.feed_forward(layer)) for layer in range(3)] == [SwigluConfig, MoeConfig, SwigluConfig]


@pytest.mark.parametrize(
    "moe",
    [
        MOE,
        MoeConfig(experts=64, active=6, hidden=1408, shared=2),
        MoeConfig(experts=64, active=6, hidden=1408, shared=1, shared_hidden=9000, shared_gate=True),
        MoeConfig(experts=256, active=8, hidden=2048, groups=8, active_groups=4, score="sigmoid"),
        MoeConfig(experts=6, active=4, hidden=2048, groups=3, active_groups=2),
        MoeConfig(experts=6, active=4, hidden=2048, router="similarity", similarity_dim=128, temperature=0.5),
    ],
)
@pytest.mark.parametrize("ffn", ["moe", ("swiglu", "moe", "moe")])
def test_shrunk_keeps_the_feed_forwards(moe, ffn):
    small = hybrid(depth=12, ffn=ffn, moe=moe, swiglu=None).shrunk()
    assert ModelConfig(**{key: getattr(small, key) for key in ModelConfig.model_fields}) == small
    assert small.feed_forwards == (("moe", "moe") if ffn == "moe" else ("swiglu", "moe", "moe"))
    assert small.feed_forward(1).experts <= 8


@pytest.mark.parametrize(
    "heads", [mix("softmax"), mix("lightning", shared=1, active=2), mix("softmax", shared=16, active=8)]
)
def test_shrunk_keeps_what_is_routed(heads):
    softmax, lightning = SoftmaxConfig(heads=32, kv_heads=8, head_dim=4), LightningConfig(heads=16, head_dim=4)
    small = hybrid(softmax=softmax, lightning=lightning, heads=heads).shrunk()
    assert ModelConfig(**{key: getattr(small, key) for key in ModelConfig.model_fields}) == small
    assert small.heads.mixers == heads.mixers
    assert (small.heads.shared > 0) == (heads.shared > 0)
    layer = small.pattern.index("S" if "softmax" in heads.mixers else "L")
    assert small.heads.shared + small.heads.active < small.routed_heads(layer), "some heads are not read"
    assert small.routed_heads(1 - layer) is None


def test_experts_may_be_routed_by_attention_where_every_one_of_their_layers_has_it():
    config = hybrid(depth=12, ffn=("swiglu", "moe"), moe=BY_ATTENTION)
    assert config.feed_forward(1).needs_attention
    small = config.shrunk()
    assert ModelConfig(**{key: getattr(small, key) for key in ModelConfig.model_fields}) == small
    assert small.feed_forward(1).router == "attention"
