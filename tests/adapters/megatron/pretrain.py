"""An unmodified `pretrain_gpt.py` of a Megatron-LM checkout with our specs, on CPU ranks:

    torchrun --nproc-per-node 2 -m tests.adapters.megatron.pretrain CHECKOUT --spec \
        longctx.adapters.megatron.specs lightning_hybrid --context-parallel-size 2

Data is Megatron's mock data; what follows CHECKOUT is added to the arguments below and wins over them. Runs in the
checkout's own Megatron-Core, with what it asks of CUDA answered by the CPU (`shim.py`).
"""

import runpy
import sys
from pathlib import Path

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


def main(checkout: Path, more: list[str]) -> None:
    """Run it in this rank."""
    sys.path.insert(0, str(checkout))
    sys.argv = ["pretrain_gpt.py", *ARGUMENTS.split(), *more]
    with on_cpu():
        runpy.run_path(str(checkout / "pretrain_gpt.py"), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
