"""Names of the scalars of a run: the one table for all trackers."""

from dataclasses import asdict

from longctx.engines.metrics import EvaluationMetrics, SpikeMetrics, StepMetrics

Tracked = StepMetrics | EvaluationMetrics | SpikeMetrics
"""The records of a step, with their number as `step`."""


def scalars(record: Tracked) -> dict[str, float]:
    """Return the scalars of a record by name, `group/name`; position buckets without tokens have none."""
    match record:
        case StepMetrics():
            return _step(record)
        case EvaluationMetrics():
            # Zero-padded: trackers sort charts by name.
            by_position = {f"heldout_by_position/{b.lo:08d}": b.loss for b in record.positions if b.tokens}
            fluctuation = {f"routing_fluctuation/{layer}": share for layer, share in record.fluctuation.items()}
            return {"heldout/loss": record.loss, **by_position, **fluctuation}
        case SpikeMetrics():
            return {"train/spike": record.loss}


def _step(metrics: StepMetrics) -> dict[str, float]:
    return {
        "train/loss": metrics.loss,
        "train/lr": metrics.lr,
        "train/grad_norm": metrics.grad_norm,
        "train/tokens": metrics.tokens,
        "speed/tokens_per_second": metrics.tokens_per_second,
        "speed/utilisation": metrics.utilisation,
        "speed/step_seconds": metrics.seconds,
        "memory/peak_gib": metrics.memory_bytes / 2**30,
        **({f"waits/{name}": value for name, value in asdict(metrics.waits).items()} if metrics.waits else {}),
        **{
            f"routing_{name}/{layer}": value
            for layer, router in metrics.routers.items()
            for name, value in asdict(router).items()
        },
    }
