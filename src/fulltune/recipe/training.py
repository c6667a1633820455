from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fulltune.recipe.functions import FunctionName
from fulltune.recipe.model import Block, Duration, PlainSettings, raise_for_problems, validated_by
from fulltune.text import parse_bytes

Precision = Literal["auto", "bf16", "fp16", "fp32"]
Interval = Literal["epoch", "steps"]
Placement = Literal["auto", "single", "ddp", "fsdp2", "zero2", "zero3", "stream"]
OWN_OPTIMIZERS = ("adamw_8bit", "adamw_bf16")
"""Optimizers that fulltune implements itself. In transformers, `adamw_8bit` means `adamw_bnb_8bit`."""

SHARDABLE_OPTIMIZERS = (*OWN_OPTIMIZERS, "adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Optimizers that support tensors sharded by FSDP2."""

PER_TENSOR_OPTIMIZERS = (*SHARDABLE_OPTIMIZERS, "adafactor")
"""Optimizers that update each tensor from its own gradient and state."""

STREAMABLE_OPTIMIZERS = (*OWN_OPTIMIZERS, "adamw_torch_fused")
"""Optimizers that can update a slice of a tensor read from disk."""

ENGINE_SETTINGS = "train.extra.deepspeed"
ByteSize = Annotated[str, validated_by(parse_bytes)]


class StreamBlock(Block):
    """Memory and disk of `placement: stream`."""

    device_memory: ByteSize | None = None
    """Maximum GPU memory, such as `6GiB`. Default: what is free, or `memory_limit`."""
    host_memory: ByteSize | None = None
    """Maximum host memory of the training process, such as `16GiB`, of which Python and libraries take about 0.7 GiB.
    What is left beside the buffers caches weights. Default: without a GPU what is free, or `memory_limit`; with one
    what the buffers need."""
    disk: str | None = Field(default=None, min_length=1)
    """Folder for the training state, best on a fast local disk. Default: the run folder."""
    gradients: Literal["auto", "bf16", "fp32"] = "auto"
    """Data type in which gradients are summed and written to the disk until their global norm is known. `auto` is the
    type of the weights. fp32 writes twice as many bytes as bf16."""
    rated_writes: ByteSize = "600TB"
    """Writes for which the drive is rated (TBW), which the plan compares with the run's writes. 600 TB is usual for a
    consumer drive of 1 TB."""


class TrainBlock(Block):
    """Settings of the training loop, named as in `transformers.TrainingArguments`."""

    num_train_epochs: float | None = Field(default=None, gt=0)
    """Number of passes over the train rows. Default: depends on task and number of rows."""
    max_steps: int | None = Field(default=None, ge=1)
    """Number of optimizer steps, instead of `num_train_epochs`."""
    global_batch_size: int | None = Field(default=None, ge=1)
    """Number of rows per optimizer step over all devices, which determines the gradient accumulation. Default: 32, or
    16 for language models, and fewer for small data sets."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Number of rows per device in one pass. It must divide the global batch size. Lower values save memory with the
    same result. Default: the fastest that fits into memory. If training runs out of memory, the micro batch size is
    halved, even if the recipe sets it."""
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0 to its peak. Default: depends on the task."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Number of warm-up steps, instead of `warmup_ratio`."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "cosine_with_min_lr"
    ] = "linear"
    """Schedule by which the learning rate falls after the warm-up."""
    lr_scheduler_kwargs: PlainSettings = Field(default_factory=dict)
    """Further arguments of the schedule, such as `{min_lr_rate: 0.1}`."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of AdamW, which is not applied to norms and biases."""
    optim: str | None = None
    """Name of the optimizer: fulltune's own `adamw_8bit` (2.1 instead of 8 bytes of state per parameter) or
    `adamw_bf16` for CPU and CUDA, or any of transformers, such as `adafactor`. Default: `adamw_torch_fused` for fp32
    weights, `adamw_bf16` for bf16 weights, `adamw_8bit` if nothing else fits into memory."""
    bf16_rounding: Literal["stochastic", "kahan", "nearest"] | None = None
    """How bf16 weights are rounded if an update is smaller than their precision. `stochastic` (the default) rounds up
    or down at random, without bias on average. `kahan` stores the remainder in 2 more bytes per parameter. `nearest`
    loses most of these updates at usual learning rates."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of AdamW's running mean of gradients."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay rate of AdamW's running mean of squared gradients."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Small number that prevents AdamW from dividing by zero."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Maximum global norm of the gradients. Larger gradients are scaled down. 0 turns clipping off."""
    skip_suspect_steps: bool = True
    """Skip the update of a step whose loss and gradient norm are both outliers among the last 64 steps
    (docs/concepts/guards.md). Non-finite steps are always skipped."""
    max_rollbacks: int = Field(default=3, ge=0)
    """How often a run may return to its last good checkpoint after it diverged or skipped too many steps. The run
    continues with another order of rows, and from the second rollback on at half the learning rate. With 0, the run
    stops."""
    hang_timeout: Duration | None = "30m"
    """Time without a heartbeat after which a training process is stopped. The run then resumes once from its last
    checkpoint. `null` means no limit."""
    notice: Duration | None = None
    """Time between SIGTERM and the shutdown of the machine, such as `30s` on a spot instance. fulltune warns if
    finishing a step and saving take longer."""
    loss: FunctionName | None = None
    """Your own training loss, as `module:function`. `function(outputs, labels, num_items_in_batch)` returns a scalar,
    as `compute_loss_func` of transformers' Trainer does: the sum over rows (or trained tokens), divided by
    `num_items_in_batch`."""
    matryoshka: tuple[Annotated[int, Field(ge=2)], ...] = ()
    """Sizes, such as `[128, 64]`, to which vectors can be cut later (embedding). Losses of all sizes are averaged."""
    label_smoothing_factor: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target's probability that is spread over the other classes or tokens."""
    class_weights: str | dict[str | int, Any] | tuple[Any, ...] | None = None
    """Weight of each class in the training loss (classification): `balanced` (all classes get the same total weight), a
    mapping such as `{rare: 5, usual: 1}`, or a list in the order of the labels."""
    sampling: Literal["uniform", "balanced"] = "uniform"
    """Rows of an epoch: each row once, or as many rows, equally many of each class (`balanced`, single label). Rows of
    rare classes then repeat, and rows of a class repeat only after all of its rows have been used."""
    seed: int = Field(default=42, ge=0)
    """Random seed for dropout, the order of rows, and a randomly initialised head."""
    precision: Precision = "auto"
    """Data type of the computations. On a GPU, `auto` means bf16 from compute capability 8.0 (Ampere), fp16 with loss
    scaling from 7.0 (Volta, Turing), otherwise fp32. On a CPU, it means the faster of bf16 and fp32. With several
    GPUs, the oldest GPU decides. fp16 needs a GPU."""
    activation_checkpointing: bool | None = None
    """Recompute activations in the backward pass, which needs far less memory but about a third more compute. Default:
    on if the run would not fit otherwise, or if larger micro batches make it faster."""
    chunked_loss: bool | None = None
    """Compute a language model's logits and loss for a few tokens at a time. Default: on if a check shows that the
    model's head allows chunks."""
    torch_compile: bool | None = None
    """Compile the model's repeated blocks with `torch.compile`. Compiling takes a minute or more, which pays off in
    long runs. Default: off, but `fulltune plan --measure` tries it. Compiled models have not been tested on a GPU."""
    use_liger_kernel: bool = False
    """Save memory with Liger's Triton kernels for norms, feed-forward layers and rotary positions (`pip install
    'fulltune[liger]'`). The kernels need a GPU and have not been tested with fulltune."""
    memory_limit: ByteSize | None = None
    """Maximum memory per training process, such as `6GiB`: GPU memory, or host memory if there is no GPU (about 0.7 GiB
    of it for Python and libraries). The plan stays below the limit, and exceeding it counts as running out of
    memory. Without a GPU, the limit works only on Linux and excludes memory-mapped files."""
    group_by_length: bool | None = None
    """Put rows of similar length into the same batch to save padding. Default: on, unless the target explains a quarter
    of the length's variance, because batches would then have similar targets."""
    eval_strategy: Interval = "epoch"
    """When to evaluate and save a checkpoint: after each epoch, or every `eval_steps` steps."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Number of steps between two evaluations, for `eval_strategy: steps`."""
    eval_on_start: bool = True
    """Also evaluate before step 1. A run that stays worse than this evaluation is stopped unless its train loss falls
    (docs/concepts/guards.md)."""
    save_steps: int | None = Field(default=None, ge=1)
    """Number of steps between additional checkpoints, so that an interruption loses less work."""
    save_total_limit: int = Field(default=2, ge=1)
    """Number of checkpoints to keep in addition to the best one."""
    load_best_model_at_end: bool = True
    """Keep the weights of the best checkpoint instead of the last. Classifiers and taggers whose learning rate fell to
    0 keep the last checkpoint if its accuracy or F1 is within two standard errors of the best
    (docs/concepts/statistics.md)."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Number of evaluations without improvement after which training stops. Default: off. Early stopping usually costs
    quality, because the learning rate has not yet fallen to 0."""
    early_stopping_threshold: float = Field(default=0.0, ge=0)
    """Smallest change of the eval metric that counts as an improvement."""
    logging_steps: int | None = Field(default=None, ge=1)
    """Number of steps between two lines of `metrics.jsonl`. Default: about 200 lines per run."""
    report_to: Annotated[
        tuple[str, ...], BeforeValidator(lambda names: (names,) if isinstance(names, str) else names)
    ] = ()
    """Experiment trackers of transformers, such as `tensorboard`, `wandb`, `mlflow` or `trackio`. TensorBoard writes to
    `RUN/tensorboard`, or to `TENSORBOARD_LOGGING_DIR`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. `auto` means a GPU if there is one, otherwise the CPU."""
    num_processes: int = Field(default=1, ge=1)
    """Total number of training processes on all machines: one per GPU, or several on a CPU (gloo)."""
    num_machines: int = Field(default=1, ge=1)
    """Number of machines. All machines run the same number of processes and need a shared folder
    (docs/guides/scale.md)."""
    placement: Placement = "auto"
    """How weights, gradients and optimizer state are laid out. `single` is one process, `ddp` replicates everything,
    `fsdp2` (PyTorch) shards everything, `zero2` (DeepSpeed) shards gradients and optimizer state, and `zero3` also
    weights. `stream` is one process that reads one block of the model after the other from disk, where the training
    state lies. `auto` means `single` for one process (`stream` if nothing else fits), otherwise `ddp` if it fits, else
    `fsdp2`. A run may resume with another number of processes and switch between `single`, `ddp` and `fsdp2`; the
    others allow neither (docs/guides/scale.md)."""
    stream: StreamBlock | None = None
    """Memory and disk of `placement: stream`."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What to keep in host memory: `optimizer` state (with zero2 or zero3), or `all` (with zero3: weights too).
    Offloading has no effect on a CPU."""
    oversubscribe: bool = False
    """Allow more processes than CPU cores, to try out a placement. Training is then slow."""
    extra: PlainSettings = Field(default_factory=dict)
    """Any other field of `transformers.TrainingArguments`, except those that fulltune sets itself. `deepspeed` is a
    JSON file, relative to the recipe's folder, or its content."""

    @property
    def engine_settings(self) -> str | PlainSettings | None:
        return self.extra.get("deepspeed")

    def with_engine_settings(self, settings: str | PlainSettings | None) -> TrainBlock:
        """Return a copy of the block with these DeepSpeed settings (a JSON file or its content), or with none if
        `settings` is None."""
        others = {name: value for name, value in self.extra.items() if name != "deepspeed"}
        return self.model_copy(update={"extra": others if settings is None else {**others, "deepspeed": settings}})

    @property
    def placed_as(self) -> Placement | Literal["deepspeed"]:
        """The placement as shown in a plan: `deepspeed` for the recipe's own DeepSpeed settings."""
        return self.placement if self.engine_settings is None else "deepspeed"

    @property
    def zero_enabled_by(self) -> str | None:
        """The setting that turns DeepSpeed on, such as `train.placement: zero3`, or None if DeepSpeed is off."""
        if self.engine_settings is not None:
            return ENGINE_SETTINGS
        return f"train.placement: {self.placement}" if self.placement in ("zero2", "zero3") else None

    @property
    def processes_per_machine(self) -> int:
        return self.num_processes // self.num_machines

    @property
    def sharded_by(self) -> str | None:
        """The setting that shards the model, such as `train.placement: fsdp2`, or None if the model is not sharded."""
        return self.zero_enabled_by or (f"train.placement: {self.placement}" if self.placement == "fsdp2" else None)

    @model_validator(mode="after")
    def _settings_must_agree(self) -> TrainBlock:
        """Raise `ValueError` if settings of this block contradict each other."""
        factors = {"micro_batch_size": self.micro_batch_size or 1, "num_processes": self.num_processes}
        factor_words = " x ".join(f"{name} {value}" for name, value in factors.items() if value > 1)
        has_minimum = bool({"min_lr", "min_lr_rate"} & set(self.lr_scheduler_kwargs))
        pairs = {
            "max_steps and num_train_epochs are both set; remove one": (
                self.max_steps is not None and self.num_train_epochs is not None
            ),
            "warmup_ratio and warmup_steps are both set; remove one": (
                self.warmup_ratio is not None and self.warmup_steps is not None
            ),
            "eval_strategy is 'steps' but eval_steps is missing; add for example 'eval_steps: 100'": (
                self.eval_strategy == "steps" and self.eval_steps is None
            ),
            "eval_steps is set but eval_strategy is 'epoch'; set 'eval_strategy: steps'": (
                self.eval_strategy == "epoch" and self.eval_steps is not None
            ),
            "lr_scheduler_kwargs: cosine_with_min_lr needs a minimum; add for example {min_lr_rate: 0.1}": (
                self.lr_scheduler_type == "cosine_with_min_lr" and not has_minimum
            ),
            f"global_batch_size: {self.global_batch_size} is not a multiple of {factor_words}": (
                self.global_batch_size and self.global_batch_size % math.prod(factors.values())
            ),
            "use_liger_kernel and torch_compile fuse the same operations; use only one of the two": (
                self.use_liger_kernel and self.torch_compile
            ),
        }
        raise_for_problems(pairs | _placement_problems(self) | _class_weight_problems(self.class_weights))
        return self


