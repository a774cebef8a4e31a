"""The token-by-token reference recurrence against closed forms."""

import pytest
import torch

from longctx.kernels.linear.reference import linear_recurrence
from tests.kernels.linear.cases import draw, named_gates

F64 = torch.float64


def line(*values):
    """A sequence of one head and one channel."""
    return torch.tensor(values, dtype=F64).view(1, -1, 1, 1)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_without_a_decay_outputs_are_running_sums_of_values():
    out, end = linear_recurrence(line(1, 1, 1, 2), line(1, 2, 1, 1), line(3, 4, 5, 6))
    assert out.flatten().tolist() == [3, 11, 16, 44]
    assert end.item() == 22


def test_a_constant_log_decay_weights_values_geometrically():
    log_half = torch.tensor([0.5], dtype=F64).log()
    out, end = linear_recurrence(line(1, 1, 1), line(1, 1, 1), line(8, 8, 8), log_half)
    close(out.flatten(), torch.tensor([8.0, 12.0, 14.0], dtype=F64))
    close(end.flatten(), torch.tensor([14.0], dtype=F64))


def test_the_decay_of_a_token_acts_before_its_write():
    g = torch.tensor([-7.0, float("-inf"), 0.0], dtype=F64).view(1, 3, 1)
    out, _ = linear_recurrence(line(1, 1, 1), line(1, 1, 1), line(2, 3, 5), g)
    assert out.flatten().tolist() == [2, 3, 8]


def test_a_vector_log_decay_acts_on_channels_of_the_key():
    case = draw("vector", 4, batch=1, heads=(1, 1, 1, 1))
    (g,) = case.gates
    _, end = linear_recurrence(case.q, case.k, case.v, g)
    want = sum(torch.outer(case.k[0, t, 0] * g[0, t + 1 :, 0].sum(dim=0).exp(), case.v[0, t, 0]) for t in range(4))
    close(end[0, 0], want)


def test_the_delta_rule_with_beta_one_stores_the_value_for_a_key_of_length_one():
    case = draw("delta, vector", 5, batch=2)
    beta, g = case.gates
    _, end = linear_recurrence(case.q, case.k, case.v, g, torch.ones_like(beta), initial_state=case.state)
    close(torch.einsum("bhk,bhkv->bhv", case.k[:, -1], end), case.v[:, -1])
    _, kept = linear_recurrence(case.q, case.k, case.v, None, torch.zeros_like(beta), initial_state=case.state)
    assert torch.equal(kept, case.state)


def test_the_delta_rule_is_its_transition_matrix():
    case = draw("delta, scalar", 1, batch=1, heads=(1, 1, 1, 1))
    beta, g = (gate.flatten() for gate in case.gates)
    out, end = linear_recurrence(case.q, case.k, case.v, *reversed(case.gates), initial_state=case.state)
    k, v, q = case.k.flatten(), case.v.flatten(), case.q.flatten()
    transition = (torch.eye(5, dtype=F64) - beta * torch.outer(k, k)) * g.exp()
    want = transition @ case.state[0, 0] + beta * torch.outer(k, v)
    close(end[0, 0], want)
    close(out.flatten(), want.T @ q)


@pytest.mark.parametrize("kind", ["constant", "delta, vector"])
def test_documents_are_as_if_each_were_alone(kind):
    case = draw(kind, 7)
    gates = named_gates(case, case.gates)
    out, end = linear_recurrence(case.q, case.k, case.v, **gates, starts=(3, 6), initial_state=case.state)
    states = {0: case.state, 3: None, 6: None}
    for begin, stop in ((0, 3), (3, 6), (6, 7)):
        part = case.cut(begin, stop)
        alone, last = linear_recurrence(
            part.q, part.k, part.v, **named_gates(part, part.gates), initial_state=states[begin]
        )
        assert torch.equal(out[:, begin:stop], alone)
    assert torch.equal(end, last)


@pytest.mark.parametrize("heads", [(8, 2, 4, 1), (1, 2, 1, 4), (2, 4, 2, 4)], ids=str)
def test_grouped_heads_equal_repeated_heads(heads):
    case = draw("delta, scalar", 4, heads=heads)
    gates = named_gates(case, case.gates)
    out, end = linear_recurrence(case.q, case.k, case.v, **gates, initial_state=case.state)
    count = max(heads[1:])
    repeated = [x.repeat_interleave(count // x.shape[2], dim=2) for x in (case.k, case.v)]
    gates = {name: gate.repeat_interleave(count // gate.shape[2], dim=2) for name, gate in gates.items()}
    for reader in range(out.shape[2]):
        head = reader * count // out.shape[2]
        q = case.q[:, :, reader * heads[0] // out.shape[2], None]
        one = {name: gate[:, :, head, None] for name, gate in gates.items()}
        k, v = (x[:, :, head, None] for x in repeated)
        alone, last = linear_recurrence(q, k, v, **one, initial_state=case.state[:, head, None])
        close(out[:, :, reader, None], alone)
        close(end[:, head, None], last)


def test_no_token_leaves_the_state_as_it_is():
    case = draw("scalar", 2).cut(0, 0)
    out, end = linear_recurrence(case.q, case.k, case.v, case.gates[0], initial_state=case.state)
    assert out.shape == (2, 0, 3, 7)
    assert torch.equal(end, case.state)
