"""DeepSpeed's own tests of Ulysses, with our exchange of heads in the place of theirs, on four gloo ranks.

    python -m tests.adapters.deepspeed.upstream CHECKOUT

CHECKOUT is one of DeepSpeed's repository. Their launcher starts processes for every case; here the bodies of the tests
run on ranks that are there already. What they download (a model that they do not look into) is a small module.
"""

import io
import itertools
import os
import sys
import traceback
from collections import Counter
from contextlib import ExitStack, redirect_stdout
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import torch

from longctx.parallel.local_ranks import LocalRanks
from tests.adapters.deepspeed.training import fresh

MODULE = "unit.sequence_parallelism.test_ulysses"
TESTS = ("TestUlyssesAll2All", "TestUlyssesAll2All_odd")
"""Those that exchange heads and need neither a GPU nor flash-attn."""
MORE_HEADS = (4, 6, 8)
"""For the second, which compares every number and is written for 3 and 7 heads, which two ranks do not divide."""
RANKS = 4


class OurExchange:
    """Called as `deepspeed.sequence.layer._SeqAllToAll` is, made of what our `DistributedAttention` is made of, which
    does not ask where the batch is."""

    heads: int
    """Of the tensor whose heads were divided last."""

    @classmethod
    def apply(cls, group, x, scatter, gather, batch_dim):
        from longctx.adapters.deepspeed import DistributedAttention
        from longctx.parallel.attention.ulysses import HeadPartition, gather_heads, scatter_heads

        sequence_dim = gather if scatter == 2 else scatter
        module = DistributedAttention(lambda q, k, v: q, group, 2, sequence_dim)
        rows = module._swap_sequence_dim(x)
        if scatter == 2:
            cls.heads = x.shape[2]
            heads = HeadPartition(cls.heads, cls.heads, module.axis.size)
            return module._swap_sequence_dim(scatter_heads(rows, rows, rows, heads, module.axis.group)[0])
        heads = HeadPartition(cls.heads, cls.heads, module.axis.size)
        return module._swap_sequence_dim(gather_heads(rows, heads, module.axis.group))


def run(checkout, name, method, arguments):
    """One test on this rank: what became of it."""
    os.environ.setdefault("RANK", "0")
    fresh()
    sys.path.insert(0, str(Path(checkout) / "tests"))
    try:
        tests = import_module(MODULE)
        with (
            ExitStack() as stack,
            patch.object(tests, "_SeqAllToAll", OurExchange),
            # Its arguments are others in 0.19.8 than in the checkouts that were tried.
            patch.object(tests, "get_shard_size_list", lambda heads, size: [heads // size] * size),
            patch.object(tests.AutoModel, "from_pretrained", lambda name: torch.nn.Linear(3, 3)),
        ):
            from longctx.adapters.deepspeed.runtime import init_distributed

            init_distributed("cpu")
            stack.enter_context(redirect_stdout(io.StringIO()))  # they print shapes
            case = object.__new__(getattr(tests, name))
            getattr(case, method)(**arguments)
    except ValueError as error:
        if "heads do not divide over" not in str(error):
            raise
        return "refused: heads do not divide over the ranks"
    except Exception:  # noqa: BLE001 - told to whoever runs the script
        return "failed: " + traceback.format_exc(limit=-2)
    finally:
        sys.path.pop(0)
    return "passed"


def cases(checkout):
    """The tests' classes, methods and arguments."""
    sys.path.insert(0, str(Path(checkout) / "tests"))
    tests = import_module(MODULE)
    for name in TESTS:
        kind = getattr(tests, name)
        marks = [mark.args for mark in kind.pytestmark if mark.name == "parametrize"]
        choices = {key: list(values) for key, values in marks}
        if name == TESTS[1]:
            choices["num_heads"] += MORE_HEADS
        for values in itertools.product(*choices.values()):
            yield name, "test_alltoall_output_consistency", dict(zip(choices, values, strict=True))


def main(checkout):
    """Run them all, and say what became of them."""
    outcomes = Counter()
    with LocalRanks(RANKS) as ranks:
        for name, method, arguments in cases(checkout):
            for outcome in set(ranks.run(run, checkout, name, method, arguments)):
                outcomes[name, f"{arguments['num_heads']} heads", outcome] += 1
    for (name, heads, outcome), count in sorted(outcomes.items()):
        print(f"{name}, {heads}: {count} {outcome}")  # noqa: T201 - what a script is for
    return int(any(outcome.startswith("failed") for *_, outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
