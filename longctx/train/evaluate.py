"""Held-out evaluation: the mean loss, the loss by position in the context, and the unigram baseline."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from longctx.data.blend import BlendedStream
from longctx.data.loader import Sequence as Packed
from longctx.engines.base import Batch, Engine
from longctx.engines.metrics import EvaluationMetrics, PositionLoss
from longctx.engines.router_stats import RoutingFluctuation
from longctx.kernels.loss import IGNORE
from longctx.parallel.collectives import all_reduce


def _bucket(positions: Tensor) -> Tensor:
    """Map positions to power-of-two buckets: 0 for position 0, 1 for [1, 2), 2 for [2, 4), ..."""
    exponents: Tensor = torch.frexp(positions.to(torch.float64))[1].to(torch.int64)
    return exponents


def evaluate(
    engine: Engine,
    sequences: Sequence[Packed],
    make: Callable[[Packed], Batch],
    step: int,
    routing_fluctuation: RoutingFluctuation,
) -> EvaluationMetrics:
    """Compute the mean loss (nats) over all labels of `sequences`, in total and by position in the document.

    `make` turns a sequence into this rank's batch; `routing_fluctuation` holds the routing of the previous evaluation
    and is updated. Collective: every rank calls it and gets the same result.
    """
    dp, dp_rank = engine.mesh.dp.size, engine.mesh.dp.rank
    length = len(sequences[0].tokens)
    buckets = max(1, length).bit_length() + 1
    sums = torch.zeros(2, buckets, dtype=torch.float64)
    routers: list[str] = []
    # FSDP communicates in every forward pass, so all ranks run equally many: surplus passes have no labels.
    for first in range(0, len(sequences), dp):
        number = first + dp_rank
        batch = make(sequences[min(number, len(sequences) - 1)])
        if number >= len(sequences):
            batch = replace(batch, labels=torch.full_like(batch.labels, IGNORE))
        losses = engine.losses(batch)
        routers = list(losses.reports)
        if number < len(sequences):
            routing_fluctuation.add(number, batch.layout, losses.reports)
        nll = losses.nll[0].double().cpu()
        valid = batch.labels[0].cpu() != IGNORE
        label_buckets = _bucket(batch.layout.positions)[valid]
        sums[0].index_add_(0, label_buckets, nll[valid])
        sums[1].index_add_(0, label_buckets, torch.ones(len(label_buckets), dtype=torch.float64))
    sums = all_reduce(sums.to(engine.device), engine.mesh.tokens).cpu()
    summed, counts = sums.tolist()
    edges = [0, *(2**n for n in range(buckets))]
    positions = tuple(
        PositionLoss(edges[n], edges[n + 1], summed[n] / counts[n] if counts[n] else math.nan, int(counts[n]))
        for n in range(buckets)
        if edges[n] < length
    )
    fluctuation = routing_fluctuation.rates(routers, engine.device, engine.mesh.tokens, engine.mesh.pp)
    return EvaluationMetrics(step, sum(summed) / sum(counts) if sum(counts) else math.nan, positions, fluctuation)


def unigram_loss(stream: BlendedStream, heldout: Sequence[Packed], vocab_size: int, *, tokens: int = 2**20) -> float:
    """Compute the held-out loss (nats per token) of a unigram model: a baseline that ignores the context.

    Token frequencies are counted in the first `tokens` of the training stream, at most an epoch (of a mix, of all its
    corpora), with add-one smoothing.
    """
    counts = torch.ones(vocab_size, dtype=torch.float64)
    for number in range(max(1, min(tokens // stream.sequence_length, math.ceil(stream.sequences_per_epoch)))):
        counts += torch.bincount(stream[number].tokens, minlength=vocab_size)
    surprise = -torch.log(counts / counts.sum())
    seen = torch.zeros(vocab_size, dtype=torch.float64)
    for sequence in heldout:
        seen += torch.bincount(sequence.labels[sequence.labels != IGNORE], minlength=vocab_size)
    return float((seen * surprise).sum() / seen.sum())  # NaN if no token has a label
