"""Base of linear mixers: projections to heads, and their cost."""

import pytest
import torch
from torch import nn

from longctx.layers.basic import Linear
from longctx.layers.linear_attention import LowRank
from longctx.mixers.linear_mixer import LinearMixer
from longctx.mixers.retention import RetentionConfig
from longctx.mixers.shares import Share
from longctx.model.initialise import initialise
from longctx.moe.head_router import HeadRouting
from longctx.parallel.layout import Layout

DIM, LENGTH = 6, 7
LAYOUT = Layout((0, 3, LENGTH))


class Projection(LinearMixer):
    """The base class, without a recurrence."""

    def mix(self, x, layout, cache):
        raise NotImplementedError


def built(**options):
    mixer = Projection(DIM, 2, **options).double()
    initialise(mixer, seed=1)
    return mixer


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def routing(heads, routed):
    """Every third (token, head) pair of the last `routed` heads is inactive."""
    chosen = (torch.arange(2 * LENGTH * routed) % 3 > 0).view(2, LENGTH, routed)
    active = torch.cat([torch.ones(2, LENGTH, heads - routed, dtype=torch.bool), chosen], dim=-1)
    return HeadRouting(chosen, active.double(), None), active


@pytest.mark.parametrize("conv", [0, 3])
def test_one_projection_is_split_into_heads_of_queries_keys_and_values(conv):
    mixer, x = built(heads=4, widths=(8, 8, 20), conv=conv, qk_heads=2), draw(2, LENGTH, DIM)
    q, k, v = mixer.project(x, LAYOUT, None, None)
    assert (q.shape, k.shape, v.shape) == ((2, LENGTH, 2, 4), (2, LENGTH, 2, 4), (2, LENGTH, 4, 5))
    want = x @ mixer.qkv.weight.T
    if conv:
        want = mixer.conv(want, LAYOUT, None)
    torch.testing.assert_close(torch.cat([part.flatten(2) for part in (q, k, v)], dim=-1), want)


@pytest.mark.parametrize("conv", [0, 3])
@pytest.mark.parametrize("routed", [3, 2])
def test_queries_of_inactive_heads_are_zero_and_everything_else_stays(conv, routed):
    mixer, x = built(heads=3, widths=(12, 12, 15), conv=conv), draw(2, LENGTH, DIM)
    heads, active = routing(3, routed)
    q, k, v = mixer.project(x, LAYOUT, None, heads)
    all_q, all_k, all_v = mixer.project(x, LAYOUT, None, None)
    assert not active.all()
    torch.testing.assert_close(q, all_q * active[..., None], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(k, all_k, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(v, all_v, rtol=1e-12, atol=1e-14)


def test_an_output_gate_of_one_matrix_is_computed_for_active_heads_only():
    mixer, x = built(heads=3, widths=(12, 12, 15), conv=0), draw(2, LENGTH, DIM)
    heads, active = routing(3, 3)
    gates: list[nn.Module] = [Linear(DIM, 15).double(), LowRank(DIM, 2, 15).double()]
    for gate in gates:
        initialise(gate, seed=2)
    matrix, low_rank = (gate(x).unflatten(-1, (3, 5)) for gate in gates)
    torch.testing.assert_close(mixer.project_gate(gates[0], x, None), matrix)
    torch.testing.assert_close(mixer.project_gate(gates[0], x, heads), matrix * active[..., None])
    torch.testing.assert_close(mixer.project_gate(gates[1], x, heads), low_rank)


@pytest.mark.parametrize("conv", [0, 4])
def test_shares_split_each_part_by_heads(conv):
    mixer = built(heads=3, widths=(12, 12, 15), conv=conv)
    want = {"qkv.weight": Share(0, (12, 12, 15)), "out.weight": Share(1, (15,))}
    assert mixer.shares() == (want | {"conv.weight": Share(0, (12, 12, 15))} if conv else want)


@pytest.mark.parametrize("writes", [1, 2])
def test_flops_are_those_of_the_parts(writes):
    mixer = built(heads=4, widths=(6, 6, 20), conv=3, qk_heads=2)
    mixer.writes = writes
    projections = 2 * DIM * (6 + 6 + 20) + 2 * 20 * DIM
    # A state of 3 x 5 per head: `writes` updates and one read.
    per_token = projections + 2 * (6 + 6 + 20) * 3 + 2 * (writes + 1) * 4 * 3 * 5
    assert mixer.flops(LAYOUT) == LENGTH * per_token


@pytest.mark.parametrize(("conv", "gate"), [(0, False), (0, True), (3, False), (3, True)])
def test_inactive_heads_save_their_rows_of_queries_gate_and_output_and_the_read_of_the_state(conv, gate):
    mixer = built(heads=4, widths=(12, 12, 20), conv=conv)
    if gate:
        mixer.gate = Linear(DIM, 20)
    full = mixer.flops(LAYOUT)

    class Router(nn.Module):
        inactive_heads, flops_per_token = 3, 0

    mixer.head_router = Router()
    # After a convolution, queries of all heads are needed.
    rows = 5 + (0 if conv else 3) + (5 if gate else 0)
    assert full - mixer.flops(LAYOUT) == LENGTH * 3 * (2 * DIM * rows + 2 * 3 * 5)


@pytest.mark.parametrize(("head_dim", "key_dim"), [(None, 4), (6, 6)])
def test_the_key_width_is_a_share_of_the_width_unless_it_is_set(head_dim, key_dim):
    config = RetentionConfig(heads=3, head_dim=head_dim)
    assert config.key_dim(12) == key_dim
    assert config.routable() == (3, 1)
    assert config.problems(12) == []


def test_heads_that_do_not_divide_the_width_are_a_problem():
    assert RetentionConfig(heads=5).problems(12) == [
        "heads: 5 heads do not divide dim 12; set head_dim or change heads"
    ]
