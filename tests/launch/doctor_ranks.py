"""Ranks that examine this machine as those of `longctx doctor` do, with little effort."""

from functools import partial

from longctx.bench import rates
from longctx.doctor import examine
from longctx.launch import doctor

EFFORT = {"rounds": 1, "most_rounds": 1, "seconds": 0.005, "file_bytes": 2**20, "sizes": (4096, 8192)}


def run_rank(**arguments: object) -> None:
    rates.COPIED = 2**20
    examine.Effort = partial(examine.Effort, **EFFORT)
    doctor.run_rank(**arguments)
