"""Calls of native kernels: what a pass writes is what its caller gets, whatever torch's defaults and strides."""

import pytest
import torch

from longctx.kernels.linear.additive import native as additive
from longctx.kernels.linear.delta import native as delta
from longctx.kernels.linear.recurrence import Segment
from longctx.kernels.native import library
from tests.kernels.linear.cases import GROUPS, KINDS, by_recurrence, draw

pytestmark = pytest.mark.skipif(not library.is_available(additive.FAMILY), reason="needs a C++ compiler")
each_kind = pytest.mark.parametrize("kind", KINDS)
SEGMENTS = [Segment(0, 70), Segment(70, 130, (9,))]


def run(case):
    return by_recurrence(case, SEGMENTS, module=delta if "delta" in case.kind else additive)[0]


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_changes_nothing(kind, dtype):
    case = draw(kind, 130, 1, GROUPS["fewer values"]).to(torch.float32)
    want = run(case)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = run(case)
    finally:
        torch.set_default_dtype(before)
    for name, x in want.items():
        assert got[name].dtype == x.dtype, name
        assert torch.equal(got[name], x), name


@each_kind
def test_states_may_have_any_strides(kind):
    case = draw(kind, 130, 1, key_dim=6, value_dim=6).to(torch.float32)
    want = run(case)
    states = {name: getattr(case, name).mT.contiguous().mT for name in ("state", "dend")}
    assert not any(x.is_contiguous() for x in states.values())
    got = run(type(case)(**vars(case) | states))
    for name, x in want.items():
        assert torch.equal(got[name], x), name
