"""Retention: the layer against its equations."""

import pytest
import torch

from longctx.mixers.retention import RetentionConfig, log_decays
from longctx.verify.equations.constant_decay import retention
from tests.mixers.equations import check, each_of

EQUATIONS = {"R": retention}


@each_of("R")
def test_layer_and_gradients_equal_the_equations(letter):
    check(letter, EQUATIONS[letter[0]])


def test_decays_are_the_papers():
    assert [pytest.approx(1 - 2.0 ** (-5 - h)) for h in range(3)] == torch.tensor(log_decays(3)).exp().tolist()


def test_sizes_that_do_not_fit_are_named_by_their_key():
    (problem,) = RetentionConfig(heads=4).problems(12)
    assert problem.startswith("head_dim: 3 has to be even for rotary embedding")
