"""The loss of a head whose rows ranks divide is that of the whole head."""

import pytest
import torch
import torch.distributed as dist

from longctx.kernels import reference
from longctx.parallel.loss import vocab_parallel_cross_entropy
from longctx.parallel.mesh import Axis
from tests.kernels.test_loss import draw

VOCABULARY = 12


def over_ranks(tile):
    """On a rank: the loss, each token's, the summed gradient of x, and that of this rank's rows."""
    x, weight, labels = draw(vocab=VOCABULARY)
    axis = Axis.from_group(dist.group.WORLD)
    own = weight.chunk(axis.size)[axis.rank].clone().requires_grad_()
    x.requires_grad_()
    total, nll = vocab_parallel_cross_entropy(x, own, labels, tile, axis, scale=1 / 3)
    total.backward()
    if axis.group is not None:
        dist.all_reduce(x.grad)
    return total.detach(), nll, x.grad, own.grad


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("tile", [5, 1000])
def test_loss_and_gradients_are_those_of_the_whole_head(ranks, size, tile):
    x, weight, labels = (t.requires_grad_() if t.is_floating_point() else t for t in draw(vocab=VOCABULARY))
    want = reference.linear_cross_entropy(x, weight, labels)
    (want.sum() / 3).backward()
    found = ranks.run(over_ranks, tile, size=size)
    for total, nll, dx, _ in found:
        torch.testing.assert_close(total, want.sum().detach() / 3)
        torch.testing.assert_close(nll, want.detach())
        torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(torch.cat([dweight for *_, dweight in found]), weight.grad)
