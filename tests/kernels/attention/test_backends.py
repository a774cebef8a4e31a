"""The choice of a backend, and the backends that packages and GPUs bring."""

import sys
import types
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from longctx.kernels.attention import backends as attention_backends
from longctx.kernels.attention import block as attention
from longctx.kernels.attention import native
from longctx.kernels.attention.backends import BACKENDS, Call, by_preference
from longctx.kernels.attention.block import CAUSAL, FULL, IntervalMask, explain_backends, sliding_window
from longctx.kernels.attention.flex import Flex
from longctx.kernels.attention.vendor import FlashAttn
from tests.kernels.attention.cases import by_reference, dense, draw, masks

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
WINDOW = IntervalMask(window=2)


def first_able(call):
    return next(name for name in by_preference(call) if BACKENDS[name].refusal(call) is None)


@pytest.fixture
def _gpu(monkeypatch):
    """What is asked of the machine, answered as by an H100 with torch and triton alone."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(attention_backends, "_flash_attn_version", lambda: None)
    monkeypatch.setattr(attention_backends, "_has_triton", lambda: True)
    monkeypatch.setattr(native, "is_built", lambda: True)
    kernels = types.SimpleNamespace(MAX_HEAD_DIM=256, INTERPRETED=False)
    monkeypatch.setitem(sys.modules, "longctx.kernels.attention.triton", kernels)
    monkeypatch.setattr(sys.modules["longctx.kernels.attention"], "triton", kernels, raising=False)


@pytest.mark.usefixtures("_gpu")
def test_the_first_backend_that_lacks_nothing_is_taken(monkeypatch):
    window, ragged = sliding_window(4, 4, WINDOW), torch.ones(4, 4, dtype=torch.bool)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    expected = {
        (cpu, F32, FULL, 64): "cpu-native",
        (cpu, BF16, window, 64): "cpu-native",
        (cpu, F64, window, 64): "cpu-flash",
        (cpu, F32, ragged, 64): "cpu-flash",
        (cuda, BF16, CAUSAL, 128): "cuda-flash",
        (cuda, BF16, window, 128): "triton",
        (cuda, F32, CAUSAL, 128): "triton",
        (cuda, F64, window, 128): "tiled",
        (cuda, BF16, ragged, 128): "tiled",
        (cuda, BF16, FULL, 512): "tiled",
    }
    for (device, dtype, mask, head_dim), name in expected.items():
        assert first_able(Call(device, dtype, mask, head_dim, 1)) == name, (device, dtype, mask, head_dim)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    monkeypatch.setattr(attention_backends, "_flash_attn_version", lambda: (2, 8))
    assert first_able(Call(cuda, BF16, CAUSAL, 128, 1)) == "flash-attn"
    monkeypatch.setattr(attention_backends, "_flash_attn_version", lambda: (2, 6))
    assert first_able(Call(cuda, BF16, CAUSAL, 128, 1)) == "triton"
    monkeypatch.setattr(attention_backends, "_has_triton", lambda: False)
    assert first_able(Call(cuda, BF16, CAUSAL, 128, 1)) == "cuda-cudnn"
    assert first_able(Call(cuda, BF16, window, 128, 1)) == "tiled"


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
@pytest.mark.parametrize("reproducible", [False, True])
def test_from_hopper_on_cudnn_goes_ahead_where_shapes_repeat(monkeypatch, capability, reproducible):
    """Of lengths that are multiples of 1024, and forward alone where the backward pass has to repeat bitwise."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    window = sliding_window(4, 4, WINDOW)
    plain = Call(torch.device("cuda"), BF16, CAUSAL, 128, 1, (4096, 4096), reproducible)
    ahead = "cuda-flash" if reproducible or capability < (9, 0) else "cuda-cudnn"
    assert first_able(plain) == ahead
    assert first_able(replace(plain, lengths=(2048, 65536), mask=FULL)) == ahead
    for other in ({"lengths": (4096, 5000)}, {"lengths": (1000, 4096)}, {"lengths": (0, 1024)}, {"head_dim": 192}):
        assert first_able(replace(plain, **other)) == "cuda-flash", other
    assert first_able(replace(plain, mask=window)) == "triton"
    assert first_able(replace(plain, dtype=F32)) == "triton"


