"""Channels that lie over ranks, whole on every one."""

import torch
import torch.distributed as dist

from longctx.parallel.all_gather_channels import gather_channels
from longctx.parallel.mesh import Axis, Mesh

SHAPE = (2, 5, 12)


def draw(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gathered():
    axis = Mesh.build("cpu", tp=dist.get_world_size()).tp
    x = draw(0).chunk(axis.size, -1)[axis.rank].clone().requires_grad_()
    whole = gather_channels(x, axis)
    # Each rank's loss reads all channels in its own way.
    (whole * draw(1 + axis.rank)).sum().backward()
    return whole.detach(), x.grad


def test_every_rank_has_all_channels_and_each_the_sum_of_its_gradients(ranks):
    for size in (2, 4):
        answers = ranks.run(gathered, size=size)
        assert all(torch.equal(whole, draw(0)) for whole, _ in answers)
        want = sum(draw(1 + rank) for rank in range(size))
        torch.testing.assert_close(torch.cat([grad for _, grad in answers], dim=-1), want)


def test_one_rank_has_them():
    x = draw(0)
    assert gather_channels(x, Axis()) is x
