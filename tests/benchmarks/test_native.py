"""The benchmark of native kernels measures both implementations of every case."""

import sys
from unittest.mock import patch

import pytest
import torch

from benchmarks import native
from longctx.kernels.native import library


@pytest.mark.skipif(library.loaded() != list(library.FAMILIES), reason="needs a C++ compiler")
def test_every_case_has_a_row(capsys):
    with patch.object(sys, "argv", ["native", "--tokens", "70", "--threads", "1", "--repeats", "1"]):
        threads = torch.get_num_threads()
        native.main()
        torch.set_num_threads(threads)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 12 + 12 + 8 + 12 + 12
    assert all(float(row.split("|")[-2]) > 0 for row in rows)


def test_an_unknown_family_is_refused(capsys):
    with patch.object(sys, "argv", ["native", "loss"]), pytest.raises(SystemExit):
        native.main()
    assert "no family loss: choose of additive, attention, convolution, delta, pointwise" in capsys.readouterr().err
