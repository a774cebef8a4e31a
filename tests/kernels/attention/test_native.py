"""Attention in C++: what the tests of all backends (test_positions.py) do not reach."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longctx.kernels.attention import block as attention
from longctx.kernels.attention import native
from longctx.kernels.attention.block import CAUSAL, FULL, IntervalMask, packed_documents
from tests.kernels.attention.cases import by_reference, dense, draw, gathered

pytestmark = pytest.mark.skipif(not native.is_built(), reason="needs a C++ compiler")
NAMES = ["documents", "causal", "gathered"]
DOCUMENTS = packed_documents((0, 1, 63, 64, 129, 300))


def computed(q, k, v, do, mask, scale=0.2):
    out, lse = attention.forward(q, k, v, mask, scale, "cpu-native")
    return out, lse, *attention.backward(do, q, k, v, out, lse, mask, scale, "cpu-native")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_dim", "value_dim"), [(6, 2, 16, 16), (3, 3, 33, 64), (4, 1, 128, 100), (2, 2, 1, 1)]
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)], ids=str)
def test_several_blocks_of_queries_and_keys(heads, kv_heads, key_dim, value_dim, dtype, bound):
    inputs = draw(300, 300, heads, kv_heads, key_dim, value_dim, dtype=dtype)
    want = by_reference(*(x.double() for x in inputs), dense(DOCUMENTS), 0.2)
    for got, ref in zip(computed(*inputs, DOCUMENTS), want, strict=True):
        assert (got.double() - ref).norm() <= bound * max(ref.norm(), 1)


@pytest.mark.parametrize("scale", [0.0, 30.0, -2.0])
def test_large_scores(scale):
    inputs = draw(90, 90, dtype=torch.float32)
    want = by_reference(*(x.double() for x in inputs), torch.ones(90, 90, dtype=torch.bool).tril(), scale)
    for got, ref in zip(computed(*inputs, CAUSAL, scale), want, strict=True):
        assert (got.double() - ref).norm() <= 1e-4 * max(ref.norm(), 1)


@pytest.mark.parametrize(
    "mask", [DOCUMENTS, gathered(300, 300, IntervalMask(window=50))], ids=["documents", "gathered"]
)
def test_results_do_not_depend_on_the_number_of_threads(mask):
    inputs, before, found = draw(300, 300, 4, 2, 24, 8, dtype=torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(computed(*inputs, mask))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
def test_what_does_not_see_a_nan_does_not_change_by_a_bit(name):
    inputs = dict(zip(("q", "k", "v", "do"), draw(200, 200, dtype=torch.float32), strict=True))
    mask = packed_documents((0, 70, 200))
    want = computed(**inputs, mask=mask)
    inputs[name] = inputs[name].clone()
    inputs[name][:, 100] = float("nan")
    got = computed(**inputs, mask=mask)
    for part, x, y in zip(("out", "lse", "dq", "dk", "dv"), want, got, strict=True):
        x, y = (z.transpose(1, 2) if part == "lse" else z for z in (x, y))
        # The first document, and of the second the queries before.
        unchanged = slice(0, 100 if part in ("out", "lse", "dq") else 70)
        assert torch.equal(x[:, unchanged], y[:, unchanged]), part


def test_a_long_sequence_in_float32():
    q, k, v, _ = draw(20_000, 20_000, 1, 1, 16, 16, batch=1, dtype=torch.float32)
    out, lse = attention.forward(q, k, v, CAUSAL, 0.25, "cpu-native")
    at = torch.tensor([0, 1, 9_999, 19_999])
    scores = 0.25 * torch.einsum("td,sd->ts", q[0, at, 0].double(), k[0, :, 0].double())
    scores = scores.masked_fill(torch.arange(20_000) > at[:, None], float("-inf"))
    torch.testing.assert_close(out[0, at, 0].double(), scores.softmax(-1) @ v[0, :, 0].double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse[0, 0, at].double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_half_of_the_keys_with_the_out_and_lse_of_all():
    q, k, v, do = draw(100, 80, dtype=torch.float32)
    want = by_reference(*(x.double() for x in (q, k, v, do)), torch.ones(100, 80, dtype=torch.bool), 0.2)
    out, lse = (x.float() for x in want[:2])
    grads = attention.backward(do, q, k[:, 40:], v[:, 40:], out, lse, FULL, 0.2, "cpu-native")
    for got, ref in zip(grads[1:], want[3:], strict=True):
        assert (got.double() - ref[:, 40:]).norm() <= 2e-6 * ref.norm()


@pytest.mark.parametrize("mask", [DOCUMENTS, CAUSAL, gathered(300, 300, IntervalMask(window=50))], ids=NAMES)
def test_flops_are_those_of_the_pairs_that_are_seen(mask):
    inputs = draw(300, 300, 4, 2, 24, 8, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        computed(*inputs, mask)
    seen = torch.ones(300, 300, dtype=torch.bool).tril() if mask is CAUSAL else dense(mask)
    pairs = int(seen.expand(2, 4, 300, 300).sum())
    assert counter.get_total_flops() == 2 * pairs * ((24 + 8) + (3 * 24 + 2 * 8))


def test_the_compiler_takes_it_whole():
    q, k, v, _ = draw(40, 40, dtype=torch.float32)
    compiled = torch.compile(lambda *x: attention.forward(*x, CAUSAL, 0.3), backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(q, k, v), attention.forward(q, k, v, CAUSAL, 0.3, "cpu-native"), strict=True):
        assert torch.equal(got, want)
