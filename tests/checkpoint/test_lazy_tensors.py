"""Lazy tensors: rows are materialised as they are written, and read back bit for bit."""

import pytest
import torch

from longctx.checkpoint.lazy_tensors import LazyTensor, write_lazy
from longctx.checkpoint.storage import read_tensors


class Recorded:
    """Makes rows of `value` and records which."""

    def __init__(self, value):
        self.value, self.calls = value, []

    def __call__(self, begin, end):
        self.calls.append((begin, end))
        return self.value[begin:end] if self.value.dim() else self.value


def value(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("rows", "calls"),
    [
        (None, [(0, 5)]),
        (5, [(0, 5)]),
        (8, [(0, 5)]),
        (2, [(0, 2), (2, 4), (4, 5)]),
        (1, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
    ],
)
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3)])
def test_every_row_is_made_once_in_buffers_and_read_back_bit_for_bit(tmp_path, shape, rows, calls):
    make = Recorded(value(*shape))
    write_lazy(tmp_path, {"w": LazyTensor(torch.Size(shape), make, rows)})
    assert sorted(make.calls) == calls
    # One file per call, so that no buffer waits for the next one.
    assert len(list(tmp_path.glob("*.distcp"))) == len(calls)
    got = {"w": torch.empty(shape)}
    read_tensors(tmp_path, got)
    assert torch.equal(got["w"], make.value)


def test_a_scalar_and_several_tensors_are_written(tmp_path):
    made = {"a": Recorded(value(3, 2, seed=1)), "scalar": Recorded(value(seed=2)), "b": Recorded(value(4, seed=3))}
    write_lazy(tmp_path, {name: LazyTensor(make.value.shape, make) for name, make in made.items()})
    assert made["scalar"].calls == [(0, 1)]
    got = {name: torch.empty(make.value.shape) for name, make in made.items()}
    read_tensors(tmp_path, got)
    assert all(torch.equal(got[name], make.value) for name, make in made.items())


def test_names_with_dots_are_kept_and_objects_are_written_beside_tensors(tmp_path):
    make = Recorded(value(2, 2))
    write_lazy(tmp_path, {"blocks.0.w": LazyTensor(make.value.shape, make)}, {"step": {"number": 7}})
    got = {"blocks.0.w": torch.empty(2, 2), "step": None}
    read_tensors(tmp_path, got)
    assert torch.equal(got["blocks.0.w"], make.value)
    assert got["step"] == {"number": 7}


def test_an_error_in_making_a_tensor_is_raised_unchanged(tmp_path):
    error = KeyError("no such tensor in the source")

    def make(begin, end):
        raise error

    with pytest.raises(KeyError) as caught:
        write_lazy(tmp_path, {"w": LazyTensor(torch.Size([2]), make)})
    assert caught.value is error


@pytest.mark.parametrize("made", [torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 4), torch.zeros(1, 3)])
def test_another_dtype_or_shape_than_declared_is_refused(tmp_path, made):
    with pytest.raises(AssertionError, match="fqn='w'"):
        write_lazy(tmp_path, {"w": LazyTensor(torch.Size([2, 3]), lambda begin, end: made)})
