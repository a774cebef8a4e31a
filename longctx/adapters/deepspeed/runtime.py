"""DeepSpeed setup: its process group, the ZeRO settings, and the wrapped model that recipes train."""

import io
import logging
import os
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Literal

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from longctx.adapters.deepspeed.groups import Groups
from longctx.errors import UserError

Offload = Literal["none", "optimizer", "parameters"]


def init_distributed(device_type: str) -> None:
    """Make DeepSpeed use the existing default process group, on `cpu` or `cuda`; every rank has to call it.

    Raises UserError if DeepSpeed's accelerator is another device.
    """
    accelerator = get_accelerator().device_name()
    if accelerator != device_type:
        raise UserError(
            f"DeepSpeed's accelerator is {accelerator!r} in this process, but train.device is {device_type!r}: set the "
            f"environment variable DS_ACCELERATOR={device_type}"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed's own calls, which users of longctx cannot change.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", rf"`torch\.distributed\.{name}` is deprecated", FutureWarning)
    if device_type == "cpu":
        # DeepSpeed would first compile its shared-memory all-reduce, for a minute; gloo has an all-reduce.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(), auto_mpi_discovery=False, verbose=False
    )


@dataclass(frozen=True)
class ZeroSettings:
    """ZeRO settings. Partitioned over ranks: nothing (stage 0), optimizer states (1), gradients (2), parameters (3)."""

    stage: int
    offload: Offload = "none"
    """What is offloaded to CPU memory: optimizer states, or parameters as well."""
    precision: Literal["fp32", "bf16"] = "fp32"
    clip: float = 0.0
    """Gradient clipping norm, from stage 1 on; 0: no clipping."""
    bucket: int = 500_000_000
    """Elements per reduction bucket: DeepSpeed allocates a buffer of this size, however small the model."""

    @property
    def config(self) -> dict[str, Any]:
        """DeepSpeed's config. Gradient accumulation boundaries are set by the caller."""
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": self.bucket}
        if self.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.offload == "parameters":
            zero["offload_param"] = {"device": "cpu"}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.clip,
            "communication_data_type": "fp32",
            "seq_parallel_communication_data_type": "fp32",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
        }
        if self.precision == "bf16":
            config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        return config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters in the forward pass."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


class DeepSpeedModel:
    """A model and its optimizer, wrapped in a DeepSpeed engine."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, zero: ZeroSettings, groups: Groups) -> None:
        self.model, self.optimizer, self.zero = model, optimizer, zero
        # Some of DeepSpeed's optimizers print their memory use when they are created.
        with redirect_stdout(io.StringIO()):
            self.engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=zero.config, mpu=groups, dist_init_required=False
            )

    def begin_batch(self, *, last: bool) -> None:
        """Set the gradient accumulation boundary, before the forward pass of each micro-batch: the step's `last`
        one?"""
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a micro-batch."""
        self.engine.backward(loss, scale_wrt_gas=False)


def partition_parameters(module: nn.Module, config: dict[str, Any], dtype: torch.dtype, groups: Groups) -> None:
    """Cast a module's parameters to `dtype` and partition them over the ranks, as ZeRO 3 does; skips partitioned ones.

    `config`: DeepSpeed's config.
    """
    for parameter in module.parameters():
        if not hasattr(parameter, "ds_id"):
            # `zero.Init` casts only parameters that are created inside its context.
            parameter.data = parameter.data.to(dtype)
    deepspeed.zero.Init(
        module=module,
        data_parallel_group=groups.get_sequence_data_parallel_group(),
        config_dict_or_path=config,
        mpu=groups,
        dtype=dtype,
    )
