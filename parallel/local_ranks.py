"""Local gloo ranks: a pool of processes on this machine that run a function as the ranks of a process group.

The processes are started once and reused; each call creates a new process group over the first `size` of them.
Verification, benchmarks and tests use it.
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import get_pg_count

from longctx.parallel.one_machine import LOOPBACK, job_folder

PRELOADED = [__name__]
"""Modules that are imported once, before the ranks are forked."""


class LocalRankError(RuntimeError):
    """A rank raised, crashed or timed out; the message contains the tracebacks."""


def _clear_dtensor_caches() -> None:
    """Clear DTensor's caches of meshes whose process groups are destroyed.

    Two meshes of equal shape and dim names compare equal, so an operation on a new mesh could return a cached result
    on an old one, whose groups no longer exist or whose group names now belong to other groups.
    """
    # Here, since it imports torch's compilers, which takes every process a second.
    from torch.distributed.tensor import debug

    debug._clear_sharding_prop_cache()
    for name, module in list(sys.modules.items()):
        if name.startswith("torch.distributed.tensor"):
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


def init_local_group(backend: str, file: str, rank: int, size: int, timeout: float) -> None:
    """Initialise the default process group of `size` ranks on this machine, which find each other through a file.

    Unlike an address and a port, nobody else can reach it if the file is in a private folder. `timeout`: seconds per
    collective.
    """
    limit = timedelta(seconds=timeout)
    store = dist.FileStore(file, size)
    store.set_timeout(limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)


def _serve(pipe: Connection, threads: int, setup: Callable[[], None] | None) -> None:
    torch.set_num_threads(threads)
    for name, value in LOOPBACK.items():
        os.environ.setdefault(name, value)
    if setup is not None:
        setup()
    gc.freeze()  # what was imported stays: collections after each run need not visit it
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        if task is None:
            return
        function, arguments, rank, size, file, timeout = task
        try:
            init_local_group("gloo", file, rank, size, timeout)
            try:
                # Without it a rank could finish and leave before another has connected, which would then fail.
                dist.barrier()
                result = (True, function(*arguments))
            finally:
                groups = get_pg_count()
                dist.destroy_process_group()
                _clear_dtensor_caches()
                if groups > 1:
                    # A group in a reference cycle keeps its threads, of which each wakes a hundred times per second.
                    gc.collect()
        except BaseException:  # noqa: BLE001 - sent to the caller, which raises it
            result = (False, traceback.format_exc())
        pipe.send(result)


class LocalRanks:
    """A pool of `size` rank processes on this machine, which run until `close()`."""

    def __init__(
        self, size: int, *, timeout: float = 60.0, settle: float = 5.0, setup: Callable[[], None] | None = None
    ) -> None:
        """Processes start at the first `run`. `timeout`: seconds per collective. `settle`: seconds that the other ranks
        have to finish after one has failed. `setup` is called once in each process when it starts.
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
        # Forked from a server that has imported torch but has computed nothing: torch is imported once for all ranks.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        threads = max(1, len(os.sched_getaffinity(0)) // self.size)
        for _ in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, threads, self.setup), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def close(self) -> None:
        """Terminate the processes."""
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

        Returns the results in rank order. The function has to be importable by name, its arguments and results
        picklable. If a rank raises, crashes or times out, all processes are killed (the next call starts new ones) and
        LocalRankError reports every failed rank.
        """
        size = self.size if size is None else size
        if not 1 <= size <= self.size:
            raise ValueError(f"run: size is {size}: expected 1 to {self.size}, the ranks of this pool")
        if not self._processes:
            self._start()
        with job_folder("ranks") as folder:
            for rank in range(size):
                self._pipes[rank].send((function, arguments, rank, size, str(folder / "store"), self.timeout))
            return self._collect(self._pipes[:size])

    def _collect(self, pipes: Sequence[Connection]) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
        patience = self.timeout + 30
        while waiting:
            ready = wait(list(waiting), timeout=patience)
            if not ready:
                failures.update(dict.fromkeys(waiting.values(), f"no result within {patience:g} s"))
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    succeeded, result = pipe.recv()
                except EOFError:
                    succeeded, result = False, "the process died"
                (results if succeeded else failures)[rank] = result
            if failures:
                # The other ranks may be waiting for the failed one: give them a short time to report their own errors.
                patience = self.settle
        if failures:
            for process in self._processes:
                process.kill()
            self.close()
            raise LocalRankError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        return [results[rank] for rank in range(len(pipes))]
