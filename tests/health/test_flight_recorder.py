"""NCCL's flight recorder is switched on by names that torch reads, unless a user has said otherwise."""

import mmap
import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from longctx.health.flight_recorder import DUMP, FILE, SIZE, record_collectives

OTHERS = {name: value for name, value in os.environ.items() if name not in (*SIZE, *FILE, *DUMP)}


def variables(folder: Path, **before: str) -> dict[str, str]:
    with patch.dict(os.environ, OTHERS | before, clear=True):
        record_collectives(folder)
        return {name: value for name, value in os.environ.items() if name not in OTHERS}


def test_traces_are_written_among_the_logs(tmp_path):
    assert variables(tmp_path) == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/nccl-trace/rank-",
    }


def test_a_users_own_settings_stay(tmp_path):
    own = {"TORCH_FR_BUFFER_SIZE": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0", "TORCH_FR_DUMP_TEMP_FILE": "/elsewhere/"}
    assert variables(tmp_path, **own) == own


@pytest.mark.parametrize("name", [SIZE[0], FILE[0]])
def test_torch_reads_these_names(name):
    """Those of NCCL's process group alone are in builds with CUDA."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        assert content.find(name.encode() + b"\0") >= 0
