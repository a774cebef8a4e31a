"""What the tests of the engine run on ranks: one training, by DeepSpeed, by the torch engine and plainly."""

import contextlib
import os
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch.nn import functional as F

from longctx.engines.base import Batch
from longctx.engines.torch_engine import TorchEngine
from longctx.kernels.loss import IGNORE
from longctx.mixers import MIXERS
from longctx.model.config import ModelConfig
from longctx.model.ffn import SwigluConfig
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh
from longctx.recipe.tables import DeepSpeedConfig, OptimizerConfig, TrainConfig
from tests.mixers.cases import CONFIGS, DIM
from tests.model.cases import VOCABULARY, decoder, model_of, tokens

LENGTH = 24
PACKED = [(0, 24), (0, 5, 6, 24), (0, 23, 24), (0, 12, 24)]
LABELS = [24, 0, 3, 11]
"""Labels of four sequences in a row, counted from the end: ranks that divide by their own number are wrong."""
OPTIMIZER = OptimizerConfig(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.5)
RATES = (0.02, 0.01, 0.015)
CLIP = 0.05


@dataclass(frozen=True)
class Run:
    """A training, and how ranks share it."""

    stage: int = 2
    offload: str = "none"
    dp: int = 1
    cp: int = 1
    accumulation: int = 1
    packed: bool = True
    experts: str | None = None
    """The router, where there are experts."""
    precision: str = "fp32"
    clip: float | str = CLIP
    mixers: bool = False
    """A layer of every mixer, and of its options."""
    lean: bool = False
    """Blocks computed again, feed-forwards and loss in tiles."""

    @property
    def ranks(self):
        return self.dp * self.cp

    @property
    def sequences(self):
        """Of a step."""
        return self.dp * self.accumulation

    @property
    def model(self):
        return of_every_mixer() if self.mixers else model_of(self.experts)

    @property
    def train(self):
        lean = {"activation_checkpointing": "block", "ffn_tile": 5, "loss_tile": 7} if self.lean else {}
        return TrainConfig(steps=9, sequences_per_step=self.sequences, precision=self.precision, clip=self.clip, **lean)

    def __str__(self):
        words = [f"zero {self.stage}", f"dp {self.dp} cp {self.cp}", f"{self.accumulation} batches"]
        words += [self.offload] if self.offload != "none" else []
        words += [f"experts by {self.experts}"] if self.experts else []
        words += ["every mixer"] if self.mixers else []
        words += ["packed"] if self.packed else []
        words += ["lean"] if self.lean else []
        return ", ".join([*words, self.precision])


def of_every_mixer():
    tables = {config.name: CONFIGS[letter] for letter, config in MIXERS.items()}
    return ModelConfig(layers="".join(MIXERS), depth=len(MIXERS), dim=DIM, swiglu=SwigluConfig(hidden=10), **tables)


def sequence(number, step):
    """Tokens, labels and documents of a step's sequence."""
    x, labels = tokens(LENGTH, seed=100 * step + number), tokens(LENGTH, seed=100 * step + number + 50)
    labels[:, : LENGTH - LABELS[number % len(LABELS)]] = IGNORE
    return x, labels


def bounds_of(run, number):
    return PACKED[number % len(PACKED)] if run.packed else (0, LENGTH)


def batches_of(run, mesh, step):
    batches = []
    for number in range(mesh.dp.rank, run.sequences, mesh.dp.size):
        layout = Layout.on(mesh, bounds_of(run, number), "zigzag")
        x, labels = sequence(number, step)
        batches.append(Batch(layout.shard(x), layout.shard(labels, fill=IGNORE), layout))
    return batches


def fresh():
    """DeepSpeed as in a process that has just begun: it keeps counts and groups for the life of a process, and those of
    these tests live longer than their groups."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["LOCAL_RANK"] = "0"
    import deepspeed.comm.comm as comm
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK, DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    comm.cdb = None
    groups.mpu = None
    FWD_MODULE_STACK.clear()
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    Init.param_id = 0


@contextlib.contextmanager
def linear_as_it_was():
    """ZeRO 3 puts a function of its own in the place of torch's, for the life of a process."""
    before = F.linear
    yield
    F.linear = torch.nn.functional.linear = before


@contextlib.contextmanager
def deepspeed_engine(run, **options):
    """The engine of a run, in a process that goes on to other tests."""
    from longctx.adapters.deepspeed.engine import ZeroEngine

    fresh()
    mesh = Mesh.build("cpu", dp_shard=run.dp, cp=run.cp)
    config = DeepSpeedConfig(zero_stage=run.stage, offload=run.offload)
    options = {"vocab_size": VOCABULARY, "seed": 7} | options
    with linear_as_it_was(), warnings.catch_warnings():
        engine = ZeroEngine(run.model, run.train, OPTIMIZER, config, mesh, **options)
        yield engine
        engine.close()


@contextlib.contextmanager
def torch_engine(run):
    """The same by the torch engine."""
    mesh = Mesh.build("cpu", dp_shard=run.dp, cp=run.cp)
    yield TorchEngine(run.model, run.train, OPTIMIZER, mesh, vocab_size=VOCABULARY, seed=7)


@lru_cache
def one_rank_gradients(run):
    """Of the first step's loss, on one rank without an engine, in float64; and their norm."""
    model = decoder(run.model)
    share = 1 / sum(LABELS[number % len(LABELS)] for number in range(run.sequences))
    for number in range(run.sequences):
        x, labels = sequence(number, 0)
        losses = model(x, Layout(bounds_of(run, number)), labels, scale=share)
        (losses.total + sum(report.loss for report in losses.reports.values()) / run.sequences).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return gradients, torch.stack([g.norm() for g in gradients.values()]).norm().item()


def alike(run):
    """The run on one rank: what its gradient is to be."""
    return replace(Run(), accumulation=run.sequences, packed=run.packed, experts=run.experts, mixers=run.mixers)
