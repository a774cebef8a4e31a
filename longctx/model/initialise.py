"""Initial weights that depend on the seed and on each parameter's name alone.

Matrices from N(0, 1 / fan_in); those that write into the residual stream (`out`, `down`) scaled by a further
`1 / sqrt(2 depth)`, so that the stream's variance does not grow with the depth (Radford et al. 2019); embedding rows
from N(0, 1 / D), so that tied logits start at unit scale; norms 1; what a module's `initial(name, shape, generator)`
says (decays, biases, convolutions). Every matrix is drawn in float32 on the CPU, one at a time, an expert's by itself,
whatever the model's dtype, device and sharding: the same numbers on one rank and on N, and no rank holds the whole
model.
"""

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _fill(parameter: Tensor, value: Tensor) -> None:
    value = value.to(parameter.dtype)
    if isinstance(parameter, DTensor):
        # Every rank drew the same values, so nothing has to be sent.
        mesh, placements = parameter.device_mesh, parameter.placements
        value = distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
    parameter.copy_(value)


def _fill_each(parameter: Tensor, std: float, seed: int, name: str) -> None:
    """Fill `[E, rows, columns]`, a matrix for each expert: only those drawn of which this rank has rows."""
    count, rows, columns = parameter.shape
    # Numbers laid out as the parameter is: they say which rows of which experts lie here.
    numbers = torch.arange(count * rows).view(count, rows, 1)
    local = parameter
    if isinstance(parameter, DTensor):
        numbers = numbers.to(parameter.device)
        numbers = distribute_tensor(
            numbers, parameter.device_mesh, parameter.placements, src_data_rank=None
        ).to_local()  # fmt: skip
        local = parameter.to_local()
    if local.numel():
        assert local.shape == (*numbers.shape[:2], columns)
        here = (numbers[0, :, 0] % rows).cpu()
        for matrix, expert in zip(local, (numbers[:, 0, 0] // rows).tolist(), strict=True):
            drawn = torch.randn(rows, columns, generator=_generator(seed, f"{name}.{expert}"))
            matrix.copy_(drawn[here] * std)


def _drawn(module: nn.Module, name: str, shape: torch.Size, seed: int) -> Tensor:
    """The first value of a module's own parameter, float32 on the CPU; `name` is the whole one in its model."""
    std, initial = getattr(module, "init_std", None), getattr(module, "initial", None)
    if initial is not None:
        value: Tensor = initial(name.rpartition(".")[2], shape, _generator(seed, name))
        return value
    if std is None:
        return torch.ones(shape)
    return torch.randn(shape, generator=_generator(seed, name)) * std


@torch.no_grad()
def drawn(model: nn.Module, name: str, seed: int) -> Tensor:
    """What `initialise` gives the parameter `name` of a model, which may be on the meta device: float32, on the CPU,
    whole, which of experts is all of them."""
    module, shape = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name).shape
    stds: dict[str, float] | None = getattr(module, "stds", None)
    if stds is None:
        return _drawn(module, name, shape, seed)
    value = torch.empty(shape, device="cpu")
    _fill_each(value, stds[name.rpartition(".")[2]], seed, name)
    return value


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Draw every parameter and fill every buffer of a model that may be sharded, or fresh from the meta device."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if hasattr(module, "stds"):
                _fill_each(parameter, module.stds[name.rpartition(".")[2]], seed, name)
            else:
                _fill(parameter, _drawn(module, name, parameter.shape, seed))
        if hasattr(module, "reset_buffers"):
            module.reset_buffers()
