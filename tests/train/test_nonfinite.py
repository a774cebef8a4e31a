"""Where a loss is not finite: named by sequence, document and first token, the same on all ranks."""

from types import SimpleNamespace

import pytest
import torch

from longctx.engines.base import Batch
from longctx.kernels.finite import is_checked
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh
from longctx.train.nonfinite import not_finite

BOUNDS = (0, 10, 11, 40)


class Losses:
    """An engine whose losses are not finite at some (sequence, token)."""

    def __init__(self, places):
        self.places = places

    def losses(self, batch):
        assert is_checked(SimpleNamespace(is_cuda=True))
        nll = torch.ones(batch.layout.length)
        for sequence, token in self.places:
            if sequence == batch.layout.sequence:
                nll[token] = float("nan") if token % 2 else float("inf")
        return SimpleNamespace(nll=batch.layout.shard(nll[None]))


def on_ranks(places, cp, dp):
    mesh = Mesh.build("cpu", cp=cp, dp_shard=dp)
    layouts = [Layout.on(mesh, BOUNDS, "zigzag", sequence=7 + n) for n in range(mesh.dp.rank, 2, dp)]
    nothing = torch.zeros(1, layouts[0].local_length, dtype=torch.int64)
    return not_finite(Losses(places), [Batch(nothing, nothing, layout) for layout in layouts])


@pytest.mark.parametrize(("cp", "dp"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize(
    ("places", "text"),
    [
        ([], ""),
        ([(8, 35), (8, 30), (8, 39)], "sequence 8, document 2, token 30"),
        ([(7, 10), (8, 9), (8, 3)], "sequence 7, document 1, token 10, sequence 8, document 0, token 3"),
        (
            [(7, 0), (7, 10), (7, 11), (8, 0), (8, 10)],
            "sequence 7, document 0, token 0, sequence 7, document 1, token 10, sequence 7, document 2, token 11 "
            "and 2 more documents",
        ),
    ],
)
def test_the_first_token_of_each_document_is_named(ranks, places, text, cp, dp):
    want = f"Not finite from there on: {text} (counted from 0)" if text else ""
    assert ranks.run(on_ranks, places, cp, dp, size=cp * dp) == [want] * (cp * dp)
