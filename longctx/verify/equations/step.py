"""A training step by the equations: the loss, logits and gradients that one rank has to compute in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.model.decoder import Decoder
from longctx.model.initialise import initialise
from longctx.verify.cases import SEQUENCES
from longctx.verify.equations.decoder import reference_losses
from longctx.verify.measure import Subject, sequence


@dataclass(frozen=True)
class Equations:
    """The equations of the model, on sequences of a packing, as something to compare one rank with."""

    packed: bool
    tokens: int | None = None
    """Length of the sequences, if it is not the subject's."""

    def __str__(self) -> str:
        part = "" if self.tokens is None else f" on {self.tokens} tokens"
        return f"the equations{part}" + (", packed" if self.packed else ", one document")


def evaluate(subject: Subject, packed: bool) -> dict[str, Tensor]:
    """Compute the loss, the logits `[SEQUENCES, T, N]` and every parameter's gradient, by name, float64.

    The loss is the mean negative log likelihood of all labels; gradients are of that and of the routers' losses, each
    the mean over sequences (`longctx.engines.step`).
    """
    with torch.device("meta"):
        model = Decoder(subject.model, subject.vocab_size).double()
    initialise(model.to_empty(device="cpu"), subject.seed)
    names, parameters = zip(*model.named_parameters(), strict=True)
    drawn = [sequence(subject, number, packed) for number in range(SEQUENCES)]
    count = sum(int((labels >= 0).sum()) for _, labels, _ in drawn)
    mean, each_logits = torch.zeros((), dtype=torch.float64), []
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for number, (tokens, labels, bounds) in enumerate(drawn):
        logits, loss, of_routers = reference_losses(model, subject.model, tokens, labels, bounds, sequence=number)
        share = loss / max(count, 1) + sum(of_routers.values()) / SEQUENCES
        for total, gradient in zip(gradients, torch.autograd.grad(share, parameters), strict=True):
            total += gradient
        mean += loss.detach() / max(count, 1)
        each_logits.append(logits.detach())
    return {"loss": mean, "logits": torch.cat(each_logits), **dict(zip(names, gradients, strict=True))}
