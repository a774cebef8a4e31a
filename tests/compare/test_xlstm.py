"""The matrix memory of transformers' xLSTM.

It is the recurrence with the logarithm of the sigmoid of the forget gate as decay and keys times the exponential of
the input gate. Its normalizer is a value channel of ones, taken without its sign and not below 1. They keep both
scaled by exp(-m), m the largest logarithm so far, which cancels.
"""

from math import gcd

import pytest
import torch
from torch.nn import functional as F

from tests.compare.peers import LENGTHS, check, each_of_ours, in_float64, peer, with_gradients
from tests.kernels.linear.cases import draw

xlstm = peer("transformers.models.xlstm.modeling_xlstm")

HEADS, KEY_DIM, VALUE_DIM = 3, 5, 7


def inputs(length):
    case = draw("no decay", length, key_dim=KEY_DIM, value_dim=VALUE_DIM)
    generator = torch.Generator().manual_seed(1)
    leaves = {"q": case.q, "k": case.k, "v": case.v}
    for name in ("input_gate", "forget_gate"):
        leaves[name] = 2 * torch.randn(2, length, HEADS, generator=generator, dtype=torch.float64)
    return leaves, case


@each_of_ours
@pytest.mark.parametrize("length", LENGTHS)
def test_token_by_token(ours, length):
    leaves, case = inputs(length)
    generator = torch.Generator().manual_seed(2)
    leaves["state"] = case.state
    leaves["normalizer"], leaves["m"] = (
        torch.randn(2, HEADS, size, generator=generator, dtype=torch.float64) for size in (KEY_DIM, 1)
    )
    cotangents = {"o": case.do, "end": torch.cat([case.dend, case.dend[..., :1]], dim=-1)}

    def theirs(q, k, v, input_gate, forget_gate, state, normalizer, m):
        operands = (x.transpose(1, 2) for x in (q, k, v, input_gate, forget_gate))
        out, (state, normalizer, m) = xlstm.mlstm_recurrent_sequence_native(
            *operands, state, normalizer, m, return_last_states=True, eps=0.0
        )
        return out.transpose(1, 2), torch.cat([state, normalizer[..., None]], dim=-1) * m[..., None].exp()

    def written_out(q, k, v, input_gate, forget_gate, state, normalizer, m):
        state = torch.cat([state, normalizer[..., None]], dim=-1) * m[..., None].exp()
        return cache(ours, q, k, v, input_gate, forget_gate, state)

    agree(theirs, written_out, leaves, cotangents)


@each_of_ours
@pytest.mark.parametrize("length", LENGTHS)
def test_chunks(ours, length):
    leaves, case = inputs(length)

    def theirs(q, k, v, input_gate, forget_gate):
        operands = (x.transpose(1, 2) for x in (q, k, v, input_gate, forget_gate))
        out = xlstm.mlstm_chunkwise_native_autograd(*operands, eps=0.0, chunk_size=gcd(length, 60))
        return out.transpose(1, 2), None

    def written_out(q, k, v, input_gate, forget_gate):
        return cache(ours, q, k, v, input_gate, forget_gate)[0], None

    agree(theirs, written_out, leaves, {"o": case.do})


def cache(ours, q, k, v, input_gate, forget_gate, state=None):
    values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    keys, log_decay = k * input_gate.exp()[..., None], F.logsigmoid(forget_gate)
    out, end = ours(q, keys, values, log_decay, scale=KEY_DIM**-0.5, initial_state=state)
    return out[..., :-1] / out[..., -1:].abs().clamp(min=1), end


def agree(theirs, written_out, leaves, cotangents):
    with in_float64():
        want = with_gradients(theirs, leaves, cotangents)
    check(with_gradients(written_out, leaves, cotangents), want, 1e-11)
