"""Parity of every mixer over ranks with one rank: each schedule, layout and packing.

All combinations are slow; by default every `STRIDE`th is run: each schedule, order and packing, and most pairs of them,
of all mixers on 2 ranks in float64, and on 4 in float32 of softmax attention and of the richest linear recurrence.
"""

import itertools

import pytest
import torch
import torch.distributed as dist

from longctx.mixers import MIXERS
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh
from tests.combinations import mostly_slow_rows
from tests.mixers.cases import built, config_of, draw, run
from tests.parallel.cases import ORDERS, PACKINGS, UNEVEN

STRIDE = 7
"""Divides none of the numbers of packings, orders and schedules, so that all of them meet."""
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}


def grid(size):
    return 2 if size % 2 == 0 else 1


def combinations(letter, size):
    """The documents, the order, and the layout's schedules of each combination."""
    field, schedules = config_of(letter).available_schedules(size, grid(size))
    ways = [{field: schedule} for schedule in schedules]
    return list(itertools.product([*PACKINGS.values(), *UNEVEN.values()], ORDERS, ways))


def on_rank(letter, dtype, cells):
    mesh, answers = Mesh.build("cpu", cp=dist.get_world_size(), ulysses=grid(dist.get_world_size())), []
    for bounds, order, schedules in cells:
        layout = Layout.on(mesh, bounds, order, **schedules)
        mixer = built(letter, dtype)
        x, dy = map(layout.shard, draw(bounds[-1], dtype))
        x.requires_grad_()
        y = run(mixer, x, layout)
        y.backward(dy)
        answers.append((y.detach(), x.grad, {name: p.grad for name, p in mixer.named_parameters()}))
    return answers


def compare(answers, letter, size, dtype, cells):
    largest: dict[str, float] = {}
    truths = {}
    for number, (bounds, order, schedules) in enumerate(cells):
        if bounds not in truths:
            mixer, (x, dy) = built(letter), draw(bounds[-1])
            x.requires_grad_()
            y = run(mixer, x, Layout(bounds))
            y.backward(dy)
            truths[bounds] = y.detach(), x.grad, {name: p.grad for name, p in mixer.named_parameters()}
        y, dx, wanted = truths[bounds]
        outs, dxs, dweights = zip(*(answer[number] for answer in answers), strict=True)
        layout = Layout(bounds, order, size)
        pairs = [("y", layout.unshard(outs), y), ("dx", layout.unshard(dxs), dx)]
        pairs += [(name, sum(d[name].double() for d in dweights), want) for name, want in wanted.items()]
        for name, got, want in pairs:
            # In float32 a gradient that is 0 but for rounding (a mean over one token has none for its weights) is
            # measured against the largest that the parameter has had, in float64 against itself.
            largest[name] = max(largest.get(name, 0.0), want.norm().item())
            scale = largest[name] if dtype == torch.float32 else want.norm()
            assert (got - want).norm() <= BOUNDS[dtype] * scale, f"{name} {bounds} {order} {schedules}"


each_mixer = pytest.mark.parametrize("letter", MIXERS)
each_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=["float64", "float32"])


@pytest.mark.parametrize(
    ("size", "dtype", "letter"),
    mostly_slow_rows(
        [(*row, x) for row in ((1, torch.float32), (2, torch.float64), (4, torch.float32)) for x in MIXERS],
        lambda size, dtype, letter: letter in {1: "K", 2: "".join(MIXERS), 4: "SK"}[size],
    ),
)
def test_some_combinations_equal_one_rank(ranks, letter, size, dtype):
    cells = combinations(letter, size)
    # From another cell for each number of ranks.
    cells = cells[size % STRIDE :: STRIDE]
    compare(ranks.run(on_rank, letter, dtype, cells, size=size), letter, size, dtype, cells)


def test_the_default_combinations_have_each_schedule_order_and_packing():
    for letter, size in itertools.product(MIXERS, (2, 4)):
        cells = combinations(letter, size)
        for column, chosen in zip(zip(*cells, strict=True), zip(*cells[size::STRIDE], strict=True), strict=True):
            assert all(value in chosen for value in column)


@pytest.mark.slow
@each_mixer
@each_dtype
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_all_combinations_equal_one_rank(eight_ranks, letter, size, dtype):
    cells = combinations(letter, size)
    compare(eight_ranks.run(on_rank, letter, dtype, cells, size=size), letter, size, dtype, cells)
