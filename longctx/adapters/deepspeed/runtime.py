"""DeepSpeed itself, begun on a process group that exists, and a model that it trains at one ZeRO stage."""

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


def begin(device_type: str) -> None:
    """Make DeepSpeed use the default process group, for tensors on `cpu` or `cuda`; every rank calls it.

    Raises UserError where it computes on another device.
    """
    here = get_accelerator().device_name()
    if here != device_type:
        raise UserError(
            f"DeepSpeed computes on {here!r} in this process, and train.device is {device_type!r}: set the environment "
            f"variable DS_ACCELERATOR={device_type}"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed's own calls, which a user of longctx cannot change.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", rf"`torch\.distributed\.{name}` is deprecated", FutureWarning)
    if device_type == "cpu":
        # Its all-reduce through shared memory would be compiled first, for a minute, and gloo has one.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(), auto_mpi_discovery=False, verbose=False
    )


@dataclass(frozen=True)
class Zero:
    """What is divided over ranks: nothing (stage 0), optimizer states (1), gradients too (2), parameters too (3)."""

    stage: int
    offload: Offload = "none"
    """What lies in the memory of the CPU: optimizer states, or parameters too."""
    precision: Literal["fp32", "bf16"] = "fp32"
    clip: float = 0.0
    """Largest norm of the gradient from stage 1 on; 0 for any."""
    bucket: int = 500_000_000
    """Numbers that are reduced together: DeepSpeed allocates a buffer of this length, however small the model."""

    @property
    def settings(self) -> dict[str, Any]:
        """DeepSpeed's configuration. The batches of a step are counted by the caller."""
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": self.bucket}
        if self.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.offload == "parameters":
            zero["offload_param"] = {"device": "cpu"}
        settings: dict[str, Any] = {
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
            settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        return settings

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters that are computed with."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


class Wrapped:
    """A model and its optimizer in DeepSpeed's hands."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, zero: Zero, groups: Groups) -> None:
        self.model, self.optimizer, self.zero = model, optimizer, zero
        # Some of its optimizers print how much memory is in use as they are made.
        with redirect_stdout(io.StringIO()):
            self.engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=zero.settings, mpu=groups, dist_init_required=False
            )

    def begin_batch(self, *, last: bool) -> None:
        """Before the forward pass of each batch: whether it is the last one of a step."""
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        """Add a batch's gradient to the step's."""
        self.engine.backward(loss, scale_wrt_gas=False)


def partition(module: nn.Module, config: dict[str, Any], dtype: torch.dtype, groups: Groups) -> None:
    """Divide the parameters of a module over the ranks, as ZeRO 3 has them, in a dtype; those that are, stay so.

    `config` is DeepSpeed's.
    """
    for parameter in module.parameters():
        if not hasattr(parameter, "ds_id"):
            # What `zero.Init` does for parameters that are made inside of it.
            parameter.data = parameter.data.to(dtype)
    deepspeed.zero.Init(
        module=module,
        data_parallel_group=groups.get_sequence_data_parallel_group(),
        config_dict_or_path=config,
        mpu=groups,
        dtype=dtype,
    )
