"""Weight initialisation that depends only on the seed and each parameter's name.

Matrices are drawn from N(0, 1 / fan_in); those that write to the residual stream (`out`, `down`) are scaled by a
further `1 / sqrt(2 depth)`, so that its variance does not grow with depth (Radford et al. 2019). Embedding rows are
drawn from N(0, 1 / D), so that tied logits start at unit scale. Norms are 1. A module's `initial(name, shape,
generator)` takes precedence (decays, biases, convolutions). Each matrix, and each expert's, is drawn separately in
float32 on the CPU, whatever the model's dtype, device and sharding: weights are identical for any number of ranks, and
no rank holds the whole model.
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
        # Every rank has drawn the same values, so no broadcast is needed.
        mesh, placements = parameter.device_mesh, parameter.placements
        value = distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
    parameter.copy_(value)


def _fill_experts(parameter: Tensor, std: float, seed: int, name: str) -> None:
    """Fill `[E, rows, columns]`, one matrix per expert; draw only the experts of which this rank has rows."""
    count, rows, columns = parameter.shape
    # Row numbers, sharded as the parameter is: they identify this rank's rows and experts.
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
        local_rows = (numbers[0, :, 0] % rows).cpu()
        for matrix, expert in zip(local, (numbers[:, 0, 0] // rows).tolist(), strict=True):
            value = torch.randn(rows, columns, generator=_generator(seed, f"{name}.{expert}"))
            matrix.copy_(value[local_rows] * std)


def _draw(module: nn.Module, name: str, shape: torch.Size, seed: int) -> Tensor:
    """Return the initial value of a module's own parameter, float32 on the CPU; `name` is its full name."""
    std, initial = getattr(module, "init_std", None), getattr(module, "initial", None)
    if initial is not None:
        value: Tensor = initial(name.rpartition(".")[2], shape, _generator(seed, name))
        return value
    if std is None:
        return torch.ones(shape)
    return torch.randn(shape, generator=_generator(seed, name)) * std


@torch.no_grad()
def initial_value(model: nn.Module, name: str, seed: int) -> Tensor:
    """Return the value to which `initialise` sets the parameter `name`: unsharded, float32, on the CPU.

    The model may be on the meta device. For experts the result holds all of them.
    """
    module, shape = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name).shape
    stds: dict[str, float] | None = getattr(module, "stds", None)
    if stds is None:
        return _draw(module, name, shape, seed)
    value = torch.empty(shape, device="cpu")
    _fill_experts(value, stds[name.rpartition(".")[2]], seed, name)
    return value


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Initialise all parameters and buffers of a model, which may be sharded or just materialised from meta."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if hasattr(module, "stds"):
                _fill_experts(parameter, module.stds[name.rpartition(".")[2]], seed, name)
            else:
                _fill(parameter, _draw(module, name, parameter.shape, seed))
        if hasattr(module, "reset_buffers"):
            module.reset_buffers()
