"""The heads of a mixer divided over ranks (tensor parallelism): each has some of the heads, and gives a summand.

A mixer says which of its parameters heads divide, and along which dim (`Mixer.shares`); the rest is whole on every
rank, where its gradient is a summand too. A parameter that several projections lie in one after another is divided part
by part, so that a rank has whole heads of each. Of a mixture of heads, whose shared heads lie before its routed ones,
it has some of either kind (`divisions`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longctx.mixers.base import Mixer
from longctx.mixers.shares import Share
from longctx.parallel.mesh import Axis


def _kinds(mixer: Mixer) -> tuple[int, ...]:
    """In what proportion heads are of each kind: the shared and the routed ones of a mixture."""
    return (1,) if mixer.head_router is None else mixer.head_router.kinds


def _by_kinds(length: int, kinds: tuple[int, ...]) -> tuple[int, ...]:
    """A length of all heads as those of each kind; whole where one head of it belongs to two kinds (a group that
    shared and routed heads read), which is then on one rank."""
    heads = sum(kinds)
    return (length,) if any(length * kind % heads for kind in kinds) else tuple(length * n // heads for n in kinds)


def divisions(mixer: Mixer) -> dict[str, Share]:
    """How ranks divide the parameters of a mixer, with heads of every kind by themselves."""
    kinds = _kinds(mixer)
    return {
        name: Share(share.dim, tuple(length for part in share.parts for length in _by_kinds(part, kinds)))
        for name, share in mixer.shares().items()
    }


def local_head_values(values: Sequence[float], mixer: Mixer) -> Tensor:
    """Of a number for each head of all ranks those of this rank's heads, in float64."""
    share = Share(0, _by_kinds(len(values), _kinds(mixer)))
    return share.of(torch.tensor(values, dtype=torch.float64, device="cpu"), mixer.tp_axis.rank, mixer.tp_axis.size)


def obstacle(mixer: Mixer, size: int) -> str | None:
    """What keeps the heads of a mixer from being divided over so many ranks, in words; None where nothing does."""
    if size == 1:
        return None
    if not mixer.divisible:
        return f"the heads of {type(mixer).__name__} are not divided"
    router, kinds = mixer.head_router, _kinds(mixer)
    heads = sum(kinds)
    for name in mixer.counts:
        count = getattr(mixer, name)
        for each in count if isinstance(count, tuple) else (count,):
            if any(each * kind % (heads * size) for kind in kinds):
                what = "" if router is None else f", of {router.shared} shared and {router.routed} routed heads,"
                return f"{name} {each}{what} does not divide over {size} ranks"
    return None


@torch.no_grad()
def divide(mixer: Mixer, axis: Axis) -> None:
    """Leave a mixer with all of its heads those of this rank; its output is from now on a summand of the layer's.

    A norm over all heads then runs over the ranks of the axis. Nothing else communicates: adding up outputs, the
    gradients of the input and those of parameters that every rank has whole, is the caller's. Work (`Mixer.flops`) is
    to be counted before. Raises ValueError where heads do not divide.
    """
    if axis.size == 1:
        return
    found = obstacle(mixer, axis.size)
    if found is not None:
        raise ValueError(f"tensor parallelism: {found}")
    for name, share in divisions(mixer).items():
        owner, _, last = name.rpartition(".")
        module = mixer.get_submodule(owner)
        tensor = getattr(module, last)
        part = share.of(tensor.detach(), axis.rank, axis.size).clone()
        if isinstance(tensor, nn.Parameter):
            setattr(module, last, nn.Parameter(part))
        else:
            module.register_buffer(last, part, persistent=last not in module._non_persistent_buffers_set)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = part.shape
    for name in mixer.counts:
        count = getattr(mixer, name)
        parts = tuple(each // axis.size for each in count) if isinstance(count, tuple) else count // axis.size
        setattr(mixer, name, parts)
    for module in mixer.modules():
        if hasattr(module, "tp_axis"):
            object.__setattr__(module, "tp_axis", axis)
