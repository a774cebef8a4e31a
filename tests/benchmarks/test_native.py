"""The benchmark of native kernels measures both implementations of every case."""

import sys
from unittest.mock import patch

import torch

from benchmarks import native


def test_every_case_has_a_row(capsys):
    with patch.object(sys, "argv", ["native", "--tokens", "70", "--threads", "1", "--repeats", "1"]):
        threads = torch.get_num_threads()
        native.main()
        torch.set_num_threads(threads)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 8
    assert all(float(row.split("|")[-2]) > 0 for row in rows)
