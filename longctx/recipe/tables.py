"""The parts of a recipe that the trainer owns."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from longctx.config import Config, Duration, Integer


class TrainConfig(Config):
    """`[train]`: how long, in which precision, at which memory."""

    steps: Integer = Field(gt=0)
    """Optimizer steps."""
    init: str | None = Field(default=None, min_length=1)
    """Weights to begin with in the place of drawn ones, of the same model: a checkpoint, a run's directory (its newest
    one), or what `longctx convert` wrote. Step, data and optimizer begin anew; a run that goes on from a checkpoint of
    its own does not look at it."""
    sequences_per_step: Integer = Field(default=1, gt=0)
    """Sequences in one optimizer step, over all ranks: a multiple of the data-parallel size, and where it is more
    than that, gradients are accumulated."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """`bf16`: parameters and activations in bfloat16, master weights, gradients' reduction and states in float32."""
    activation_checkpointing: Literal["none", "block"] = "none"
    """`block`: keep each block's input alone and recompute the block in the backward pass."""
    ffn_tile: Annotated[Integer, Field(gt=0)] | Literal["none"] = "none"
    """Tokens whose feed-forward activations exist at one time; the backward pass makes them again. `none`: all of a
    rank's tokens, kept."""
    loss_tile: Integer = Field(default=4096, gt=0)
    """Tokens whose logits exist at one time: the loss needs `loss_tile * vocab_size` floats, whatever the sequence."""
    clip: Annotated[float, Field(gt=0)] | Literal["none"] = 1.0
    """Largest norm of the gradient, over all parameters."""
    deterministic: bool = True
    """Refuse operators that have no deterministic form, so that a resumed run repeats the uninterrupted one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where there is a GPU for every local rank, else the CPU."""


class OptimizerConfig(Config):
    """`[optimizer]`: AdamW (Loshchilov & Hutter 2019, decoupled weight decay), torch's fused implementation."""

    lr: float = Field(default=3e-4, gt=0)
    """Learning rate where the schedule's factor is 1."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the mean square."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Applied to matrices; vectors (norms, biases) are not decayed."""

    @model_validator(mode="after")
    def _betas_in_range(self) -> "OptimizerConfig":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), not {self.betas}")
        return self


