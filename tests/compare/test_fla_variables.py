"""Mixers of flash-linear-attention that are a linear recurrence after a change of variables."""

import pytest
import torch
from torch.nn import functional as F

from longctx.kernels.linear.api import linear_attention
from tests.compare.peers import LENGTHS, by_chunks, by_reference, check, in_float64, peer, with_gradients
from tests.kernels.linear.cases import draw, named_gates

linear_attn = peer("fla.ops.linear_attn.naive")
based = peer("fla.ops.based.naive")
rebased = peer("fla.ops.rebased.naive")
retention = peer("fla.ops.retention.naive")
simple_gla = peer("fla.ops.simple_gla.naive")
gla = peer("fla.ops.gla.naive")
lightning = peer("fla.ops.lightning_attn.chunk")
chunked_retention = peer("fla.ops.retention.chunk")
lightnet = peer("fla.ops.lightnet.chunk")
hgrn = peer("fla.ops.hgrn.naive")
rwkv6 = peer("fla.ops.rwkv6.recurrent_naive")
delta_product = peer("fla.ops.gated_delta_product.naive")
comba = peer("fla.ops.comba.naive")

each_length = pytest.mark.parametrize("length", LENGTHS)


def inputs(kind, length, **dims):
    """The tensors that go in, by name, and the gradients of what comes out."""
    case = draw(kind, length, **dims)
    leaves = {"q": case.q, "k": case.k, "v": case.v, **named_gates(case, case.gates), "initial_state": case.state}
    return leaves, {"o": case.do, "end": case.dend}


def agree(ours, theirs, leaves, cotangents, bound=1e-11):
    with in_float64():
        want = with_gradients(theirs, leaves, cotangents)
    check(with_gradients(ours, leaves, cotangents), want, bound)


@each_length
def test_normalized_linear_attention(length):
    leaves, cotangents = inputs("no decay", length)
    leaves["z"] = torch.rand(2, 3, 5, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cotangents["end"] = torch.cat([cotangents["end"], cotangents["end"][..., :1]], dim=-1)

    def theirs(q, k, v, initial_state, z):
        state = (initial_state, z.transpose(1, 3).transpose(2, 3))
        out, (end, end_z) = linear_attn.naive_recurrent_linear_attn(q.exp(), k.exp(), v, 0.3, state, True, True)
        return out, torch.cat([end, end_z.transpose(2, 3).transpose(1, 3)], dim=-1)

    def ours(q, k, v, initial_state, z):
        state = torch.cat([initial_state, z], dim=-1)
        options = {"scale": 0.3, "normalize": True, "eps": 1e-10, "final_state": True}
        return linear_attention(q.exp(), k.exp(), v, initial_state=state, **options)

    agree(ours, theirs, leaves, cotangents)


def taylor(x):
    """Features with `taylor(q) . taylor(k) = 1 + q k + (q k)^2 / 2`."""
    return torch.cat([torch.ones_like(x[..., :1]), x, squares(x) / 2**0.5], dim=-1)


def squares(x):
    """Features with `squares(q) . squares(k) = (q k)^2`."""
    return (x[..., :, None] * x[..., None, :]).flatten(-2)


# Alone, a token answers with its value, and the gradient of its query is what rounding leaves.
@pytest.mark.parametrize("length", [2, *LENGTHS[1:]])
@pytest.mark.parametrize(
    ("features", "function"), [(taylor, based.naive_parallel_based), (squares, rebased.naive_parallel_rebased)]
)
def test_normalized_polynomials(length, features, function):
    leaves, cotangents = inputs("no decay", length)
    del leaves["initial_state"]

    def theirs(q, k, v):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return function(*heads_first, scale=0.3, use_norm=True).transpose(1, 2), None

    def ours(q, k, v):
        return linear_attention(features(0.3 * q), features(k), v, normalize=True)

    agree(ours, theirs, leaves, cotangents)


@each_length
def test_retention(length):
    leaves, cotangents = inputs("no decay", length)
    del leaves["initial_state"]
    # They take the powers of two in float32, which `in_float64` reaches.
    decays = torch.log1p(-(2.0 ** -(5 + torch.arange(3, dtype=torch.float64))))

    def theirs(q, k, v):
        return retention.naive_retention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), None

    def ours(q, k, v):
        return linear_attention(q, k, v, decays, scale=5**-0.5)

    agree(ours, theirs, leaves, cotangents)


def naive_simple_gla(q, k, v, scale, g_gamma, initial_state, output_final_state, **options):
    """Their token-by-token recurrence in the place of their kernel, which needs a GPU."""
    g = g_gamma.expand(*q.shape[:3])
    return simple_gla.naive_recurrent_simple_gla(q, k, v, g, scale, initial_state, output_final_state)


@pytest.mark.parametrize("name", ["lightning", "retention"])
def test_their_decays_and_scale(name, monkeypatch):
    leaves, cotangents = inputs("no decay", 45)
    if name == "lightning":
        # Linear in the head, and the first head does not decay: not the slopes of TransNormerLLM.
        decays = -(8 / 3 * (1 - 2 / 6)) * torch.arange(3, dtype=torch.float64)
        module, function, layer = lightning, lightning.chunk_lightning_attn, {"layer_idx": 2, "num_layers": 6}
    else:
        decays = torch.log1p(-(2.0 ** -(5 + torch.arange(3, dtype=torch.float64))))
        module, function, layer = chunked_retention, chunked_retention.chunk_retention, {}
    monkeypatch.setattr(module, "chunk_simple_gla", naive_simple_gla)

    def theirs(q, k, v, initial_state):
        return function(q, k, v, **layer, initial_state=initial_state, output_final_state=True)

    def ours(**leaves):
        return by_chunks(**leaves, log_decay=decays, scale=5**-0.5)

    agree(ours, theirs, leaves, cotangents)


