"""Ranks on this machine: processes that run one function as the ranks of a gloo group.

Started once and used many times; each call makes a fresh process group of as many of the processes as it asks for.
What verification, benchmarks and the tests run on.
"""

import contextlib
import functools
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import debug


class LocalRankError(RuntimeError):
    """A rank raised, died, or did not answer in time; the text holds the tracebacks."""


def _forget_meshes() -> None:
    """Empty what DTensor remembers of meshes that are gone.

    Two meshes of equal shape and names are equal to it, and so an operation on a new one may come back on an old one,
    whose groups no longer exist or, worse, whose groups' names have been given to others.
    """
    debug._clear_sharding_prop_cache()
    for name, module in list(sys.modules.items()):
        if name.startswith("torch.distributed.tensor"):
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


def _serve(pipe: Connection, threads: int, setup: Callable[[], None] | None) -> None:
    torch.set_num_threads(threads)
    if setup is not None:
        setup()
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        if task is None:
            return
        function, arguments, rank, size, store, timeout = task
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
            )
            try:
                # A rank that is done may leave before another has met it, who would take it for dead.
                dist.barrier()
                answer = (True, function(*arguments))
            finally:
                dist.destroy_process_group()
                _forget_meshes()
        except BaseException:  # noqa: BLE001 - told to the caller, who raises it
            answer = (False, traceback.format_exc())
        pipe.send(answer)


class LocalRanks:
    """Up to `size` ranks on this machine, as processes that live until `close()`."""

    def __init__(
        self, size: int, *, timeout: float = 60.0, settle: float = 5.0, setup: Callable[[], None] | None = None
    ) -> None:
        """`timeout` seconds for a collective, `settle` for the other ranks to end by themselves after one has failed;
        `setup` is called once in each process as it starts.
        """
        self.settle = settle
        self.size = size
        self.timeout = timeout
        self.setup = setup
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> "LocalRanks":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        threads = max(1, len(os.sched_getaffinity(0)) // self.size)
        for _ in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, threads, self.setup), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
            pipe.close()
        for process in self._processes:
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []

    def run(self, function: Callable[..., Any], *arguments: Any, size: int | None = None) -> list[Any]:
        """Call `function(*arguments)` on `size` ranks (all by default), inside a gloo process group of that size.

        The function has to be importable by name and its arguments and results to be picklable. Returns the ranks'
        results in order. Where a rank raises, dies or exceeds the timeout, every process is ended (the next call
        starts new ones) and LocalRankError says what happened on each.
        """
        size = self.size if size is None else size
        if not 1 <= size <= self.size:
            raise ValueError(f"{size} ranks asked for, {self.size} there")
        if not self._processes:
            self._start()
        with tempfile.TemporaryDirectory(prefix="longctx-ranks-") as folder:
            for rank in range(size):
                self._pipes[rank].send((function, arguments, rank, size, f"{folder}/store", self.timeout))
            return self._collect(self._pipes[:size])

    def _collect(self, pipes: Sequence[Connection]) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
        patience = self.timeout + 30
        while waiting:
            ready = wait(list(waiting), timeout=patience)
            if not ready:
                failures.update(dict.fromkeys(waiting.values(), f"no answer within {patience:g} s"))
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    good, answer = pipe.recv()
                except EOFError:
                    good, answer = False, "the process died"
                (results if good else failures)[rank] = answer
            if failures:
                # The others may be waiting for the one that failed: a short while for their own words.
                patience = self.settle
        if failures:
            for process in self._processes:
                process.kill()
            self.close()
            raise LocalRankError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        return [results[rank] for rank in range(len(pipes))]
