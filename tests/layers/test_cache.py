"""Caches of layers: keys and values in buffers that grow, inputs of convolutions of any width."""

import math

import pytest
import torch

from longctx.layers.cache import KVBuffer
from longctx.mixers.deltanet import DeltaNetConfig, KdaConfig
from longctx.mixers.gla import GlaConfig
from longctx.mixers.lightnet import LightNetConfig
from longctx.mixers.linear import LinearConfig
from longctx.mixers.mamba2 import Mamba2Config
from longctx.mixers.softmax import SoftmaxConfig
from longctx.parallel.layout import Layout
from tests.mixers.cases import DIM, draw
from tests.mixers.test_contract import in_pieces


def draw_keys(length):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, length, 3, width, generator=generator) for width in (5, 4))


@pytest.mark.parametrize("keep", [0, 1, 6, 100])
@pytest.mark.parametrize("pieces", [(1,) * 40, (20, 1, 1, 1, 1, 1, 15), (3, 30, 7)], ids=str)
def test_the_newest_are_held_in_order(keep, pieces):
    k, v = draw_keys(40)
    keys, seen = KVBuffer(), 0
    for new in pieces:
        held = min(keep, seen)
        got = keys.append(k[:, seen : seen + new], v[:, seen : seen + new])
        seen += new
        for part, whole in zip(got, (k, v), strict=True):
            assert torch.equal(part, whole[:, seen - new - held : seen])
        keys.keep_last(keep)
        assert len(keys) == min(keep, seen)


@pytest.mark.parametrize("keep", [None, 8])
def test_few_tokens_cost_a_copy_of_those_before(keep):
    k, v = draw_keys(1000)
    keys, places, copied = KVBuffer(), set(), 0
    for t in range(1000):
        before = len(keys)
        keys.append(k[:, t : t + 1], v[:, t : t + 1])
        copied += before * (keys.buffers[0].data_ptr() not in places)
        places = {keys.buffers[0].data_ptr()}
        if keep is not None:
            keys.keep_last(keep)
    assert copied <= 3 * 1000
    most = 1000 if keep is None else keep + 1
    assert keys.buffers[0].shape[2] <= 1.5 * most
    assert keep is not None or math.prod(keys.buffers[0].shape[:3]) >= 2 * 3 * 1000


@pytest.mark.parametrize("window", [1, 2, 5, 12, 100])
@pytest.mark.parametrize("pieces", [(1,) * 28, (7, 1, 1, 5, 1, 13), (20, 8), (1, 1, 26)], ids=str)
def test_with_a_window_a_document_in_pieces_is_as_it_would_be_whole(window, pieces):
    mixer = SoftmaxConfig(heads=6, kv_heads=2, head_dim=4, window=window).build(DIM, 0, 1, 1e-5).double()
    x, _ = draw(28)
    got, cache = in_pieces(mixer, 3 * x, pieces)
    torch.testing.assert_close(got, mixer(3 * x, Layout((0, 28))).detach(), rtol=1e-11, atol=1e-12)
    assert len(cache.kv) == min(window - 1, 28)


OTHERS = {
    "a convolution of 8 tokens": DeltaNetConfig(heads=3, head_dim=5, conv=8),
    "of 1 token": Mamba2Config(heads=4, head_dim=5, state_dim=7, conv=1),
    "where there was none": KdaConfig(heads=3, head_dim=5, conv=4),
    "none where there was one": GlaConfig(heads=3, head_dim=5, value_dim=7, gate_rank=4),
    "none before a running softmax": LightNetConfig(heads=3, head_dim=5, gate_rank=4),
    "no denominator": LinearConfig(heads=6, kv_heads=3, head_dim=5, normalize=False),
}
"""What tests/mixers/cases.py leaves out."""


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.parametrize("pieces", [(1,) * 28, (3, 1, 1, 2, 20, 1)], ids=str)
def test_other_forms_of_a_layer_resume_too(config, pieces):
    mixer, (x, _) = config.build(DIM, 1, 4, 1e-5).double(), draw(28)
    got, _ = in_pieces(mixer, x, pieces)
    torch.testing.assert_close(got, mixer(x, Layout((0, 28))).detach(), rtol=1e-11, atol=1e-12)
