"""Verification to the bit: a training step of virtual ranks on several processes, against the same on one process.

A fault on one rank that rounding would hide, such as a gradient that is wrong by a thousandth in bf16, changes bits.
Runs in the recipe's precision, with the engine of `parallel.reproducible`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.engines.reproducible import ReproducibleEngine
from longctx.parallel.local_ranks import LocalRanks
from longctx.parallel.mesh import Mesh
from longctx.verify.cases import SEQUENCES, Case
from longctx.verify.measure import Subject, batch_of, take_step
from longctx.verify.run import Row, largest, relative


@dataclass(frozen=True)
class Shared:
    """A number of virtual ranks on a number of processes."""

    virtual: int
    processes: int
    packed: bool

    def __str__(self) -> str:
        shared = f"{self.virtual} virtual ranks on {self.processes} {'process' if self.processes == 1 else 'processes'}"
        return shared + (", packed" if self.packed else ", one document")


def step_of(subject: Subject, shared: Shared) -> dict[str, Tensor]:
    """Take a step on this process, one of a CPU process group: the loss, gradients, norm and updates by name."""
    mesh = Mesh.build("cpu", cp=shared.processes)
    engine = ReproducibleEngine(
        subject.model,
        subject.train,
        subject.optimizer,
        mesh,
        ranks=shared.virtual,
        vocab_size=subject.vocab_size,
        seed=subject.seed,
    )
    case = Case(shared.processes, "zigzag", shared.packed)
    batches = [batch_of(subject, case, n, engine.mesh) for n in range(SEQUENCES)]
    loss, gradients, step = take_step(engine, batches, subject.optimizer.lr)
    engine.close()
    return {"loss": torch.tensor(loss, dtype=torch.float64)} | gradients | step


def difference(x: Tensor, ref: Tensor) -> float:
    """Return 0 where two tensors are equal to the bit, else their relative difference, above 0."""
    return 0.0 if torch.equal(x, ref) else relative(x.double(), ref.double()) or 5e-324


def verify_bits(
    subject: Subject, ranks: LocalRanks, *, step_of: Callable[[Subject, Shared], dict[str, Tensor]] = step_of
) -> Iterator[Row]:
    """Compare every process of 2, 4 and more that share the virtual ranks with one that has all; the bound is 0.

    There are as many virtual ranks as the largest power of two of `ranks`; none below two. `step_of` runs on each rank.
    """
    virtual = 1 << (ranks.size.bit_length() - 1)
    for packed in (False, True) if virtual > 1 else ():
        (want,) = ranks.run(step_of, subject, Shared(virtual, 1, packed), size=1)
        for processes in (2**n for n in range(1, virtual.bit_length())):
            shared = Shared(virtual, processes, packed)
            each = ranks.run(step_of, subject, shared, size=processes)
            off = largest([{name: difference(x[name], ref) for name, ref in want.items()} for x in each])
            yield Row(shared, subject.train.precision, off, dict.fromkeys(off, 0.0))
