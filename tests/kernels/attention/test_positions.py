"""Block attention under masks by position, by every backend that runs here, against the dense reference."""

import importlib.util
import os

import pytest
import torch

from longctx.kernels.attention import block as attention
from longctx.kernels.attention import native
from longctx.kernels.attention import tiled as attention_tiled
from longctx.kernels.attention.block import FULL, IntervalMask, Positions, packed_documents
from tests.combinations import mostly_slow
from tests.kernels.attention.cases import by_reference, dense, draw, gathered, masks

in_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton (pip install -e '.[triton]') in its interpreter: TRITON_INTERPRET=1",
)
built = pytest.mark.skipif(not native.is_built(), reason="needs a C++ compiler")
BACKENDS = {"cpu-flash": torch.float64, "tiled": torch.float64, "triton": torch.float32, "cpu-native": torch.float32}
NEEDS = {"triton": in_interpreter, "cpu-native": built}
BY_BACKEND = [pytest.param(name, marks=NEEDS.get(name, ())) for name in BACKENDS]


@pytest.fixture(params=BY_BACKEND)
def backend(request, monkeypatch):
    monkeypatch.setattr(attention_tiled, "TILE", 16)
    monkeypatch.setattr(attention_tiled, "QUERY_TILES", (8, 8))
    monkeypatch.setattr(native, "FEWEST_QUERIES", 1)
    return request.param


def assert_near(got, want, backend, name):
    bound = 1e-10 if BACKENDS[backend] == torch.float64 else 1e-5
    for part, x, ref in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert torch.equal(x.isneginf(), ref.isneginf()), f"{name}: {part}"
        x, ref = (y.masked_fill(y.isneginf(), 0).double() for y in (x, ref))
        assert (x - ref).norm() <= bound * max(ref.norm(), 1), f"{name}: {part}"


def computed(q, k, v, do, mask, backend, scale=0.3):
    out, lse = attention.forward(q, k, v, mask, scale, backend)
    return out, lse, *attention.backward(do, q, k, v, out, lse, mask, scale, backend)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_dim", "value_dim"), [(4, 2, 8, 8), (4, 4, 10, 24), (4, 1, 20, 5), (4, 2, 1, 3)]
)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_mask_equals_the_dense_reference(backend, heads, kv_heads, key_dim, value_dim, every):
    chosen = masks()
    if backend == "triton" and not every:  # in the interpreter, slow
        if (heads, kv_heads, key_dim, value_dim) != (4, 2, 8, 8):
            pytest.skip("one of the slow ones")
        chosen = {name: chosen[name] for name in ("causal", "zigzag halves, documents, window", "gathered, window")}
    for name, mask in chosen.items():
        inputs = draw(mask.query.shape[-1], len(mask.key), heads, kv_heads, key_dim, value_dim, dtype=BACKENDS[backend])
        want = by_reference(*inputs, dense(mask), 0.3)
        assert_near(computed(*inputs, mask, backend), want, backend, name)


@pytest.mark.parametrize("window", mostly_slow([None, 6], 6))
def test_blocks_of_keys_merge_to_the_whole_and_their_gradients_add_up(backend, window):
    mask = gathered(20, 50, IntervalMask(window=window))
    q, k, v, do = draw(20, 50, key_dim=12, value_dim=8, dtype=BACKENDS[backend])
    want = by_reference(q, k, v, do, dense(mask), 0.3)
    blocks = [(at, Positions(mask.query, mask.key[at], mask=mask.mask)) for at in map(slice, (0, 17, 33), (17, 33, 50))]

    out, lse = torch.zeros_like(do), torch.full((2, 4, 20), float("-inf"), dtype=do.dtype)
    for at, block in blocks:
        attention.merge_(out, lse, *attention.forward(q, k[:, at], v[:, at], block, 0.3, backend))
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for at, block in blocks:
        grads = attention.backward(do, q, k[:, at], v[:, at], out, lse, block, 0.3, backend)
        dq += grads[0]
        dk[:, at] += grads[1]
        dv[:, at] += grads[2]
    assert_near((out, lse, dq, dk, dv), want, backend, "merged")


def test_plain_masks_are_masks_by_position_too(backend):
    mask = Positions(torch.arange(11), torch.arange(20), mask=IntervalMask(causal=False))
    inputs = draw(11, 20, dtype=BACKENDS[backend])
    assert_near(computed(*inputs, FULL, backend), computed(*inputs, mask, backend), backend, "full")


def test_strided_inputs_give_the_same_and_are_left_as_they_were(backend):
    mask = packed_documents((0, 20, 25, 38), IntervalMask(window=7))
    inputs = draw(38, 38, dtype=BACKENDS[backend])
    want = computed(*inputs, mask, backend)
    strided = [torch.stack([x, x], dim=-1)[..., 0].transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:2]]
    strided += [torch.stack([x, x], dim=-1)[..., 1] for x in inputs[2:]]
    before = [x.clone() for x in strided]
    assert_near(computed(*strided, mask, backend), want, backend, "strided")
    for x, was in zip(strided, before, strict=True):
        assert torch.equal(x, was)


@pytest.mark.parametrize("t", mostly_slow([0, 23, 39], 23))
def test_changing_a_key_leaves_earlier_outputs_bitwise_unchanged(backend, t):
    mask = Positions(torch.arange(40), torch.arange(40), mask=IntervalMask(window=30))
    q, k, v, _ = draw(40, 40, dtype=torch.float32)
    before, _ = attention.forward(q, k, v, mask, 0.3, backend)
    k[:, t], v[:, t] = 50 * torch.randn_like(k[:, t]), 50 * torch.randn_like(v[:, t])
    after, _ = attention.forward(q, k, v, mask, 0.3, backend)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t:], after[:, t:])


def test_lower_precision_is_rounded_once(backend):
    mask = masks()["documents"]
    inputs = draw(60, 60, key_dim=16, value_dim=16, dtype=torch.bfloat16)
    want = by_reference(*(x.double() for x in inputs), dense(mask), 0.3)
    for x, ref in zip(computed(*inputs, mask, backend), want, strict=True):
        assert x.dtype == (torch.float32 if x.dim() == 3 else torch.bfloat16)
        assert (x.double() - ref).norm() < 6e-3 * ref.norm()


@pytest.mark.parametrize(("tq", "tk"), [(0, 3), (3, 0)])
def test_empty_blocks_are_zero_and_see_nothing(backend, tq, tk):
    q, k, v, do = draw(tq, tk, dtype=torch.float32)
    mask = Positions(torch.arange(tq), torch.arange(tk))
    out, lse, *grads = computed(q, k, v, do, mask, backend)
    assert not out.any()
    assert torch.isneginf(lse).all()
    for grad, like in zip(grads, (q, k, v), strict=True):
        assert grad.shape == like.shape
        assert not grad.any()
