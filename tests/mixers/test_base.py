"""Mixer interface: what every mixer inherits, with a mixer that adds up a document's tokens."""

from typing import ClassVar

import pytest
import torch

from longctx.layers.cache import Cache
from longctx.mixers.base import Mixer, MixerConfig, head_dim_problems
from longctx.mixers.head_mixture import HeadMixtureConfig
from longctx.model.initialise import initialise
from longctx.parallel.layout import STATE_SCHEDULES, Layout

HEADS, DIM = 5, 6


class Sum(Mixer):
    """Sums of the tokens so far."""

    def mix(self, x, layout, cache):
        before = 0 if cache is None or cache.state is None else cache.state
        out = before + x.cumsum(dim=1)
        if cache is not None:
            cache.state = out[:, -1:]
        return out

    def shares(self):
        return {}

    def flops(self, layout):
        return 0


class SumConfig(MixerConfig):
    name: ClassVar[str] = "sum"
    letter: ClassVar[str] = "Σ"

    def build(self, dim, layer, depth, eps):
        return Sum()

    def shrunk(self):
        return self

    def problems(self, dim):
        return []


def draw(length):
    return torch.randn(2, length, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_chunked_prefill_matches_a_full_pass_and_counts_the_tokens():
    mixer, x = Sum(), draw(7)
    cache, parts = mixer.new_cache(), []
    with torch.no_grad():
        for begin, end in ((0, 3), (3, 4), (4, 7)):
            parts.append(mixer(x[:, begin:end], Layout((0, end - begin), past_tokens=begin), cache))
            assert cache.tokens == end
    torch.testing.assert_close(torch.cat(parts, dim=1), mixer(x, Layout((0, 7))))


def test_a_call_that_fails_does_not_count_its_tokens():
    class Failing(Sum):
        def mix(self, x, layout, cache):
            raise RuntimeError("out of memory")

    cache = Cache()
    with torch.no_grad(), pytest.raises(RuntimeError, match="out of memory"):
        Failing()(draw(3), Layout((0, 3)), cache)
    assert cache.tokens == 0


@pytest.mark.parametrize("past_tokens", [0, 2, 4])
def test_a_layout_that_does_not_continue_the_cache_is_refused(past_tokens):
    cache = Cache()
    cache.tokens = 3
    with torch.no_grad(), pytest.raises(ValueError, match=r"use Layout\(\(0, n\), past_tokens=3\)"):
        Sum()(draw(2), Layout((0, 2), past_tokens=past_tokens), cache)
    assert cache.tokens == 3


def test_a_cache_is_refused_while_gradients_are_enabled():
    with pytest.raises(ValueError, match="gradients do not flow through cached tokens"):
        Sum()(draw(2), Layout((0, 2)), Cache())


def test_all_heads_are_active_without_a_router():
    mixer = Sum()
    assert mixer.route(draw(3), Layout((0, 3))) is None
    assert mixer.inactive_heads == 0


def test_a_mixture_of_heads_routes_each_token_to_its_active_heads():
    mixer = Sum().double()
    mixer.add_head_router(HeadMixtureConfig(mixers=("sum",), active=2, shared=1), DIM, HEADS)
    mixer.double()
    initialise(mixer, seed=0)
    # One shared head; two of the four others.
    assert mixer.inactive_heads == 2
    routing = mixer.route(draw(9), Layout((0, 9)))
    assert routing.chosen.shape == (2, 9, 4)
    assert (routing.chosen.sum(dim=-1) == 2).all()


def test_defaults_of_a_configuration_are_those_of_a_linear_mixer_without_options():
    config = SumConfig()
    assert config.available_schedules(4, 2) == ("states", STATE_SCHEDULES)
    assert config.routable() is None
    assert config.resolved(DIM) is config
    assert Sum().describe_schedule(Layout((0, 3)), torch.float32) is None


@pytest.mark.parametrize(
    ("dim", "heads", "head_dim", "problems"),
    [
        (12, 3, None, []),
        (12, 5, 4, []),
        (12, 5, None, ["heads: 5 heads do not divide dim 12; set head_dim or change heads"]),
    ],
)
def test_heads_divide_the_width_unless_head_dim_is_set(dim, heads, head_dim, problems):
    assert head_dim_problems(dim, heads, head_dim) == problems
