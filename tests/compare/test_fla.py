"""The linear recurrences against the naive ones of flash-linear-attention.

Conventions of theirs: `[B, T, H, .]`, for the delta rule and retention `[B, H, T, .]`; the scale is K^-1/2 where it is
no argument; keys are taken as they are given; beta multiplies what is written and what is erased; the decay acts before
the delta rule, `(I - beta k k^T) diag(alpha) S`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

import pytest
import torch

from longctx.kernels.linear.api import linear_attention
from tests.compare.peers import LENGTHS, by_chunks, check, each_of_ours, in_float64, peer, with_gradients
from tests.kernels.linear.cases import GROUPS, draw, named_gates

linear_attn = peer("fla.ops.linear_attn.naive")
simple_gla = peer("fla.ops.simple_gla.naive")
log_linear_attn = peer("fla.ops.log_linear_attn.naive")
gla = peer("fla.ops.gla.naive")
delta_rule = peer("fla.ops.delta_rule.naive")
gated_delta_rule = peer("fla.ops.gated_delta_rule.naive")
gated_delta_product = peer("fla.ops.gated_delta_product.naive")
comba = peer("fla.ops.comba.naive")
kda = peer("fla.ops.kda.naive")
gdn2 = peer("fla.ops.gdn2.naive")
iplr = peer("fla.ops.generalized_delta_rule.iplr.naive")
dplr = peer("fla.ops.generalized_delta_rule.dplr.naive")

K, V = 5, 7


@dataclass(frozen=True)
class Naive:
    """A function of theirs: of q, k, v, the gates by name, scale and initial_state, with o and the end state.

    `scale` None: it has none but K^-1/2. One without `state` starts with zeros, and does not tell its end.
    """

    kind: str
    call: Callable
    scale: float | None = 0.3
    heads: str = "one each"
    state: bool = True


def heads_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def by_linear_attn(q, k, v, scale, initial_state):
    return linear_attn.naive_recurrent_linear_attn(q, k, v, scale, initial_state, output_final_state=True)


def by_simple_gla(q, k, v, log_decay, scale, initial_state):
    gates = log_decay.expand(*q.shape[:2], -1) if log_decay.dim() == 1 else log_decay
    return simple_gla.naive_recurrent_simple_gla(q, k, v, gates, scale, initial_state, output_final_state=True)


def by_parallel_simple_gla(q, k, v, log_decay, scale, initial_state):
    return simple_gla.naive_parallel_simple_gla(q, k, v, log_decay, scale)[0], None


def by_chunked_simple_gla(q, k, v, log_decay, scale, initial_state):
    return simple_gla.naive_chunk_simple_gla(q, k, v, log_decay, initial_state, True, chunk_size=32, scale=scale)


def by_log_linear_attn(q, k, v, log_decay, scale, initial_state):
    # With the same weight on all of its levels it is the recurrence without levels.
    levels = q.new_ones(*log_decay.shape, 12)
    return log_linear_attn.naive_log_linear_attn(q, k, v, log_decay, levels, scale), None


def by_gla(q, k, v, log_decay, scale, initial_state):
    return gla.naive_recurrent_gla(q, k, v, log_decay, initial_state, output_final_state=True)


def by_delta_rule(q, k, v, beta, scale, initial_state):
    o, end = delta_rule.delta_rule_recurrence(*heads_first(q, k, v, beta), initial_state, True)
    return o.transpose(1, 2), end


def by_chunked_delta_rule(q, k, v, beta, scale, initial_state):
    chunk_size = gcd(q.shape[1], 60)
    o, _ = delta_rule.delta_rule_chunkwise(*heads_first(q, k, v, beta), chunk_size)
    return o.transpose(1, 2), None


def by_iplr(q, k, v, beta, scale, initial_state):
    beta = beta[..., None]
    o, end = iplr.iplr_recurrence(*heads_first(q, k, beta * v, k, -beta * k), initial_state, True)
    return o.transpose(1, 2), end


def by_gated_delta_rule(q, k, v, log_decay, beta, scale, initial_state):
    return gated_delta_rule.naive_recurrent_gated_delta_rule(q, k, v, beta, log_decay, scale, initial_state, True)


def by_chunked_gated_delta_rule(q, k, v, log_decay, beta, scale, initial_state):
    return gated_delta_rule.naive_chunk_gated_delta_rule(q, k, v, log_decay, beta, 32, scale, initial_state, True)


def by_gated_delta_product(q, k, v, log_decay, beta, scale, initial_state):
    function = gated_delta_product.naive_recurrent_gated_delta_product
    return function(q, k, v, log_decay, beta, scale, initial_state=initial_state)


def by_comba(q, k, v, log_decay, beta, scale, initial_state):
    return comba.naive_recurrent_comba(q, k, v, k, beta, log_decay, scale, initial_state, True)


def by_kda(q, k, v, log_decay, beta, scale, initial_state):
    return kda.naive_recurrent_kda(q, k, v, log_decay, beta, scale, initial_state, True)


def by_chunked_kda(q, k, v, log_decay, beta, scale, initial_state):
    return kda.naive_chunk_kda(q, k, v, log_decay, beta, scale, initial_state, True, chunk_size=gcd(q.shape[1], 60))


def by_gdn2(q, k, v, log_decay, beta, scale, initial_state):
    # Their two gates, one for each channel of the key and of the value, are both our beta.
    erase, write = beta[..., None].expand_as(k), beta[..., None].expand_as(v)
    return gdn2.naive_recurrent_gdn2(q, k, v, log_decay, erase, write, scale, initial_state, True)


def by_dplr(q, k, v, log_decay, beta, scale, initial_state):
    beta = beta[..., None]
    operands = heads_first(q, k, beta * v, k * log_decay.exp(), -beta * k, log_decay)
    o, end = dplr.dplr_recurrence(*operands, initial_state, True)
    return o.transpose(1, 2), end


NAIVE = {
    "linear attention": Naive("no decay", by_linear_attn),
    "simple GLA, constant": Naive("constant", by_simple_gla),
    "simple GLA": Naive("scalar", by_simple_gla),
    "simple GLA, chunked": Naive("scalar", by_chunked_simple_gla),
    "simple GLA, parallel": Naive("scalar", by_parallel_simple_gla, state=False),
    "log-linear attention": Naive(
        "scalar", by_log_linear_attn, heads="fewer queries and keys, as in Mamba-2", state=False
    ),
    "GLA": Naive("vector", by_gla, scale=None),
    "delta rule": Naive("delta", by_delta_rule, scale=None),
    "delta rule, chunked": Naive("delta", by_chunked_delta_rule, scale=None, state=False),
    "IPLR": Naive("delta", by_iplr, scale=None),
    "gated delta rule": Naive("delta, scalar", by_gated_delta_rule),
    "gated delta rule, chunked": Naive("delta, scalar", by_chunked_gated_delta_rule),
    "gated delta product": Naive("delta, scalar", by_gated_delta_product),
    "comba": Naive("delta, scalar", by_comba),
    "KDA": Naive("delta, vector", by_kda),
    "KDA, fewer keys": Naive("delta, vector", by_kda, heads="fewer queries and keys, as in Mamba-2"),
    "KDA, chunked": Naive("delta, vector", by_chunked_kda),
    "Gated DeltaNet 2": Naive("delta, vector", by_gdn2),
    "DPLR": Naive("delta, vector", by_dplr, scale=None),
}
each_naive = pytest.mark.parametrize("naive", NAIVE.values(), ids=NAIVE.keys())


def inputs(naive, length, dtype=torch.float64, strong=False):
    """The tensors that go in, by name, and the gradients of what comes out."""
    case = draw(naive.kind, length, heads=GROUPS[naive.heads], key_dim=K, value_dim=V, strong=strong).to(dtype)
    leaves = {"q": case.q, "k": case.k, "v": case.v, **named_gates(case, case.gates)}
    if naive.state:
        leaves["initial_state"] = case.state
    return leaves, {"o": case.do, "end": case.dend}


def theirs(naive, leaves, cotangents):
    def call(initial_state=None, **tokens):
        return naive.call(**tokens, scale=naive.scale or K**-0.5, initial_state=initial_state)

    return with_gradients(call, leaves, cotangents)


def ours_like_theirs(ours, naive, leaves, cotangents):
    def call(**leaves):
        out, end = ours(**leaves, scale=naive.scale or K**-0.5)
        return out, end if naive.state else None

    return with_gradients(call, leaves, cotangents)


@each_naive
@each_of_ours
@pytest.mark.parametrize("length", LENGTHS)
def test_recurrence_and_gradients_are_theirs(naive, ours, length):
    leaves, cotangents = inputs(naive, length)
    with in_float64():
        want = theirs(naive, leaves, cotangents)
    check(ours_like_theirs(ours, naive, leaves, cotangents), want, 1e-11)


@each_naive
def test_float32_as_they_compute_it(naive):
    leaves, cotangents = inputs(naive, 130, torch.float32)
    want = theirs(naive, leaves, cotangents)
    check(ours_like_theirs(by_chunks, naive, leaves, cotangents), want, 1e-5)


# Of their functions, those that take the sum of all decays before they look at differences lose the small ones here.
@pytest.mark.parametrize("name", ["simple GLA", "GLA", "gated delta rule", "KDA", "Gated DeltaNet 2", "DPLR"])
@each_of_ours
def test_decays_that_forget_everything_are_theirs(name, ours):
    naive = NAIVE[name]
    leaves, cotangents = inputs(naive, 130, strong=True)
    with in_float64():
        want = theirs(naive, leaves, cotangents)
    check(ours_like_theirs(ours, naive, leaves, cotangents), want, 1e-11)


@each_naive
def test_packed_documents_are_their_sequences(naive):
    leaves, cotangents = inputs(naive, 130)
    leaves.pop("initial_state", None)
    bounds = (0, 1, 34, 64, 130)

    def document(begin, end, tokens):
        cut = {name: x if x.dim() == 1 else x[:, begin:end] for name, x in tokens.items()}
        return naive.call(**cut, scale=naive.scale or K**-0.5, initial_state=None)[0]

    def call(**tokens):
        return torch.cat([document(begin, end, tokens) for begin, end in pairwise(bounds)], dim=1), None

    def packed(**tokens):
        return linear_attention(**tokens, scale=naive.scale or K**-0.5, cu_seqlens=bounds)

    with in_float64():
        want = with_gradients(call, leaves, cotangents)
    check(with_gradients(packed, leaves, cotangents), want, 1e-11)
