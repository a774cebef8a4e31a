"""Argument checks of linear attention: what fits passes, and an error names the argument and its value."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.kernels.linear.checks import (
    check_beta,
    check_decay,
    check_heads,
    check_operands,
    check_state,
    checked_cu_seqlens,
)
from longctx.kernels.linear.recurrence import Inputs


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


Q, K, V = zeros(2, 5, 4, 3), zeros(2, 5, 2, 3), zeros(2, 5, 4, 6)


def test_operands_that_fit_pass():
    check_operands(Q, K, V)
    check_operands(*(x.bfloat16() for x in (Q, K, V)))
    check_operands(Q[:, :0], K[:, :0], V[:, :0])


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        ((Q, K[0], V), r"k has shape \[5, 2, 3\]: expected 4 dimensions"),
        ((Q.long(), K.long(), V.long()), r"q is torch.int64: expected one of torch.float64"),
        ((Q, K, V.half()), "v is torch.float16, but q is torch.float32"),
        ((Q, K, V.to("meta")), "v is on meta, but q is on cpu"),
        ((Q, K[:, :4], V), r"k has batch and tokens \[2, 4\], but q has \[2, 5\]"),
        ((Q, K, V[..., :0]), r"v has shape \[2, 5, 4, 0\]: expected at least one head and one channel"),
        ((Q, K[:, :, :0], V), r"k has shape \[2, 5, 0, 3\]: expected at least one head"),
        ((Q, K[..., :2], V), "k has head dim 2, but q has 3"),
    ],
)
def test_operands_that_do_not_fit_are_named(operands, message):
    with pytest.raises(ValueError, match=message):
        check_operands(*operands)


@pytest.mark.parametrize("shape", [(4,), (2, 5, 4), (2, 5, 4, 3), (2, 0, 4)])
def test_log_decays_of_every_shape_pass_and_zero_and_minus_infinity_are_decays(shape):
    k = K[:, :0] if 0 in shape else K
    check_decay(zeros(*shape), k, constant=True)
    check_decay(zeros(*shape).fill_(float("-inf")), k, constant=True)


@pytest.mark.parametrize(
    ("log_decay", "message"),
    [
        (zeros(2, 5), r"log_decay has shape \[2, 5\]: expected \[H\], \[B, T, H\] or \[B, T, H, K\]"),
        (zeros(2, 4, 4), r"log_decay has shape \[2, 4, 4\]: expected .*\[B, T\] = \[2, 5\]"),
        (zeros(0), r"log_decay has shape \[0\]: expected at least one head"),
        (zeros(2, 5, 0), r"log_decay has shape \[2, 5, 0\]: expected at least one head"),
        (zeros(4, dtype=torch.int64), "log_decay is torch.int64: expected a floating-point dtype"),
        (zeros(4, device="meta"), "log_decay is on meta, but k is on cpu"),
        (zeros(2, 5, 4, 2), "log_decay has 2 channels, but k has 3"),
        (zeros(4) + 0.25, r"log_decay has the largest value 0\.25: expected .* at most 0"),
        (zeros(4).fill_(torch.nan), "log_decay has the largest value nan"),
    ],
)
def test_log_decays_that_do_not_fit_are_named(log_decay, message):
    with pytest.raises(ValueError, match=message):
        check_decay(log_decay, K, constant=True)


def test_a_constant_log_decay_is_refused_where_the_recurrence_has_none():
    with pytest.raises(ValueError, match=r"log_decay has shape \[4\]: expected \[B, T, H\] or \[B, T, H, K\]"):
        check_decay(zeros(4), K, constant=False)


class Operators(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize(
    ("shape", "anomaly", "reads"), [((2, 5, 4), False, 1), ((2, 5, 4, 3), False, 0), ((2, 5, 4, 3), True, 1)]
)
def test_decays_per_channel_are_not_read_on_a_gpu_but_in_anomaly_mode(shape, anomaly, reads):
    k, log_decay = zeros(2, 5, 4, 3, device="meta"), zeros(*shape, device="meta")
    with torch.autograd.set_detect_anomaly(anomaly), Operators() as operators:
        check_decay(log_decay, k, constant=True)
    assert operators.names.count("amax") == reads


def test_one_positive_log_decay_of_many_is_found():
    log_decay = zeros(2, 5, 4)
    log_decay[1, 3, 2] = 1e-6
    with pytest.raises(ValueError, match="largest value 1e-06"):
        check_decay(log_decay, K, constant=True)


def test_values_of_a_fake_tensor_are_not_read():
    with FakeTensorMode():
        check_decay(torch.ones(2, 5, 4), torch.zeros(2, 5, 2, 3), constant=True)


def test_beta_runs_along_the_sequence():
    check_beta(zeros(2, 5, 4), K)
    for beta, message in (
        (zeros(4), r"beta has shape \[4\]: expected \[B, T, H\]"),
        (zeros(2, 5, 4, 3), r"beta has shape \[2, 5, 4, 3\]: expected \[B, T, H\]"),
        (zeros(3, 5, 4), r"beta has shape \[3, 5, 4\]: expected \[B, T, H\] with \[B, T\] = \[2, 5\]"),
        (zeros(2, 5, 4, dtype=torch.bool), "beta is torch.bool"),
    ):
        with pytest.raises(ValueError, match=message):
            check_beta(beta, K)


def heads(q, k, v, **gates):
    check_heads(*(zeros(1, 1, count, 2) for count in (q, k, v)), {name: zeros(1, 1, n) for name, n in gates.items()})


@pytest.mark.parametrize("counts", [(4, 4, 4), (8, 4, 2), (1, 4, 2), (2, 1, 6)])
def test_head_counts_that_group_pass(counts):
    heads(*counts)
    heads(*counts, log_decay=max(counts[1:]))


@pytest.mark.parametrize(
    ("counts", "gates", "message"),
    [
        ((4, 3, 4), {}, "k has 3 heads: expected a divisor of 4"),
        ((4, 4, 3), {}, "v has 3 heads: expected a divisor of 4"),
        ((4, 2, 4), {"beta": 6}, "v has 4 heads: expected a divisor of 6"),
        ((4, 4, 4), {"log_decay": 3}, "log_decay has 3 heads: expected a divisor of 4"),
        ((3, 2, 4), {}, "q has 3 heads: expected a divisor or a multiple of 4"),
        ((6, 4, 4), {}, "q has 6 heads: expected a divisor or a multiple of 4"),
    ],
)
def test_head_counts_that_do_not_group_are_named(counts, gates, message):
    with pytest.raises(ValueError, match=message):
        heads(*counts, **gates)


def test_heads_of_a_constant_gate_are_its_length():
    with pytest.raises(ValueError, match="log_decay has 3 heads: expected a divisor of 4"):
        check_heads(Q, K, V, {"log_decay": zeros(3)})


@pytest.mark.parametrize(
    ("tokens", "states"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_a_state_has_the_accumulation_dtype(tokens, states):
    inputs = Inputs(None, K.to(tokens), V.to(tokens), ())
    check_state("initial_state", zeros(2, 4, 3, 6, dtype=states), inputs)
    with pytest.raises(ValueError, match=r"initial_state is torch.float16: expected torch.float\d\d for torch."):
        check_state("initial_state", zeros(2, 4, 3, 6, dtype=torch.float16), inputs)


def test_a_state_that_does_not_fit_is_named():
    inputs = Inputs(None, K, V, ())
    with pytest.raises(ValueError, match=r"dend has shape \[2, 4, 6, 3\]: expected .* = \[2, 4, 3, 6\]"):
        check_state("dend", zeros(2, 4, 6, 3), inputs)
    with pytest.raises(ValueError, match="dend is on meta, but k is on cpu"):
        check_state("dend", zeros(2, 4, 3, 6, device="meta"), inputs)


@pytest.mark.parametrize("bounds", [[0, 1], (0, 3, 4, 9), torch.tensor([0, 2], dtype=torch.int32)])
def test_cu_seqlens_become_a_tuple_of_integers(bounds):
    got = checked_cu_seqlens(bounds)
    assert got == tuple(int(c) for c in bounds)
    assert all(type(c) is int for c in got)
    assert checked_cu_seqlens(bounds, got[-1]) == got


@pytest.mark.parametrize(
    ("bounds", "length", "message"),
    [
        ([], None, r"cu_seqlens begins \[\]: expected 0"),
        ([0], None, r"cu_seqlens begins \[0\]: expected 0"),
        ([1, 4], None, r"cu_seqlens begins \[1, 4\]: expected 0"),
        ([0, 2.5], None, r"cu_seqlens begins \[0, 2\.5\]: expected integers"),
        (torch.tensor([0.0, 2.0]), None, "expected integers"),
        ([0, 3, 3, 5], None, "cu_seqlens has 3 after 3: expected strictly increasing"),
        ([0, 3, 2], None, "cu_seqlens has 2 after 3"),
        ([0, 3], 4, "cu_seqlens ends with 3: expected the number of tokens, 4"),
    ],
)
def test_cu_seqlens_that_are_not_cumulative_lengths_are_refused(bounds, length, message):
    with pytest.raises(ValueError, match=message):
        checked_cu_seqlens(bounds, length)
