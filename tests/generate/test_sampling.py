"""How the next token is drawn."""

import math

import pytest
import torch

from longctx.errors import UserError
from longctx.generate import Sampling

SHARES = (0.125, 0.5, 0.25, 0.125)
LOGITS = torch.tensor(SHARES).log()


def shares(sampling, logits=LOGITS, draws=4000):
    """The share of chances that give each token."""
    drawn = [sampling.draw(logits, (n + 0.5) / draws) for n in range(draws)]
    return [drawn.count(token) / draws for token in range(len(logits))]


def about(*values):
    return pytest.approx(values, abs=1e-3)


def test_tokens_have_their_share_of_chance():
    assert shares(Sampling()) == about(*SHARES)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    want = (LOGITS.double() / temperature).softmax(dim=0).tolist()
    assert shares(Sampling(temperature)) == about(*want)


def test_at_temperature_0_the_most_probable_is_taken_and_at_a_tiny_one_too():
    for temperature in (0.0, 1e-300, 1e-9):
        assert shares(Sampling(temperature), 3 * LOGITS, 50) == [0, 1, 0, 0]
    assert Sampling(1e-300).draw(torch.tensor([1e30, -1e30, 3e38]), 0.999) == 2


@pytest.mark.parametrize(
    ("top_k", "want"), [(1, (0, 1, 0, 0)), (2, (0, 2 / 3, 1 / 3, 0)), (3, (1 / 7, 4 / 7, 2 / 7, 0)), (9, SHARES)]
)
def test_top_k_leaves_the_most_probable_the_first_of_equals(top_k, want):
    assert shares(Sampling(top_k=top_k)) == about(*want)


@pytest.mark.parametrize(
    ("top_p", "want"),
    [
        (1e-9, (0, 1, 0, 0)),
        (0.49, (0, 1, 0, 0)),
        (0.51, (0, 2 / 3, 1 / 3, 0)),
        (0.74, (0, 2 / 3, 1 / 3, 0)),
        (0.76, (1 / 7, 4 / 7, 2 / 7, 0)),
        (0.88, SHARES),
        (1.0, SHARES),
    ],
)
def test_top_p_leaves_the_fewest_that_have_the_share(top_p, want):
    assert shares(Sampling(top_p=top_p)) == about(*want)


def test_top_p_is_a_share_of_what_top_k_leaves():
    # Of 0.5 and 0.25 the first has two thirds.
    assert shares(Sampling(top_k=2, top_p=0.66)) == about(0, 1, 0, 0)
    assert shares(Sampling(top_k=2, top_p=0.67)) == about(0, 2 / 3, 1 / 3, 0)


@pytest.mark.parametrize("chance", [0.0, math.nextafter(1.0, 0.0)])
def test_the_ends_of_chance_draw_a_token_that_is_left(chance):
    assert Sampling(top_p=0.6).draw(LOGITS, chance) in (1, 2)
    assert Sampling().draw(torch.tensor([0.0, -math.inf, -math.inf]), chance) == 0


def test_bf16_logits_are_drawn_from_as_they_are():
    rounded = torch.randn(50, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert shares(Sampling(), rounded) == about(*rounded.double().softmax(dim=0).tolist())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "temperature: -0.1 is out of range; give 0 "),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"temperature": math.inf}, "temperature: inf"),
        ({"top_k": 0}, "top_k: 0 is out of range"),
        ({"top_p": 0.0}, "top_p: 0.0 is out of range"),
        ({"top_p": 1.1}, "top_p: 1.1 is out of range"),
        ({"seed": -1}, "seed: -1 is out of range"),
        ({"seed": 2**63}, "seed: 9223372036854775808 is out of range"),
    ],
)
def test_a_value_out_of_range_is_named(options, words):
    with pytest.raises(UserError, match=words):
        Sampling(**options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(temperature):
    with pytest.raises(UserError, match="NaN"):
        Sampling(temperature).draw(torch.tensor([0.0, math.nan]), 0.5)
