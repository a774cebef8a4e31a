"""An unmodified `pretrain_gpt.py` of a Megatron-LM checkout with our specs, on CPU ranks:

    torchrun --nproc-per-node 2 -m tests.adapters.megatron.pretrain CHECKOUT --spec \
        longctx.adapters.megatron.specs lightning_hybrid --context-parallel-size 2

Data is Megatron's mock data; what follows CHECKOUT is added to the arguments below and wins over them. Runs in the
checkout's own Megatron-Core, with what it asks of CUDA answered by the CPU (`shim.py`).
"""

import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # it would compile for the device that is not there

import torch

from tests.adapters.megatron.shim import on_cpu

ARGUMENTS = """
    --distributed-backend gloo --use-cpu-initialization --mock-data --tokenizer-type NullTokenizer --vocab-size 127
    --num-layers 8 --hidden-size 64 --num-attention-heads 8 --ffn-hidden-size 128 --seq-length 128
    --max-position-embeddings 128 --micro-batch-size 1 --global-batch-size 4 --train-iters 10 --lr 1e-2
    --lr-warmup-iters 2 --clip-grad 1.0 --transformer-impl local --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --disable-bias-linear --swiglu --attention-dropout 0 --hidden-dropout 0
    --no-create-attention-mask-in-dataloader --no-persist-layer-norm --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --split 1,0,0
    --eval-iters 0 --eval-interval 1000 --log-interval 1 --num-workers 0 --ckpt-format torch_dist
    --mamba-head-dim 16 --mamba-num-groups 2 --mamba-state-dim 16
"""

ANSWERS = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "memory_allocated": lambda *_: 0,
    "max_memory_allocated": lambda *_: 0,
    "memory_reserved": lambda *_: 0,
    "max_memory_reserved": lambda *_: 0,
    "memory_stats": lambda *_: {},
    "reset_peak_memory_stats": lambda *_: None,
    "get_device_properties": lambda *_: SimpleNamespace(total_memory=2**34, major=9, minor=0, multi_processor_count=1),
    "get_device_capability": lambda *_: (9, 0),
}
"""What the training script asks of CUDA before it begins, and reports."""


def main(checkout: Path, more: list[str]) -> None:
    """Run it in this rank."""
    sys.path.insert(0, str(checkout))
    sys.argv = ["pretrain_gpt.py", *ARGUMENTS.split(), *more]
    if (checkout / "megatron" / "legacy").is_dir():
        from megatron.legacy import fused_kernels

        fused_kernels.load = lambda args: None  # CUDA's compiler is asked for, and the kernels are switched off above
    with on_cpu(), patch.multiple(torch.cuda, **ANSWERS):
        runpy.run_path(str(checkout / "pretrain_gpt.py"), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