class LRScheduleConfig(Config):
    """`[schedule]`: the learning rate over steps, as a factor of `optimizer.lr`."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """`cosine`: down to `final` at the last step. `wsd`: warm-up, stable, then linear over the last `decay` steps."""
    warmup: Integer = Field(default=0, ge=0)
    """Steps of linear warm-up from 0."""
    decay: Integer | None = Field(default=None, gt=0)
    """Steps of the final decay; `wsd` needs it, the others refuse it."""
    final: float | None = Field(default=None, ge=0, le=1)
    """Factor at the last step: 0.1 where absent; `constant` refuses it."""

    @model_validator(mode="after")
    def _decay_belongs_to_wsd(self) -> "LRScheduleConfig":
        if self.kind == "wsd" and self.decay is None:
            raise ValueError("kind = 'wsd' needs decay, the number of steps at the end over which the rate falls")
        if self.kind != "wsd" and self.decay is not None:
            raise ValueError(f"decay belongs to kind = 'wsd', not to {self.kind!r}")
        if self.kind == "constant" and self.final is not None:
            raise ValueError("final belongs to schedules that end lower than they began, not to 'constant'")
        return self


class ParallelConfig(Config):
    """`[parallel]`: how ranks divide the work. `dp_replicate * dp_shard * cp * tp * pp` is the number of ranks."""

    dp_replicate: Integer = Field(default=1, gt=0)
    """Groups of ranks that each hold the whole model (hybrid sharding)."""
    dp_shard: Integer | Literal["rest"] = "rest"
    """Data-parallel ranks over which parameters are sharded; `rest`: what the other axes leave."""
    cp: Integer = Field(default=1, gt=0)
    """Ranks that split each sequence. Parameters are sharded over these too."""
    ulysses: Integer = Field(default=1, gt=0)
    """Neighbouring context-parallel ranks that form an Ulysses group, a divisor of `cp`: softmax layers change heads
    for tokens inside a group, and the schedules `ulysses-ring` and `ulysses-all-gather` go on between groups."""
    ep: Integer = Field(default=1, gt=0)
    """Ranks that divide the experts between them and exchange tokens: neighbours among `dp_shard * cp`, which `ep`
    divides, as it does the number of experts."""
    tp: Integer = Field(default=1, gt=0)
    """Ranks that divide heads and channels of every layer (tensor parallelism); the engine `megatron` has it."""
    pp: Integer = Field(default=1, gt=0)
    """Ranks that each hold some of the layers (pipeline parallelism); the engine `megatron` has it."""
    layout: Literal["contiguous", "zigzag", "balanced"] = "zigzag"
    """Which tokens a context-parallel rank holds. `zigzag` balances the causal work of softmax layers on one document;
    `balanced` gives out smaller pieces, so that packed documents are balanced as well (linear layers send a state for
    each piece)."""
    attention: Literal["auto", "all-gather", "ring", "ulysses", "ulysses-ring", "ulysses-all-gather"] = "auto"
    """How softmax layers reach other ranks' keys. `auto`: what a model of bytes, latency and arithmetic, with speeds
    measured at the start, expects to be fastest; the run's log says what it chose and why."""
    states: Literal["all-gather", "ring", "tree"] = "all-gather"
    """How the states of linear layers travel. `all-gather`: all to all ranks at once (LASP-2). `ring`: from piece to
    piece, one after the other (LASP-1). `tree`: in as many rounds as the number of pieces has doublings, for the delta
    rule over many ranks."""
    timeout: Duration = Field(default=600.0, gt=0)
    """Seconds that a rank waits for another one before it stops with an error."""

    def shard(self, ranks: int) -> int | None:
        """The size of dp_shard among so many ranks; None where the other axes do not divide them."""
        others = self.dp_replicate * self.cp * self.tp * self.pp
        if isinstance(self.dp_shard, int):
            return self.dp_shard
        return None if ranks % others else ranks // others


class MegatronConfig(Config):
    """`[megatron]`: what `engine = "megatron"` alone has."""

    sequence_parallel: bool = True
    """Where `tp` is more than 1, divide what lies between layers over these ranks too, along the sequence (Korthikanti
    et al. 2022)."""
    distributed_optimizer: bool = True
    """Divide the optimizer's state over data- and context-parallel ranks."""


class DeepSpeedConfig(Config):
    """`[deepspeed]`: what the engine `deepspeed` divides, over all ranks."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """ZeRO: `1` divides the optimizer's states over the ranks, `2` gradients too, `3` parameters too; `0` nothing."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What lies in the CPU's memory and is stepped there: the optimizer's states (from stage 1 on), or parameters too
    (stage 3)."""

    @model_validator(mode="after")
    def _offload_fits(self) -> "DeepSpeedConfig":
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(f"offload: {self.offload!r} needs zero_stage {least} or more, not {self.zero_stage}")
        return self


class EvaluationConfig(Config):
    """`[evaluation]`: the loss on held-out documents. Without this table nothing is evaluated."""

    every: Integer = Field(gt=0)
    """Steps between two evaluations; there is always one after the last step."""
    sequences: Integer = Field(default=8, gt=0)
    """Held-out sequences, the same ones each time."""


class CheckpointConfig(Config):
    """`[checkpoint]`: what survives a crash."""

    every: Integer = Field(gt=0)
    """Steps between two checkpoints; there is always one after the last step, and one at SIGTERM."""
    keep: Integer = Field(default=2, gt=0)
    """The newest ones that are kept."""


class LoggingConfig(Config):
    """`[logging]`: what is written while the run goes on."""

    every: Integer = Field(default=1, gt=0)
    """Steps between two lines of metrics."""
    tensorboard: bool = True
    """Write TensorBoard event files beside the JSON lines."""