def _placement_problems(train: TrainBlock) -> dict[str, object]:
    """Map error messages about `placement`, `offload`, `num_processes` and `num_machines` to whether they apply."""
    placement, offload, processes = train.placement, train.offload, train.num_processes
    has_own_file = train.engine_settings is not None
    least = -(-processes // train.num_machines) * train.num_machines
    instead = "zero2 or zero3 with an offload, or stream" if placement == "fsdp2" else "single"
    both = "{} and train.extra.deepspeed both set the layout; remove one of them"
    fits = ("zero3",) if offload == "all" else ("zero2", "zero3")
    return {
        f"num_processes: expected a multiple of num_machines ({train.num_machines}), such as {least}, found "
        f"{processes}": processes % train.num_machines,
        f"placement: {placement} runs one process, but num_processes is {processes}; set 1, or another placement": (
            placement in ("single", "stream") and processes > 1
        ),
        f"stream: has no effect with placement: {placement}; set placement: stream, or remove it": (
            train.stream is not None and placement not in ("auto", "stream")
        ),
        f"placement: {placement} needs num_processes: 2 or more; with one process use {instead}": (
            placement in ("ddp", "fsdp2") and processes == 1
        ),
        f"optim: '{train.optim}' needs whole tensors, but placement: fsdp2 shards them; expected one of "
        f"{', '.join(SHARDABLE_OPTIMIZERS)}": placement == "fsdp2" and train.optim not in (None, *SHARDABLE_OPTIMIZERS),
        both.format("placement"): has_own_file and placement != "auto",
        both.format("offload"): has_own_file and offload != "none",
        f"offload: '{offload}' needs placement: {' or '.join(fits)}, found {placement}": (
            offload != "none" and not has_own_file and placement not in fits
        ),
    }


def _class_weight_problems(value: str | dict[str | int, object] | tuple[object, ...] | None) -> dict[str, object]:
    """Return {error message about class weights: whether it applies}."""
    if value is None or isinstance(value, str):
        expected = "expected balanced, or a weight for each class, such as {rare: 5, usual: 1}"
        return {f"class_weights: {expected}, found {value!r}": value not in (None, "balanced")}
    weights = list(value.values()) if isinstance(value, dict) else list(value)
    numbers = [weight for weight in weights if isinstance(weight, (int, float)) and not isinstance(weight, bool)]
    are_usable = all(math.isfinite(number) and number >= 0 for number in numbers) and any(numbers)
    are_good = len(numbers) == len(weights) and are_usable
    return {f"class_weights: expected numbers of 0 or more, not all 0, found {weights}": not are_good}
