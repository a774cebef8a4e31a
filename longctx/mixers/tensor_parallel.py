"""Tensor parallelism of mixers: each rank has a shard of the heads, and its output is a partial sum.

A mixer declares which parameters are split by heads, and along which dimension (`Mixer.shares`); the others are
replicated, and their gradients are partial sums too. A fused projection is split part by part, so that a rank has the
same heads of each. In a mixture of heads each rank has some of the shared and some of the routed heads (`head_shares`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longctx.mixers.base import Mixer
from longctx.mixers.shares import Share
from longctx.parallel.mesh import Axis


def _kinds(mixer: Mixer) -> tuple[int, ...]:
    """Return the number of heads of each kind: shared and routed in a mixture of heads, else one kind."""
    return (1,) if mixer.head_router is None else mixer.head_router.kinds


def _split_by_kinds(length: int, kinds: tuple[int, ...]) -> tuple[int, ...]:
    """Split the length of all heads by kind.

    It is not split if one of its heads would belong to two kinds (a key/value group used by shared and routed heads),
    which is then on one rank.
    """
    heads = sum(kinds)
    return (length,) if any(length * kind % heads for kind in kinds) else tuple(length * n // heads for n in kinds)


def head_shares(mixer: Mixer) -> dict[str, Share]:
    """Return the shares of a mixer's parameters, with each kind of head split separately."""
    kinds = _kinds(mixer)
    return {
        name: Share(share.dim, tuple(length for part in share.parts for length in _split_by_kinds(part, kinds)))
        for name, share in mixer.shares().items()
    }


def local_head_values(values: Sequence[float], mixer: Mixer) -> Tensor:
    """Select the values of this rank's heads from one value per head of all ranks; float64."""
    share = Share(0, _split_by_kinds(len(values), _kinds(mixer)))
    return share.shard(torch.tensor(values, dtype=torch.float64, device="cpu"), mixer.tp_axis.rank, mixer.tp_axis.size)


def sharding_problem(mixer: Mixer, size: int) -> str | None:
    """Return why the heads of a mixer cannot be sharded over `size` ranks; None if they can."""
    if size == 1:
        return None
    if not mixer.supports_tensor_parallel:
        return f"{type(mixer).__name__} does not support tensor parallelism"
    router, kinds = mixer.head_router, _kinds(mixer)
    heads = sum(kinds)
    for name in mixer.head_counts:
        value = getattr(mixer, name)
        for count in value if isinstance(value, tuple) else (value,):
            if any(count * kind % (heads * size) for kind in kinds):
                detail = "" if router is None else f" ({router.shared} shared and {router.routed} routed heads)"
                return f"{name} {count}{detail} does not divide over {size} ranks"
    return None


@torch.no_grad()
def shard_heads(mixer: Mixer, axis: Axis) -> None:
    """Shard a mixer in place: keep this rank's heads, so that its output is a partial sum of the layer's.

    Norms over all heads then communicate over the axis. All other reductions are the caller's: of outputs, of gradients
    of the input and of those of replicated parameters. `Mixer.flops` has to be called before. Raises ValueError if the
    heads do not divide.
    """
    if axis.size == 1:
        return
    problem = sharding_problem(mixer, axis.size)
    if problem is not None:
        raise ValueError(f"tensor parallelism: {problem}")
    for name, share in head_shares(mixer).items():
        owner, _, last = name.rpartition(".")
        module = mixer.get_submodule(owner)
        tensor = getattr(module, last)
        shard = share.shard(tensor.detach(), axis.rank, axis.size).clone()
        if isinstance(tensor, nn.Parameter):
            setattr(module, last, nn.Parameter(shard))
        else:
            module.register_buffer(last, shard, persistent=last not in module._non_persistent_buffers_set)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = shard.shape
    for name in mixer.head_counts:
        value = getattr(mixer, name)
        local = tuple(count // axis.size for count in value) if isinstance(value, tuple) else value // axis.size
        setattr(mixer, name, local)
    for module in mixer.modules():
        if hasattr(module, "tp_axis"):
            object.__setattr__(module, "tp_axis", axis)
