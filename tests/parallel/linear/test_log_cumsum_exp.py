"""The running log-sum-exp over ranks against torch's on one."""

import itertools

import pytest
import torch

from longctx.parallel.layout import Layout
from longctx.parallel.linear.log_cumsum_exp import log_cumsum_exp
from longctx.parallel.traffic import count_traffic
from tests.parallel.cases import ORDERS, PACKINGS, UNEVEN, layout_here

CASES = list(itertools.product([*PACKINGS.values(), *UNEVEN.values()], ORDERS))


def draw(length):
    generator = torch.Generator().manual_seed(length)
    # A wide range, as keys that grow have it: exponentials of it overflow.
    return [s * torch.randn(2, length, 3, generator=generator, dtype=torch.float64) for s in (300.0, 1.0, 1.0)]


def on_rank(cases):
    answers = []
    for bounds, order in cases:
        layout = layout_here(bounds, order)
        x, dz, dbefore = map(layout.shard, draw(bounds[-1]))
        x.requires_grad_()
        with count_traffic() as traffic:
            z, before = log_cumsum_exp(x, layout)
            torch.autograd.backward([z, before], [dz, dbefore])
        answers.append((z.detach(), before.detach(), x.grad, dict(traffic.calls)))
    return answers


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_layout_equals_torchs_document_by_document(ranks, size):
    answers = ranks.run(on_rank, CASES, size=size)
    for number, (bounds, order) in enumerate(CASES):
        x, dz, dbefore = draw(bounds[-1])
        x.requires_grad_()
        parts = [x[:, begin:end].logcumsumexp(dim=1) for begin, end in itertools.pairwise(bounds)]
        z = torch.cat(parts, dim=1)
        nothing = torch.full_like(x[:, :1], float("-inf"))
        before = torch.cat([torch.cat([nothing, part[:, :-1]], dim=1) for part in parts], dim=1)
        seen = before > float("-inf")
        ((z * dz).sum() + (before[seen] * dbefore[seen]).sum()).backward()
        layout = Layout(bounds, order, size)
        got_z, got_before, got_dx, calls = zip(*(answer[number] for answer in answers), strict=True)
        torch.testing.assert_close(layout.unshard(got_z), z.detach(), rtol=1e-13, atol=0)
        torch.testing.assert_close(layout.unshard(got_before), before.detach(), rtol=1e-13, atol=0)
        torch.testing.assert_close(layout.unshard(got_dx), x.grad, rtol=1e-10, atol=1e-12)
        assert all(made == ({"all_gather": 2} if size > 1 else {}) for made in calls)


def test_nothing_at_all_has_no_gradient():
    x = torch.tensor([[[float("-inf")], [0.0], [float("-inf")]]], dtype=torch.float64, requires_grad=True)
    z, _ = log_cumsum_exp(x, Layout((0, 3)))
    z[:, 1:].sum().backward()
    assert x.grad.flatten().tolist() == [0.0, 2.0, 0.0]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="x has 12 tokens: expected 10, this rank's share of the layout"):
        log_cumsum_exp(torch.zeros(1, 12, 3), Layout((0, 10)))
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16: expected"):
        log_cumsum_exp(torch.zeros(1, 10, 3).bfloat16(), Layout((0, 10)))