def gate_of_lightnet(x, initial_state, cu_seqlens):
    """Their gate from its equation, in the place of a kernel: z is the log of the sum of all keys' exponentials."""
    z = torch.cat([initial_state, x], dim=1).logcumsumexp(dim=1)
    before, z = z[:, :-1], z[:, 1:]
    return torch.exp(x - z), before - z, z[:, -1:]


@each_length
def test_lightnet(length, monkeypatch):
    leaves, cotangents = inputs("no decay", length)
    leaves["z"] = torch.randn(2, 1, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def naive_gla(q, k, v, g, scale, initial_state, output_final_state, **options):
        return gla.naive_recurrent_gla(q, k, v, g, initial_state, output_final_state)

    monkeypatch.setattr(lightnet, "fused_additive_gate", gate_of_lightnet)
    monkeypatch.setattr(lightnet, "chunk_gla", naive_gla)

    def theirs(q, k, v, initial_state, z):
        out, (end, _) = lightnet.chunk_lightnet(q, k, v, initial_state=(initial_state, z), output_final_state=True)
        return out, end

    def ours(q, k, v, initial_state, z):
        keys, log_decay, _ = gate_of_lightnet(k, z, None)
        return by_chunks(q, keys, v, log_decay, scale=5**-0.5, initial_state=initial_state)

    agree(ours, theirs, leaves, cotangents)


@each_length
@pytest.mark.parametrize("form", [by_reference, by_chunks])
def test_a_channel_of_hgrn_is_a_head_with_one_channel(length, form):
    leaves, cotangents = inputs("scalar", length, key_dim=1, value_dim=1)

    def theirs(q, k, v, log_decay, initial_state):
        out, end = hgrn.naive_recurrent_hgrn((k * v)[..., 0], log_decay, initial_state[..., 0, 0], True)
        return q * out[..., None], end[..., None, None]

    agree(form, theirs, leaves, cotangents)


@each_length
@pytest.mark.parametrize("form", [by_reference, by_chunks])
def test_rwkv6_reads_before_it_writes_and_weights_its_own_token(length, form):
    leaves, cotangents = inputs("vector", length + 1)
    leaves["bonus"] = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def theirs(q, k, v, log_decay, initial_state, bonus):
        operands = (x.transpose(1, 2) for x in (q, k, v, log_decay))
        out, end = rwkv6.naive_recurrent_rwkv6(*operands, bonus, 0.3, initial_state, True)
        return out.transpose(1, 2), end

    def ours(q, k, v, log_decay, initial_state, bonus):
        # The state before a token is read by its query, which stands one place to the left, behind what it does not
        # see: the first one reads the state that came in. The query beyond the last token reads nothing.
        after = torch.cat([q[:, 1:], torch.zeros_like(q[:, :1])], dim=1)
        out, end = form(after, k, v, log_decay, scale=0.3, initial_state=initial_state)
        first = 0.3 * torch.einsum("bhk,bhkv->bhv", q[:, 0], initial_state)[:, None]
        own = 0.3 * (q * bonus * k).sum(dim=-1, keepdim=True) * v
        return torch.cat([first, out[:, :-1]], dim=1) + own, end

    agree(ours, theirs, leaves, cotangents)


@each_length
@pytest.mark.parametrize("form", [by_reference, by_chunks])
@pytest.mark.parametrize("gated", [True, False])
def test_gated_delta_product_is_several_tokens_a_token_of_which_the_first_decays(length, form, gated):
    leaves, cotangents = inputs("delta, scalar", 2 * length)
    leaves["q"], leaves["log_decay"] = leaves["q"][:, ::2], leaves["log_decay"][:, ::2]
    cotangents["o"] = cotangents["o"][:, ::2]
    if not gated:
        del leaves["log_decay"]

    def theirs(q, k, v, beta, initial_state, log_decay=None):
        function = delta_product.naive_recurrent_gated_delta_product
        return function(q, k, v, log_decay, beta, 0.3, initial_state=initial_state, num_householder=2)

    def ours(q, k, v, beta, initial_state, log_decay=None):
        queries = torch.stack([torch.zeros_like(q), q], dim=2).flatten(1, 2)
        if log_decay is not None:
            log_decay = torch.stack([log_decay, torch.zeros_like(log_decay)], dim=2).flatten(1, 2)
        out, end = form(queries, k, v, log_decay, beta, scale=0.3, initial_state=initial_state)
        return out[:, 1::2], end

    agree(ours, theirs, leaves, cotangents)


@each_length
@pytest.mark.parametrize("form", [by_reference, by_chunks])
def test_comba_erases_by_a_share_of_the_key(length, form):
    leaves, cotangents = inputs("delta, scalar", length)
    leaves["share"] = torch.rand(3, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def theirs(q, k, v, log_decay, beta, initial_state, share):
        p = F.sigmoid(share) * k
        return comba.naive_recurrent_comba(q, k, v, p, beta, log_decay, 0.3, initial_state, True)

    def ours(q, k, v, log_decay, beta, initial_state, share):
        share = F.sigmoid(share)
        return form(q, k, v / share, log_decay, beta * share[:, 0], scale=0.3, initial_state=initial_state)

    agree(ours, theirs, leaves, cotangents)
