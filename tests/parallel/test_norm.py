"""RMSNorm over channels that are sharded over ranks, against the formula on all channels."""

import pytest
import torch
import torch.distributed as dist

from longctx.kernels import reference
from longctx.parallel.mesh import Axis
from longctx.parallel.norm import tensor_parallel_rms_norm
from longctx.parallel.traffic import count_traffic

SHAPE, EPS = (2, 3, 12), 0.1
"""A large epsilon, so that a wrong place of it shows."""


def draw(per_token):
    """x, scale and dy of all channels."""
    generator = torch.Generator().manual_seed(7)
    shapes = [SHAPE, SHAPE if per_token else SHAPE[-1:], SHAPE]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def norm(dtype):
    axis = Axis.from_group(dist.group.WORLD)
    answers = []
    for per_token in (False, True):
        x, scale, dy = (t.chunk(axis.size, -1)[axis.rank].to(dtype) for t in draw(per_token))
        x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
        with count_traffic() as traffic:
            y = tensor_parallel_rms_norm(x, scale, EPS, axis)
            forward = dict(traffic.calls)
            y.backward(dy)
        answers.append(((y.detach(), x.grad, scale.grad), forward, dict(traffic.calls), traffic.received))
    return answers


def expected(per_token):
    x, scale, dy = draw(per_token)
    leaves = [x.requires_grad_(), scale.requires_grad_()]
    y = reference.rms_norm(*leaves, EPS)
    y.backward(dy)
    return y.detach(), x.grad, scale.grad


@pytest.mark.parametrize("size", [1, 2, 4])
def test_output_and_gradients_equal_the_norm_over_all_channels(ranks, size):
    answers = ranks.run(norm, torch.float64, size=size)
    for per_token in (False, True):
        shards = zip(*(by_scale[per_token][0] for by_scale in answers), strict=True)
        for parts, want in zip(shards, expected(per_token), strict=True):
            torch.testing.assert_close(torch.cat(parts, dim=-1), want, rtol=1e-12, atol=1e-12)


def test_results_are_in_the_dtype_of_their_inputs_after_sums_in_a_wider_one(ranks):
    for answers in ranks.run(norm, torch.bfloat16, size=2):
        for tensors, *_, received in answers:
            assert {x.dtype for x in tensors} == {torch.bfloat16}
            # 6 tokens, in float32, forward and backward.
            assert received == 2 * (2 * 1 * 6 * 4 // 2)


@pytest.mark.parametrize("size", [2, 3])
def test_each_pass_sums_one_number_per_token(ranks, size):
    for answers in ranks.run(norm, torch.float64, size=size):
        for _, forward, both, received in answers:
            assert (forward, both) == ({"all_reduce": 1}, {"all_reduce": 2})
            assert received == 2 * (2 * (size - 1) * 6 * 8 // size)


def test_one_rank_needs_no_process_group():
    x, scale, _ = draw(False)
    torch.testing.assert_close(tensor_parallel_rms_norm(x, scale, EPS, Axis()), expected(False)[0], rtol=1e-12, atol=0)
