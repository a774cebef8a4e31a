"""Retention: the layer against its equations."""

import pytest
import torch

from longctx.mixers.retention import RetentionConfig, log_decays
from tests.mixers.equations import check, each_of, heads, normed, projected, recurrence, silu, turned


def retention(m, x, c):
    q, k, v = projected(m, x, c.heads)
    decays = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(c.heads)], dtype=torch.float64).log()
    o = recurrence(turned(q, 1e4), turned(k, 1e4) / c.head_dim**0.5, v, decays)
    gate = heads(silu(x @ m.gate.weight.T), c.heads)
    return (normed(o) * m.norm.weight * gate).flatten(2) @ m.out.weight.T


EQUATIONS = {"R": retention}


@each_of("R")
def test_layer_and_gradients_equal_the_equations(letter):
    check(letter, EQUATIONS[letter[0]])


def test_decays_are_the_papers():
    assert [pytest.approx(1 - 2.0 ** (-5 - h)) for h in range(3)] == torch.tensor(log_decays(3)).exp().tolist()


def test_sizes_that_do_not_fit_are_named_by_their_key():
    (problem,) = RetentionConfig(heads=4).problems(12)
    assert problem.startswith("head_dim: 3 has to be even for rotary embedding")
