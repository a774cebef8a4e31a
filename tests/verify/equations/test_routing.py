"""Equations of routers: choices and weights that can be counted by hand, and the noise by its definition."""

import pytest
import torch

from longctx.mixers.head_mixture import HeadMixtureConfig
from longctx.model.moe import MoeConfig
from longctx.moe.noise import jitter_factors
from longctx.parallel.layout import Layout
from longctx.verify.equations.common import LayerContext
from longctx.verify.equations.routing import balance, expert_weights, heads_by_norm, jitter, largest


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)[None]


def moe(**changes):
    return MoeConfig(**({"experts": 4, "active": 2, "hidden": 1, "balance": 0.0} | changes))


def test_of_equal_scores_the_first_is_chosen():
    assert largest(rows([1, 2, 2, 0], [0, 0, 0, 0]), 2).long().tolist() == [[[0, 1, 1, 0], [1, 1, 0, 0]]]


def test_an_even_load_has_a_balance_of_one_choice_per_token():
    p = rows([0.25] * 4, [0.25] * 4)
    assert float(balance(p, rows([1, 0, 0, 1], [0, 1, 1, 0]).bool())) == pytest.approx(2)
    assert float(balance(rows([1.0, 0], [1, 0]), rows([1, 0], [1, 0]).bool())) == pytest.approx(2)


SCORES = rows([0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.3, 0.2])


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, [[4 / 7, 3 / 7, 0, 0], [0, 0, 3 / 7, 4 / 7], [4 / 7, 0, 3 / 7, 0]]),
        ({"normalize": False, "scale": 2.0}, [[0.8, 0.6, 0, 0], [0, 0, 0.6, 0.8], [0.8, 0, 0.6, 0]]),
        # The third token's best pair is of two groups: it takes the group with the larger best score.
        ({"groups": 2, "normalize": False}, [[0.4, 0.3, 0, 0], [0, 0, 0.3, 0.4], [0.4, 0.1, 0, 0]]),
        # One choice per expert is kept: the third token comes too late for both.
        ({"capacity": 2 / 3, "normalize": False}, [[0.4, 0.3, 0, 0], [0, 0, 0.3, 0.4], [0, 0, 0, 0]]),
    ],
    ids=str,
)
def test_weights_of_experts(changes, want):
    weights, loss = expert_weights(SCORES, SCORES.log(), moe(**changes), None)
    torch.testing.assert_close(weights, rows(*want))
    assert float(loss) == 0


def test_a_bias_takes_part_in_the_choice_only():
    weights, _ = expert_weights(SCORES, SCORES.log(), moe(normalize=False), rows([0, 0, 0, 1.0])[0])
    torch.testing.assert_close(weights, rows([0.4, 0, 0, 0.1], [0, 0, 0.3, 0.4], [0.4, 0, 0, 0.2]))


def test_losses_of_experts():
    _, z = expert_weights(SCORES, SCORES.log() + 3, moe(z=0.5), None)
    assert float(z) == pytest.approx(0.5 * 9)
    _, load = expert_weights(SCORES, SCORES.log(), moe(balance=0.5), None)
    # f = (2, 1, 2, 1) / 3, P = (0.9, 0.6, 0.8, 0.7) / 3, over E = 4 experts and 2 active ones.
    assert float(load) == pytest.approx(0.5 / 2 * 4 * (2 * 0.9 + 0.6 + 2 * 0.8 + 0.7) / 9)
    _, sigmoid = expert_weights(2 * SCORES, SCORES.log(), moe(balance=0.5, score="sigmoid"), None)
    assert float(sigmoid) == pytest.approx(float(load)), "shares of sigmoid scores add up to 1"


def test_heads_by_norm_have_weight_one_and_the_gradient_of_their_probability():
    q = torch.tensor([[[[9.0, 9], [3, 4], [0, 1], [0, 2]]]], dtype=torch.float64, requires_grad=True)
    factors = heads_by_norm(q, HeadMixtureConfig(mixers=("softmax",), active=2, shared=1, router="norm"))
    assert factors.active.tolist() == factors.weights.tolist() == [[[1, 1, 0, 1]]]
    (gradient,) = torch.autograd.grad(factors.weights[0, 0, 1], q)
    assert gradient[0, 0, 0].tolist() == [0, 0]
    assert gradient[0, 0, 1, 1] > 0
    assert gradient[0, 0, 3, 1] < 0


@pytest.mark.parametrize(("sequence", "layer"), [(0, 0), (5, 3)])
def test_the_noise_is_that_of_the_token_to_the_bit(sequence, layer):
    x = torch.zeros(2, 7, 5)
    want = jitter_factors(Layout((0, 7), sequence=sequence), 0.3, x.shape, layer, torch.device("cpu"))
    assert torch.equal(jitter(x, 0.3, LayerContext((0, 7), layer, 4, 1e-5, sequence)), want.double())
