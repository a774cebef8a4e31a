"""The lightning recurrence against that of flash-linear-attention."""

import pytest
import torch

from longctx.kernels import reference
from longctx.kernels.linear import linear_attention

naive = pytest.importorskip("fla.ops.simple_gla.naive", reason="pip install 'longctx[compare]' to compare with fla")


def draw(length):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, length, 3, 5, generator=generator) for _ in range(2))
    v = torch.randn(2, length, 3, 7, generator=generator)
    state = torch.randn(2, 3, 5, 7, generator=generator)
    return q, k, v, state, -torch.tensor([0.0, 0.05, 1.3])


@pytest.mark.parametrize("length", [1, 200])
def test_simple_gla_with_a_constant_gate_is_the_lightning_recurrence(length):
    q, k, v, state, log_decay = draw(length)
    gates = log_decay.expand(2, length, 3)
    # fla computes in float32.
    want, want_state = naive.naive_recurrent_simple_gla(
        q, k, v, gates, scale=1.0, initial_state=state, output_final_state=True
    )
    out, final = reference.linear_recurrence(q, k, v, log_decay, initial_state=state)
    torch.testing.assert_close(out, want.to(out.dtype), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(final, want_state, rtol=1e-5, atol=1e-4)

    out, final = linear_attention(q, k, v, log_decay, initial_state=state, final_state=True)
    torch.testing.assert_close(out, want.to(out.dtype), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(final, want_state, rtol=1e-5, atol=1e-4)
