"""Public paths: packages export the same objects as the modules that define them."""

from importlib import import_module

import pytest

from longctx.kernels.attention import block, masks
from longctx.kernels.linear import api as linear
from longctx.parallel.attention import api as attention
from longctx.parallel.linear import noncausal, state_scan

PUBLIC = {
    "longctx.parallel.scan": {state_scan: ["begin_state_scan", "state_scan"]},
    "longctx.parallel.linear": {noncausal: ["noncausal_linear_attention"]},
    "longctx.parallel.attention": {attention: ["routed_attention", "softmax_attention"]},
    "longctx.kernels.linear": {linear: ["linear_attention", "step"]},
    "longctx.kernels.attention": {
        block: ["backward", "explain_backends", "forward", "merge_"],
        masks: [
            "CAUSAL", "CAUSAL_MASK", "FULL", "BlockMask", "IntervalMask", "Mask", "PlainMask", "Positions",
            "packed_documents", "sliding_window",
        ],
    },
}  # fmt: skip
each_path = pytest.mark.parametrize("path", PUBLIC)


@each_path
def test_exports_are_the_objects_of_the_modules_that_define_them(path):
    package = import_module(path)
    for module, names in PUBLIC[path].items():
        for name in names:
            assert getattr(package, name) is getattr(module, name), name


@each_path
def test_all_lists_exactly_the_public_names(path):
    listed = import_module(path).__all__
    assert sorted(listed) == sorted(name for names in PUBLIC[path].values() for name in names)
