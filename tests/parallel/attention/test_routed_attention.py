"""Attention of the queries that were routed to each head, by every schedule: as of all queries, at these."""

import itertools

import pytest
import torch
import torch.distributed as dist

from longctx.parallel.attention.api import routed_attention, softmax_attention
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh
from tests.combinations import pairs, pairs_or_everything
from tests.parallel.attention.test_api import MASKS, grid, schedules
from tests.parallel.cases import ORDERS, PACKINGS, UNEVEN

HEADS = 4
ROUTES = ["some", "none", "all to one head"]


def draw(length):
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, HEADS, 6), (2, length, HEADS, 6), (2, length, HEADS, 5), (2, length, HEADS, 5)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def reads(length, routes):
    """`[B, T, H]` int: how many queries a head has at a token. Two at some: several query heads read one key head."""
    if routes == "none":
        return torch.zeros(2, length, HEADS, dtype=torch.int64)
    if routes == "all to one head":
        return torch.tensor([0, 2, 0, 0]).expand(2, length, HEADS)
    return torch.randint(0, 3, (2, length, HEADS), generator=torch.Generator().manual_seed(7))


def rows_of(counts):
    """`[B, H, N]`: the rows of the queries, those that are none first."""
    batch, _, heads = counts.shape
    lists = [
        [torch.arange(counts.shape[1]).repeat_interleave(counts[b, :, h]) for h in range(heads)] for b in range(batch)
    ]
    most = max((len(x) for row in lists for x in row), default=0)
    padded = [[torch.cat([torch.full((most - len(x),), -1), x]) for x in row] for row in lists]
    return torch.stack([torch.stack(row) for row in padded])


def gathered(x, rows):
    """`[B, T, H, D]` at rows `[B, H, N]`: `[B, N, H, D]`, zero where there is no query."""
    index = rows.clamp_min(0).transpose(1, 2)[..., None].expand(-1, -1, -1, x.shape[3])
    return x.gather(1, index) * (rows >= 0).transpose(1, 2)[..., None]


def routed(layout, routes, schedule, mask):
    counts = layout.shard(reads(layout.length, routes))
    for gap in layout.padding:
        counts[:, gap] = 0
    rows = rows_of(counts)
    q, k, v, do = map(layout.shard, draw(layout.length))
    k, v = (x.clone().requires_grad_() for x in (k, v))
    # The second query of a token differs from the first, but what is no query is poisoned.
    before = torch.nn.functional.pad(rows, (1, 0), value=-2)[..., :-1]
    second = 1 + (rows == before).transpose(1, 2)[..., None].double()
    queries = (gathered(q, rows) * second).requires_grad_()
    queries.data[(rows < 0).transpose(1, 2)] = float("nan")
    out = routed_attention(queries, k, v, rows, layout, 0.3, schedule=schedule, mask=mask)
    assert (out.detach()[(rows < 0).transpose(1, 2)] == 0).all()
    out.backward(gathered(do, rows))

    def spread(x):
        """To `[B, T, 2, H, D]`: the first and the second query of a token."""
        full = x.new_zeros(2, layout.local_length, 2, HEADS, x.shape[3])
        for b, h in itertools.product(range(2), range(HEADS)):
            for n, row in enumerate(rows[b, h].tolist()):
                if row >= 0:
                    again = n > 0 and rows[b, h, n - 1] == row
                    full[b, row, int(again), h] = x[b, n, h]
        return full

    return spread(out.detach()), spread(queries.grad), k.grad, v.grad


def on_rank(cases):
    mesh = Mesh.build("cpu", cp=dist.get_world_size(), ulysses=grid(dist.get_world_size()))
    return [routed(Layout.on(mesh, bounds, order), routes, s, mask) for bounds, order, routes, s, mask in cases]


def dense(bounds, routes, mask):
    """The same by attention of all queries, twice, with a gradient where there is a query."""
    q, k, v, do = (x.requires_grad_() for x in draw(bounds[-1]))
    counts = reads(bounds[-1], routes)
    outs, grads = [], []
    for nth in range(2):
        query = (q.detach() * (1 + nth)).requires_grad_()
        there = (counts > nth)[..., None]
        out = softmax_attention(query, k, v, Layout(bounds), 0.3, mask=mask) * there
        out.backward(do)
        outs.append(out.detach())
        grads.append(query.grad)
    return torch.stack(outs, dim=2), torch.stack(grads, dim=2), k.grad, v.grad


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow), 4])
@pairs_or_everything
def test_routed_queries_get_what_all_queries_get_there(ranks, size, combinations):
    bounds, rows = [*PACKINGS.values(), *UNEVEN.values()], (ORDERS, ROUTES, schedules(size), MASKS)
    if combinations is pairs:
        cases = pairs(bounds[1::2], *rows)
    else:
        cases = pairs(bounds, *rows) + combinations(bounds, *rows)[::11]  # of 1,620
    answers = ranks.run(on_rank, cases, size=size)
    for number, (bounds, order, routes, schedule, mask) in enumerate(cases):
        layout = Layout(bounds, order, size)
        parts = zip(*(answer[number] for answer in answers), strict=True)
        for name, part, want in zip(("o", "dq", "dk", "dv"), parts, dense(bounds, routes, mask), strict=True):
            got = layout.unshard(part)
            assert (got - want).norm() <= 1e-10 * max(want.norm(), 1), (name, bounds, order, routes, schedule, mask)
