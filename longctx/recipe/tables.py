"""Recipe tables of the trainer: optimization, parallelism, engines, evaluation, checkpoints and logging."""

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from longctx.config import Config, Duration, Integer, PathText, without_password


class TrainConfig(Config):
    """`[train]`: steps, batch size, precision and memory."""

    steps: Integer = Field(gt=0)
    """Optimizer steps."""
    init: PathText | None = None
    """Initial weights instead of random ones, of a model with the same tensors: a checkpoint, a run's directory (its
    latest checkpoint), or the output of `longctx convert`. Positions (`rope_theta`, `rope_scaling`, `window`) may
    differ. Step, data and, without `init_optimizer`, optimizer state start fresh. Ignored when a run resumes from a
    checkpoint of its own."""
    init_optimizer: bool = False
    """Also continue the optimizer states (AdamW's moments) of `init`, a checkpoint of the same engine."""
    sequences_per_step: Integer = Field(default=1, gt=0)
    """Sequences per optimizer step over all ranks (global batch size); a multiple of the data-parallel size. Larger
    values use gradient accumulation."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """`bf16`: parameters and activations in bfloat16; master weights, gradient reduction and recurrent states in
    float32. `fp32`: float32 throughout."""
    activation_checkpointing: Literal["none", "block"] = "none"
    """Recomputation. `block`: save only each block's input and recompute the block in the backward pass."""
    ffn_tile: Annotated[Integer, Field(gt=0)] | Literal["none"] = "none"
    """Tokens per tile of the feed-forward: activations exist for one tile at a time and are recomputed in the backward
    pass. `none`: all of a rank's tokens at once, with activations saved."""
    loss_tile: Integer = Field(default=4096, gt=0)
    """Tokens per tile of the output head and the loss: logits take `loss_tile * vocab_size` floats, whatever the
    sequence length."""
    clip: Annotated[float, Field(gt=0)] | Literal["none"] = 1.0
    """Maximum gradient norm, over all parameters. `none`: no clipping."""
    deterministic: bool = True
    """Refuse operators without a deterministic implementation, so that a resumed run repeats the uninterrupted one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA if every local rank has a GPU, else the CPU."""

    @property
    def sequences(self) -> int:
        """Sequences of all steps, over all ranks."""
        return self.steps * self.sequences_per_step

    @model_validator(mode="after")
    def _init_optimizer_needs_init(self) -> "TrainConfig":
        if self.init_optimizer and self.init is None:
            raise ValueError("init_optimizer needs init, the checkpoint whose optimizer states continue")
        return self


class OptimizerConfig(Config):
    """`[optimizer]`: AdamW (Loshchilov & Hutter 2019), torch's fused implementation."""

    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate, where the schedule's factor is 1."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices; vectors (norms, biases) are not decayed."""

    @model_validator(mode="after")
    def _betas_in_range(self) -> "OptimizerConfig":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), not {self.betas}")
        return self