@contextmanager
def deterministic(wanted):
    """Torch's deterministic algorithms switched on or off, as they were at the end."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def test_a_backward_pass_has_to_repeat_where_torch_says_so():
    q, k, v, _ = draw(6, 6)
    for wanted in (True, False):
        with deterministic(wanted):
            assert attention_backends.describe(q, k, v, CAUSAL, backward=True).reproducible == wanted
            assert not attention_backends.describe(q, k, v, CAUSAL).reproducible


@pytest.mark.usefixtures("_gpu")
def test_cudnn_refuses_a_backward_pass_that_has_to_repeat_and_says_why():
    call = Call(torch.device("cuda"), BF16, CAUSAL, 128, 1, (1024, 1024))
    assert BACKENDS["cuda-cudnn"].refusal(call) is None
    assert "deterministic" in BACKENDS["cuda-cudnn"].refusal(replace(call, reproducible=True))


@pytest.mark.usefixtures("_gpu")
def test_flex_refuses_a_map_of_tiles_as_large_as_the_sequence_squared():
    call = Call(torch.device("cuda"), BF16, sliding_window(4, 4, WINDOW), 64, (2**20 // 128) ** 2)
    assert BACKENDS["flex"].refusal(call) is None
    many = attention_backends.describe(
        *(torch.empty(1, 2**20, 16, 64, device="meta") for _ in range(3)), masks()["gathered"]
    )
    assert many.tiles == 16 * (2**20 // 128) ** 2
    assert "entries" in BACKENDS["flex"].refusal(Call(torch.device("cuda"), BF16, CAUSAL, 64, many.tiles))


def test_a_named_backend_that_cannot_says_what_it_lacks_and_which_ones_can():
    q, k, v, do = draw(6, 6)
    out, lse = attention.forward(q, k, v, CAUSAL, 1.0)
    for call in (
        lambda: attention.forward(q, k, v, CAUSAL, 1.0, "cuda-flash"),
        lambda: attention.backward(do, q, k, v, out, lse, CAUSAL, 1.0, "cuda-flash"),
    ):
        with pytest.raises(
            ValueError,
            match=r"'cuda-flash' does not support this call: it runs on CUDA.* cpu. Supported by: cpu-flash, tiled",
        ):
            call()
    with pytest.raises(ValueError, match="no backend 'flash'; choose one of cpu-native, cpu-flash"):
        attention.forward(q, k, v, CAUSAL, 1.0, "flash")


def test_decoding_and_what_turns_native_kernels_off_run_torchs_operator(monkeypatch):
    monkeypatch.setattr(native, "is_built", lambda: True)
    call = Call(torch.device("cpu"), BF16, CAUSAL, 64, 1, (native.FEWEST_QUERIES, 100))
    assert first_able(call) == "cpu-native"
    assert first_able(replace(call, lengths=(1, 100))) == "cpu-flash"
    monkeypatch.setattr(native, "is_built", lambda: False)
    assert first_able(call) == "cpu-flash"


def test_explain_says_of_every_backend_what_it_lacks():
    q, k, v, _ = draw(6, 6)
    reasons = explain_backends(q, k, v, sliding_window(6, 6, WINDOW))
    assert list(reasons) == list(BACKENDS)
    assert reasons["cpu-flash"] is None
    assert reasons["tiled"] is None
    assert all(reasons[name] for name in ("cuda-flash", "cuda-cudnn", "flash-attn", "flex", "triton"))


def test_arguments_that_do_not_fit_are_refused():
    q, k, v, _ = draw(6, 8)
    for arguments, message in (
        ((q, k, v[:, :5], FULL), "do not fit"),
        ((q, k[..., :3], v, FULL), "do not fit"),
        ((q, k, v.float(), FULL), "one dtype"),
        ((q, k, v, CAUSAL), "as many queries as keys, not 6 and 8"),
        ((q, k, v, torch.ones(8, 6, dtype=torch.bool)), r"must be bool \(6, 8\)"),
        ((q, k, v, torch.ones(6, 8)), "must be bool"),
        ((q, k, v, sliding_window(6, 7, WINDOW)), "7 keys, but q and k have"),
        ((q, k, v, sliding_window(5, 8, WINDOW)), r"\(5,\) queries"),
    ):
        with pytest.raises(ValueError, match=message):
            attention.forward(*arguments, 1.0)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("mask", [FULL, CAUSAL])
def test_flash_attn_is_given_what_its_functions_name(monkeypatch, mask, heads, kv_heads):
    """Against functions with the package's signatures (2.8) that compute densely, with padded head dims."""
    visible = torch.ones(9, 9, dtype=torch.bool) if mask is FULL else torch.ones(9, 9, dtype=torch.bool).tril()

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        assert q.shape[3] == v.shape[3] == 16
        assert (causal, return_attn_probs) == (mask is CAUSAL, True)
        out, lse, *_ = by_reference(q, k, v, torch.zeros_like(q), visible, softmax_scale)
        return out, lse, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert causal == (mask is CAUSAL)
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
        grads = attention.backward(dout, q, k, v, out, softmax_lse, mask, softmax_scale, "tiled")
        for given, grad in zip((dq, dk, dv), grads, strict=True):
            given.copy_(grad)

    interface = types.SimpleNamespace(_flash_attn_backward=_flash_attn_backward)
    package = types.SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_interface=interface)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    q, k, v, do = draw(9, 9, heads, kv_heads, key_dim=12, value_dim=10)
    want = by_reference(q, k, v, do, visible, 0.3)
    backend = FlashAttn()
    out, lse = backend.forward(q, k, v, mask, 0.3)
    for got, ref in zip((out, lse, *backend.backward(do, q, k, v, out, lse, mask, 0.3)), want, strict=True):
        torch.testing.assert_close(got, ref, rtol=1e-10, atol=1e-10)


