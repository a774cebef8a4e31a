"""What would be wrong inside Megatron-Core is refused by name."""

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs the extra: pip install -e '.[megatron]'")

from longctx.adapters.megatron.layouts import thd_partitioned_indices
from longctx.adapters.megatron.router import RouterConfig
from longctx.adapters.megatron.specs import layer_spec, softmax
from longctx.mixers.head_mixture import HeadMixtureConfig
from longctx.mixers.lightning import LightningConfig
from tests.adapters.megatron.cases import LENGTH, Run, gpt, parallel, tokens
from tests.adapters.megatron.shim import on_cpu
from tests.adapters.megatron.test_layers import EXPERTS


def forward(run, spec, changes, mask):
    model = gpt(run, spec, **changes)
    x, _ = tokens(1)
    model(x, torch.arange(LENGTH)[None], mask)


def refusal(run, spec, changes, mask=None):
    with on_cpu():
        parallel(run)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is looked at by the caller
            forward(run, spec, changes, mask)
        return str(caught.value)


def refused(ranks, *arguments, size=1):
    (message, *_) = ranks.run(refusal, *arguments, size=size)
    return message


HEADS = HeadMixtureConfig(mixers=("softmax",), shared=2, active=2)
TOGETHER = layer_spec("S", router=RouterConfig(kind="attention"))
LINEAR = layer_spec("LS", router=RouterConfig(kind="attention"))
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["moe", "core_attn"]}


@pytest.mark.parametrize(
    ("run", "spec", "changes", "message"),
    [
        (Run(), softmax, {"attention_dropout": 0.1}, "attention_dropout is 0.1: not supported"),
        (Run(), softmax, {"softmax_type": "off-by-one"}, "softmax_type is 'off-by-one': only 'vanilla'"),
        (Run(), softmax, {"window_size": (5, 2)}, "window_size is (5, 2): the second number has to be 0"),
        (Run(cp=2, comm="everything"), softmax, {}, "cp_comm_type is 'everything': expected one of"),
        (Run(cp=2, comm="a2a+p2p"), softmax, {}, "needs two hierarchical_context_parallel_sizes"),
        (
            Run(tp=2),
            layer_spec("S", heads=HEADS),
            {},
            "kv_heads 4 (2 shared and 6 routed heads) does not divide over 2",
        ),
        (
            Run(tp=2),
            layer_spec("L", mixers={"L": LightningConfig(heads=3, head_dim=4)}),
            {},
            "heads 3 does not divide over 2",
        ),
        (
            Run(),
            TOGETHER,
            dict(EXPERTS) | SELECTIVE,
            "recompute_modules: core_attn, moe would drop the router's gradient",
        ),
        (Run(), LINEAR, dict(EXPERTS), "router 'attention': a layer 'L' has no softmax attention"),
    ],
)
def test_what_is_not_computed(ranks, run, spec, changes, message):
    assert message in refused(ranks, run, spec, changes, size=run.ranks)


def test_a_mask_that_is_not_the_causal_one(ranks):
    mask = torch.ones(1, 1, LENGTH, LENGTH).tril() < 0.5
    mask[..., 20:, :20] = True
    assert "is not the causal mask: use packed sequences" in refused(ranks, Run(), softmax, {}, mask)


def test_documents_that_do_not_divide():
    with pytest.raises(ValueError, match="a document of 6 tokens is not divisible into 4 chunks for 2"):
        thd_partitioned_indices((0, 8, 14), 2, 0)


def test_a_letter_that_there_is_not():
    with pytest.raises(ValueError, match="pattern is 'LX': expected one or more of the letters "):
        layer_spec("LX")