class LRScheduleConfig(Config):
    """`[schedule]`: the LR schedule, as a factor of `optimizer.lr`."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """`cosine`: cosine decay to `final` at the last step. `wsd`: warmup, stable, then linear decay to `final` over the
    last `decay` steps. `constant`: constant after warmup."""
    warmup: Integer = Field(default=0, ge=0)
    """Steps of linear warmup from 0."""
    decay: Integer | None = Field(default=None, gt=0)
    """Steps of the final decay; required for `wsd`, not allowed otherwise."""
    final: float | None = Field(default=None, ge=0, le=1)
    """Factor at the last step. Default: 0.1; not allowed for `constant`."""

    @model_validator(mode="after")
    def _decay_belongs_to_wsd(self) -> "LRScheduleConfig":
        if self.kind == "wsd" and self.decay is None:
            raise ValueError("kind = 'wsd' needs decay, the number of steps of the final decay")
        if self.kind != "wsd" and self.decay is not None:
            raise ValueError(f"decay is an option of kind = 'wsd', not of {self.kind!r}")
        if self.kind == "constant" and self.final is not None:
            raise ValueError("final is an option of 'cosine' and 'wsd', not of 'constant'")
        return self


class SpikeConfig(Config):
    """`[spikes]`: loss spikes, steps whose finite loss or gradient norm jumps (docs/spikes.md)."""

    policy: Literal["report", "skip", "stop"] = "report"
    """`report`: a message and a line of metrics. `skip`: the step's update is not applied, also after a resume; only
    with `engine = "torch"`. `stop`: the run ends with an error before it saves."""
    window: Integer = Field(default=64, ge=8)
    """Latest steps with an update, whose median and spread are the usual; before there are as many, no step is a
    spike."""
    deviations: float = Field(default=10.0, gt=0)
    """A step is a spike if its loss, or the logarithm of its gradient norm, is more than so many robust standard
    deviations above the median of the window."""
    max_skips: Integer | None = Field(default=None, gt=0)
    """Spikes in a row with which a run that skips them stops, since it has diverged. Default: 8; not allowed without
    `skip`."""

    @model_validator(mode="after")
    def _max_skips_belongs_to_skip(self) -> "SpikeConfig":
        if self.policy != "skip" and self.max_skips is not None:
            raise ValueError(f"max_skips is an option of policy = 'skip', not of {self.policy!r}")
        return self


class ParallelConfig(Config):
    """`[parallel]`: the device mesh, `dp_replicate * dp_shard * cp * tp * pp` ranks, and its schedules."""

    dp_replicate: Integer = Field(default=1, gt=0)
    """Data-parallel replicas of the sharded model (hybrid sharding, HSDP)."""
    dp_shard: Integer | Literal["rest"] = "rest"
    """Data-parallel ranks over which parameters are sharded (FSDP); `rest`: all ranks that the other axes leave."""
    cp: Integer = Field(default=1, gt=0)
    """Context-parallel ranks, which split each sequence. Parameters are sharded over them too."""
    ulysses: Integer = Field(default=1, gt=0)
    """Size of the Ulysses groups of neighbouring context-parallel ranks, a divisor of `cp`. Within a group softmax
    layers exchange tokens for heads by all-to-all; between groups the schedule `ulysses-ring` uses a ring and
    `ulysses-all-gather` an all-gather."""
    ep: Integer = Field(default=1, gt=0)
    """Expert-parallel ranks, which hold different experts and exchange tokens by all-to-all; neighbours among the
    `dp_shard * cp` ranks. Must divide that number and the number of experts."""
    tp: Integer = Field(default=1, gt=0)
    """Tensor-parallel ranks, which split the heads and channels of every layer; only with `engine = "megatron"`."""
    pp: Integer = Field(default=1, gt=0)
    """Pipeline-parallel ranks, which hold different layers; only with `engine = "megatron"`."""
    layout: Literal["contiguous", "zigzag", "balanced"] = "zigzag"
    """Tokens held by each context-parallel rank. `contiguous`: one piece per rank. `zigzag`: the r-th and the r-th last
    of `2 cp` pieces, which balances causal attention within one document. `balanced`: several smaller pieces per rank,
    which balances packed documents too; linear layers then send one state per piece."""
    attention: Literal["auto", "all-gather", "ring", "ulysses", "ulysses-ring", "ulysses-all-gather"] = "auto"
    """Schedule by which softmax layers reach keys and values of other ranks. `auto`: the fastest by a cost model of
    bytes, latency and FLOPs, with speeds measured at startup; the run's log shows the choice and its reason."""
    states: Literal["all-gather", "ring", "tree"] = "all-gather"
    """Schedule by which linear layers exchange recurrent states. `all-gather`: all states to all ranks at once
    (LASP-2). `ring`: from piece to piece, in sequence (LASP-1). `tree`: a tree scan in log2(pieces) rounds, for the
    delta rule over many ranks."""
    reproducible: Integer | Literal["none"] = "none"
    """Context-parallel ranks as which every run computes, on any number `cp` of processes that divides it: losses,
    gradients and checkpoints are then equal to the bit for every `cp` and number of data-parallel ranks, powers of two.
    Each process hosts `reproducible / cp` of them in threads and holds the whole model. On CPUs, with
    `engine = "torch"`."""
    timeout: Duration = Field(default=600.0, gt=0, le=30 * 86400)
    """Seconds that a rank waits for another rank before it stops with an error; at most 30 days. Also the longest limit
    of a step, an evaluation or a save, after which a rank that others wait for is named."""

    @property
    def fewest_ranks(self) -> int:
        """The smallest number of ranks that has all axes."""
        shard = math.lcm(self.ep, self.cp) // self.cp if self.dp_shard == "rest" else self.dp_shard
        return self.dp_replicate * shard * self.cp * self.tp * self.pp

    def shard(self, ranks: int) -> int | None:
        """Return the size of dp_shard for a number of ranks; None if the other axes do not divide it."""
        other_axes = self.dp_replicate * self.cp * self.tp * self.pp
        if isinstance(self.dp_shard, int):
            return self.dp_shard
        return None if ranks % other_axes else ranks // other_axes


class MegatronConfig(Config):
    """`[megatron]`: options of `engine = "megatron"`."""

    sequence_parallel: bool = True
    """With `tp` above 1, shard the activations between layers over the tensor-parallel ranks along the sequence
    (Korthikanti et al. 2022)."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over data- and context-parallel ranks."""


