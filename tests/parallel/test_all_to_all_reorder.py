"""Rows in another order over ranks."""

import pytest
import torch
import torch.distributed as dist

from longctx.parallel.all_to_all_reorder import Reorder
from longctx.parallel.mesh import Axis


def dealt(ranks, seed, even=True):
    """Tokens of chance over ranks, some perhaps with none."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(24, generator=generator)
    if even:
        return list(tokens.chunk(ranks))
    cuts = torch.randint(0, 25, (ranks - 1,), generator=generator).sort().values.tolist()
    return list(tokens.tensor_split(cuts))


def reordered(seed, even):
    axis = Axis.from_group(dist.group.WORLD)
    have, want = dealt(axis.size, seed, even), dealt(axis.size, seed + 100, even)
    change = Reorder.plan(have, want, axis)
    generator = torch.Generator().manual_seed(1)
    whole, do = (torch.randn(24, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    rank = dist.get_rank()
    x = whole[have[rank]].transpose(0, 1).requires_grad_()
    out = change(x, dim=1)
    out.backward(do[want[rank]].transpose(0, 1))
    assert torch.equal(out, whole[want[rank]].transpose(0, 1))
    assert torch.equal(x.grad, do[have[rank]].transpose(0, 1))
    return True


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_gets_the_rows_that_it_wants_and_their_gradients_go_back(ranks, size, even):
    for seed in range(4):
        assert all(ranks.run(reordered, seed, even, size=size))


def test_other_tokens_are_refused():
    with pytest.raises(ValueError, match=r"reorder: have 3 tokens, want 3: expected 0, 1, \.\.\. once in both"):
        Reorder.plan([torch.tensor([0, 1, 2])], [torch.tensor([0, 1, 1])], Axis())