def attend(q, k, v, *, block_mask, scale, enable_gqa, return_aux):
    """What flex_attention computes, differentiable on a CPU: the tiles of the map, masked by the mask function."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    batch, heads, tq, tk = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    ranges = [torch.arange(n) for n in (batch, heads, tq, tk)]
    seen = block_mask.mask_mod(*torch.meshgrid(*ranges, indexing="ij"))
    tiles = block_mask.to_dense().bool().repeat_interleave(Flex.TILE, 2).repeat_interleave(Flex.TILE, 3)
    seen = seen & tiles[:, :, :tq, :tk]
    k, v = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    lse = torch.where(seen.any(-1), scores.masked_fill(~seen.any(-1, keepdim=True), 0.0).logsumexp(-1), -torch.inf)
    weights = torch.exp(scores - lse.masked_fill(lse.isinf(), 0.0)[..., None])
    return weights @ v, types.SimpleNamespace(lse=lse)


@pytest.mark.parametrize(
    "name", ["causal", "zigzag halves, documents", "gathered, window", "documents", "nothing seen"]
)
def test_the_gradients_of_flex_are_those_of_the_global_softmax(monkeypatch, name):
    """A block of the keys, with the out and lse of all of them."""
    monkeypatch.setattr(Flex, "TILE", 8)
    mask = masks()[name]
    q, k, v, do = draw(mask.query.shape[-1], len(mask.key), key_dim=6, value_dim=5)
    backend = Flex(attend)
    out, lse = backend.forward(q, k, v, mask, 0.3)
    want = by_reference(q, k, v, do, dense(mask), 0.3)
    for got, ref in zip((out, lse), want, strict=False):
        torch.testing.assert_close(got, ref, rtol=1e-10, atol=1e-10)
    # Other keys, which every query sees as well.
    _, other_k, other_v, _ = draw(1, 7, key_dim=6, value_dim=5)
    others, others_lse = attention.forward(q, other_k, other_v, FULL, 0.3)
    attention.merge_(out, lse, others, others_lse)
    want = attention.backward(do, q, k, v, out, lse, mask, 0.3, "tiled")
    for got, ref in zip(backend.backward(do, q, k, v, out, lse, mask, 0.3), want, strict=True):
        torch.testing.assert_close(got, ref, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["zigzag halves, documents", "gathered, window"])
def test_flex_attention_itself_takes_the_map_and_gives_its_lse(name):
    from torch.nn.attention.flex_attention import flex_attention

    mask = masks()[name]
    q, k, v, do = draw(mask.query.shape[-1], len(mask.key), dtype=torch.float32)
    want = by_reference(q, k, v, do, dense(mask), 0.3)
    out, lse = Flex(flex_attention).forward(q, k, v, mask, 0.3)
    torch.testing.assert_close(out, want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, want[1], rtol=1e-5, atol=1e-5)


def on_gpu(mask):
    names = ("query", "key", "query_document", "key_document")
    return replace(mask, **{n: x.cuda() for n in names if (x := getattr(mask, n)) is not None})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["full", "plain causal", "documents and window", "gathered, window", "zigzag halves"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if not name.startswith("cpu-")])
def test_every_backend_of_a_gpu_equals_the_dense_reference_and_takes_the_global_lse(backend, name, dtype):
    tq = tk = 130
    mask, visible = {"full": FULL, "plain causal": CAUSAL}.get(name), torch.ones(tq, tk, dtype=torch.bool)
    if mask is None:
        here = masks()[name]
        mask, visible, tq, tk = on_gpu(here), dense(here), here.query.shape[-1], len(here.key)
    elif mask is CAUSAL:
        visible = visible.tril()
    inputs = draw(tq, tk, 4, 2, 72, 64, dtype=dtype)
    q, k, v, do = (x.cuda() for x in inputs)
    if (lacks := explain_backends(q, k, v, mask)[backend]) is not None:
        pytest.skip(lacks)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    want = by_reference(*(x.double() for x in inputs), visible, 0.3)
    out, lse = attention.forward(q, k, v, mask, 0.3, backend)
    assert torch.equal(lse.isneginf().cpu(), want[1].isneginf())
    with deterministic(False):
        grads = attention.backward(do, q, k, v, out, lse, mask, 0.3, backend)
    for got, ref in zip((out, lse, *grads), want, strict=True):
        got, ref = (x.double().cpu().nan_to_num(neginf=0.0) for x in (got, ref))
        assert (got - ref).norm() <= bound * ref.norm()
    if mask is FULL:
        # The second half of the keys with the out and lse of all.
        at = slice(tk // 2, tk)
        with deterministic(False):
            grads = attention.backward(do, q, k[:, at], v[:, at], out, lse, FULL, 0.3, backend)
        for got, ref in zip(grads[1:], want[3:], strict=True):
            assert (got.double().cpu() - ref[:, at]).norm() <= bound * ref.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("length", [1024, 8192])
def test_on_a_gpu_the_default_backends_repeat_bitwise_where_torch_says_so(length):
    q, k, v, do = (x.cuda() for x in draw(length, length, 8, 2, 128, 128, dtype=torch.bfloat16))
    with deterministic(True):
        out, lse = attention.forward(q, k, v, CAUSAL, 0.1)
        first = (out, lse, *attention.backward(do, q, k, v, out, lse, CAUSAL, 0.1))
        for _ in range(5):
            again = (*attention.forward(q, k, v, CAUSAL, 0.1), *attention.backward(do, q, k, v, out, lse, CAUSAL, 0.1))
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