class DeepSpeedConfig(Config):
    """`[deepspeed]`: options of `engine = "deepspeed"`."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: `1` shards the optimizer state over all ranks, `2` also gradients, `3` also parameters; `0`
    nothing."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """State that is kept and updated in CPU memory: the optimizer state (stage 1 or higher), or also the parameters
    (stage 3)."""

    @model_validator(mode="after")
    def _offload_fits(self) -> "DeepSpeedConfig":
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(f"offload: {self.offload!r} needs zero_stage {least} or higher, not {self.zero_stage}")
        return self


class EvaluationConfig(Config):
    """`[evaluation]`: the loss on held-out documents. Without this table there is no evaluation."""

    every: Integer = Field(gt=0)
    """Steps between evaluations; one always follows the last step."""
    sequences: Integer = Field(default=8, gt=0)
    """Held-out sequences per evaluation, the same ones each time."""


class CheckpointConfig(Config):
    """`[checkpoint]`: checkpoints to resume from."""

    every: Integer = Field(gt=0)
    """Steps between checkpoints; one is always written after the last step and on SIGTERM."""
    keep: Integer = Field(default=2, gt=0)
    """Number of most recent checkpoints to keep."""
    keep_every: Annotated[Integer, Field(gt=0)] | Literal["none"] = "none"
    """Also keep every checkpoint whose step is a multiple of this, which is a multiple of `every`. `none`: no such
    milestones."""
    keep_best: bool | None = None
    """Also keep the checkpoint with the lowest held-out loss, of those at whose step there was an evaluation. Default:
    true where there is an `[evaluation]`."""
    copy_to: str | None = None
    """URL of a folder in an object store, such as `s3://bucket/runs/mine`, to which every checkpoint is copied after it
    is written (docs/checkpoints.md). A start with --resume auto downloads the latest copy if it is later than the
    checkpoints in the run's directory. Needs the store's package: s3fs for `s3://`, gcsfs for `gs://`, adlfs for
    `abfs://`."""
    verify: Literal["full", "sizes"] = "full"
    """What is compared before a checkpoint, or the weights of `train.init`, are read: `full`: the content of every file
    with its checksum, shared by the ranks; `sizes`: the files' sizes."""

    @field_validator("copy_to")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        if value is not None and "://" not in value:
            raise ValueError(f"expected a URL, such as s3://bucket/runs/mine, not {value!r}")
        return value

    @model_validator(mode="after")
    def _milestones_are_written(self) -> "CheckpointConfig":
        if self.keep_every != "none" and self.keep_every % self.every:
            raise ValueError(f"keep_every: {self.keep_every} is not a multiple of every = {self.every}")
        return self


class WandbConfig(Config):
    """`[logging.wandb]`: Weights & Biases. Without this table there is none. Needs the extra `wandb`; the credentials
    are those of `wandb login` or of the variable `WANDB_API_KEY`."""

    project: str | None = None
    """Default: `WANDB_PROJECT`, or W&B's own."""
    entity: str | None = None
    """User or team. Default: `WANDB_ENTITY`, or the user's own."""
    name: str | None = None
    """Name of the W&B run. Default: the recipe's."""
    group: str | None = None
    """Group of runs in W&B's tables."""
    tags: tuple[str, ...] = ()
    """Tags of the W&B run."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """`offline`: write to `wandb/` in the run's directory, for `wandb sync`. `disabled`: as without this table.
    Default: `WANDB_MODE`, or online."""


class MlflowConfig(Config):
    """`[logging.mlflow]`: MLflow. Without this table there is none. Needs the extra `mlflow`; the credentials are those
    of the variables `MLFLOW_TRACKING_USERNAME`, `MLFLOW_TRACKING_PASSWORD` and `MLFLOW_TRACKING_TOKEN`."""

    uri: str | None = None
    """Server or database, such as `https://mlflow.example.org` or `sqlite:///mlflow.db`, without a password. Default:
    `MLFLOW_TRACKING_URI`, or MLflow's own."""
    experiment: str | None = None
    """Experiment, created if there is none of that name. Default: `MLFLOW_EXPERIMENT_NAME`, or MLflow's own."""
    name: str | None = None
    """Name of the MLflow run. Default: the recipe's."""
    tags: dict[str, str] = Field(default={})
    """Tags of the MLflow run."""

    @field_validator("uri")
    @classmethod
    def _has_no_password(cls, value: str | None) -> str | None:
        if value is not None and without_password(value) != value:
            raise ValueError(
                f"{without_password(value)!r} names a user, and recipes are written to many places: set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole URI as MLFLOW_TRACKING_URI"
            )
        return value


class LoggingConfig(Config):
    """`[logging]`: metrics written during training."""

    every: Integer = Field(default=1, gt=0)
    """Steps between lines of metrics."""
    tensorboard: bool = True
    """Write TensorBoard event files in addition to the JSON lines."""
    wandb: WandbConfig | None = None
    """Weights & Biases."""
    mlflow: MlflowConfig | None = None
    """MLflow."""
