"""How each tensor of a routed model begins, by names alone."""

import pytest

from longctx.moe.upcycle import AttentionExperts, ExpertCopies, Mean, RandomInit, Zeros, source_of, tensor_init

DENSE = {"norm.weight", "blocks.0.mixer.qkv.weight", "blocks.0.ffn.gate_up.weight", "blocks.0.ffn.down.weight"}
ROUTED = {
    "norm.weight",
    "blocks.0.mixer.qkv.weight",
    "blocks.0.ffn.router.weight",
    "blocks.0.ffn.bias",
    "blocks.0.ffn.experts.gate_up",
    "blocks.0.ffn.experts.down",
}
SHARED = {"blocks.0.ffn.shared.gate_up.weight", "blocks.0.ffn.shared.down.weight"}


def test_experts_take_their_sources_in_turn():
    assert [source_of(expert, 3) for expert in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [source_of(expert, 1) for expert in range(3)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("norm.weight", Mean("norm.weight")),
        ("blocks.0.mixer.qkv.weight", Mean("blocks.0.mixer.qkv.weight")),
        ("blocks.0.ffn.router.weight", RandomInit()),
        ("blocks.0.ffn.bias", Zeros()),
        ("blocks.0.ffn.experts.gate_up", ExpertCopies("blocks.0.ffn.gate_up.weight")),
        ("blocks.0.ffn.experts.down", ExpertCopies("blocks.0.ffn.down.weight")),
    ],
)
def test_how_a_layer_of_experts_begins(name, expected):
    assert tensor_init(name, DENSE, ROUTED) == expected


def test_beside_a_shared_expert_what_goes_out_is_halved():
    both = ROUTED | SHARED
    found = {name: tensor_init(name, DENSE, both) for name in both if "gate_up" in name or "down" in name}
    assert found == {
        "blocks.0.ffn.experts.gate_up": ExpertCopies("blocks.0.ffn.gate_up.weight"),
        "blocks.0.ffn.experts.down": ExpertCopies("blocks.0.ffn.down.weight", 0.5),
        "blocks.0.ffn.shared.gate_up.weight": Mean("blocks.0.ffn.gate_up.weight"),
        "blocks.0.ffn.shared.down.weight": Mean("blocks.0.ffn.down.weight", 0.5),
    }


def test_a_router_of_heads_begins_with_equal_logits():
    name = "blocks.0.mixer.head_router.weight"
    assert tensor_init(name, DENSE, ROUTED | {name}) == Zeros()
    # A source's own is a tensor as all others.
    assert tensor_init(name, DENSE | {name}, ROUTED | {name}) == Mean(name)


def test_attention_experts_are_arranged_from_softmax_layers():
    dense = DENSE | {"blocks.0.mixer.out.weight"}
    routed = dense | {"blocks.0.mixer.router.weight"}
    for matrix in ("qkv", "out"):
        name = f"blocks.0.mixer.{matrix}.weight"
        assert tensor_init(name, dense, routed) == AttentionExperts(name, matrix)
    assert tensor_init("blocks.0.mixer.router.weight", dense, routed) == RandomInit()
    # In the block beside it nothing has changed.
    name = "blocks.1.mixer.qkv.weight"
    assert tensor_init(name, dense | {name}, routed | {name}) == Mean(name)


@pytest.mark.parametrize("name", ["blocks.0.mixer.gate.weight", "blocks.1.ffn.experts.down", "blocks.1.ffn.bias"])
def test_what_no_rule_knows_has_no_beginning(name):
    assert tensor_init(name, DENSE, ROUTED | {name}) is None
