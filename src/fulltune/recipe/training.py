"""The recipe's block `train`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fulltune.recipe.model import Block, Duration, read_by, refuse
from fulltune.text import parse_bytes

Precision = Literal["auto", "bf16", "fp16", "fp32"]
Interval = Literal["epoch", "steps"]
Placement = Literal["auto", "single", "ddp", "fsdp2", "zero2", "zero3"]
OWN_OPTIMIZERS = ("adamw_8bit", "adamw_bf16")
"""fulltune's own; transformers knows the first name too, as another one of `adamw_bnb_8bit`."""

SHARED_OUT = (*OWN_OPTIMIZERS, "adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Optimizers that update parts of tensors as they would the whole ones: for FSDP2."""

PER_TENSOR = (*SHARED_OUT, "adafactor")
"""Optimizers that update a tensor from its own gradient and state alone."""

ENGINE_SETTINGS = "train.extra.deepspeed"
"""Settings of an engine, DeepSpeed's own, or the file that has them."""


class TrainBlock(Block):
    """The training loop, by the names of `transformers.TrainingArguments`."""

    num_train_epochs: float | None = Field(default=None, gt=0)
    """Passes over the train rows. Left out, chosen by task and number of rows."""
    max_steps: int | None = Field(default=None, ge=1)
    """Length of the run in optimizer steps, instead of `num_train_epochs`: give one of the two."""
    global_batch_size: int | None = Field(default=None, ge=1)
    """Examples per optimizer step over all devices. Accumulation follows from it."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Examples per device and forward pass; divides the global batch. Smaller needs less memory, same result: when
    memory runs out it is halved and the global batch is kept, also where it is given here."""
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0 to its peak."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """The same as a number of steps; give one of the two."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "cosine_with_min_lr"
    ] = "linear"
    """How the learning rate falls after the warm-up."""
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the schedule, for example `{min_lr_rate: 0.1}`."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's weight decay; norms and biases are left out."""
    optim: str | None = None
    """The optimizer. `adamw_8bit` keeps AdamW's moments in 8 bits (2.1 bytes a parameter instead of 8), `adamw_bf16`
    in bf16; both are fulltune's own and run on CPU and CUDA. Else any name that transformers knows, such as
    `adamw_torch_fused`, `adafactor` or `adamw_bnb_8bit`. Left out: `adamw_torch_fused` for fp32 weights, `adamw_bf16`
    for bf16 weights, `adamw_8bit` where nothing else fits, be it by the plan or because memory ran out. One that is
    given here is kept."""
    bf16_rounding: Literal["stochastic", "kahan", "nearest"] | None = None
    """With bf16 weights (`model.weights_dtype`): how an update smaller than their spacing arrives. stochastic (the
    default): rounded up or down at random, right on average; kahan: what was lost is kept in 2 more bytes a parameter;
    nearest: it is lost, and at usual learning rates most are."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's running mean of gradients."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of AdamW's running mean of squared gradients."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Keeps AdamW's division away from zero."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this global norm; 0 switches clipping off."""
    skip_suspect_steps: bool = True
    """Leave out the update of a step whose gradient norm and loss are both far above those of the last 64 steps, such
    as one with corrupted rows (docs/guards.md). A loss or norm that is not finite is always left out."""
    max_rollbacks: int = Field(default=3, ge=0)
    """How often the run goes back to its last healthy checkpoint when the loss rose and stays, or too many steps were
    skipped; it then goes on with the rows in another order, from the second time on at half the rate. 0: it stops."""
    hang_timeout: Duration | None = "30m"
    """A training process that has begun a step, an eval batch or a checkpoint and gives no sign of life for so long is
    ended with its group; the run goes on once from its last checkpoint. null: never."""
    notice: Duration | None = None
    """The time between SIGTERM and the end of the machine, such as `30s`. A run that is told to stop finishes its step,
    and its evaluation where it has one, and saves; with a notice it says before step 1 when that will take longer."""
    label_smoothing_factor: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target's probability spread over the other classes or tokens."""
    class_weights: str | dict[str | int, Any] | tuple[Any, ...] | None = None
    """How much each class counts in the training loss (classification): `balanced`, so that all classes count alike
    in total, or the weight of each, such as `{rare: 5, usual: 1}`, or a list in the order of the labels."""
    seed: int = Field(default=42, ge=0)
    """Seed of a head that starts at random, of dropout and of the order of the rows."""
    precision: Precision = "auto"
    """Type of the computations. auto: on a GPU bf16 from compute capability 8.0 on (Ampere), fp16 with a scaled loss
    from 7.0 on (Volta, Turing), else fp32; of several GPUs the oldest decides. On a CPU bf16 where it is faster, else
    fp32. fp16 needs a GPU."""
    activation_checkpointing: bool | None = None
    """Recompute activations in the backward pass: about a third more operations, far less memory. Left out: on
    where the run would not fit without, be it by the plan or because memory ran out, or where the larger micro batch
    that it makes room for is faster. false keeps it off."""
    chunked_loss: bool | None = None
    """Compute a language model's logits and loss in pieces, so that they never exist as a whole. Left out: on where the
    model's head allows it, which is checked before step 1. false keeps it off."""
    torch_compile: bool | None = None
    """Run the model's repeated blocks compiled while training (`torch.compile`). Each kind of block is compiled before
    step 1, which takes a minute or more and pays in long runs. What stands around the blocks stays as it is: chunked
    loss, prompts and adapters work with it. Left out: off, and tried by `fulltune plan --measure`. Never run on a
    GPU."""
    use_liger_kernel: bool = False
    """Liger's Triton kernels for norms, feed-forward parts and rotary positions (`pip install 'fulltune[liger]'`):
    fewer activations and launches. The loss stays fulltune's own. Needs a GPU; never run on one here."""
    memory_limit: Annotated[str, read_by(parse_bytes)] | None = None
    """Most memory that each training process may take, such as `6GiB`: of the GPU, or without one of the host, where
    Python and its libraries are part of it (about 0.7 GiB). The plan keeps to it and the process is held to it: what
    goes beyond is treated as memory that ran out. Without a GPU that needs Linux; mapped files do not count."""
    group_by_length: bool | None = None
    """Rows of similar length share a global batch: far less padding. Left out: on, unless the target goes with the
    length (a quarter of its variance or more), for then batches would be one-sided and the result worse."""
    eval_strategy: Interval = "epoch"
    """When the eval rows are scored and a checkpoint is saved: after each epoch or every `eval_steps`."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Steps between two evaluations, with `eval_strategy: steps`."""
    eval_on_start: bool = True
    """Score the eval rows before step 1 as well: where the curves begin, and what later evaluations are compared with.
    A run that makes the model worse than it was, and whose train loss has not fallen, ends (docs/guards.md)."""
    save_steps: int | None = Field(default=None, ge=1)
    """Further checkpoints every so many steps, so that an interrupted run loses less."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints kept besides the best one."""
    load_best_model_at_end: bool = True
    """Keep the weights with the best eval metric, not the last ones. After a whole run of a classifier or tagger whose
    rate falls to 0 the last ones are kept all the same where accuracy or F1 is within two standard errors of the best:
    few eval rows cannot tell them apart (docs/quality.md)."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without a better eval metric. The rate has not fallen to 0 then, which costs
    quality, and few eval rows call a stop by chance: it is for saving time."""
    early_stopping_threshold: float = Field(default=0.0, ge=0)
    """How much better counts as better."""
    logging_steps: int | None = Field(default=None, ge=1)
    """Steps between two lines of `metrics.jsonl`. Left out: about 200 lines over the run."""
    report_to: Annotated[tuple[str, ...], BeforeValidator(lambda one: (one,) if isinstance(one, str) else one)] = ()
    """Trackers that transformers knows: `tensorboard`, `wandb`, `mlflow`, `trackio` ... TensorBoard's files lie in
    `RUN/tensorboard`, unless the environment variable `TENSORBOARD_LOGGING_DIR` names another folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. auto: CUDA when there is a GPU, else CPU."""
    num_processes: int = Field(default=1, ge=1)
    """Processes that share each global batch, over all machines: one per GPU, or several on CPU (gloo)."""
    num_machines: int = Field(default=1, ge=1)
    """Machines that the processes are spread over evenly, with a folder that all of them see (docs/scale.md)."""
    placement: Placement = "auto"
    """Where weights, gradients and optimizer state lie. single: in one process; ddp: all of it in each; fsdp2: weights,
    gradients and state are shared out (PyTorch's FSDP2); zero2: gradients and state, zero3: weights too (DeepSpeed).
    auto: single for one process, ddp for several where it fits, else fsdp2 (docs/scale.md). A run goes on from its
    checkpoints with another of single, ddp and fsdp2 and another number of processes; with zero2 and zero3 as it was
    begun."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What is kept in the host's memory: none; optimizer (zero2, zero3: gradients and state); or all (zero3: the
    weights too). What is offloaded to the host of a CPU stays where it was."""
    oversubscribe: bool = False
    """Allow more processes than CPU cores, each with one thread: to try a placement, never to be fast."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Any other field of `transformers.TrainingArguments`; fields that fulltune sets itself are refused. `deepspeed` is
    a JSON file, named from the recipe's folder, or the settings themselves."""

    @property
    def engine_settings(self) -> Any:
        """DeepSpeed's settings, or the file that has them, where the recipe gives them itself."""
        return self.extra.get("deepspeed")

    def with_engine_settings(self, settings: Any) -> TrainBlock:
        """The block with other settings of an engine; without one for None."""
        others = {name: value for name, value in self.extra.items() if name != "deepspeed"}
        return self.model_copy(update={"extra": others if settings is None else {**others, "deepspeed": settings}})

    @property
    def placed_as(self) -> Placement | Literal["deepspeed"]:
        """Where things lie, as a plan says it."""
        return self.placement if self.engine_settings is None else "deepspeed"

    @property
    def engine_by(self) -> str | None:
        """The setting that has an engine (DeepSpeed's) hold the model, such as `train.placement: zero3`; None: none."""
        if self.engine_settings is not None:
            return ENGINE_SETTINGS
        return f"train.placement: {self.placement}" if self.placement in ("zero2", "zero3") else None

    @property
    def processes_per_machine(self) -> int:
        """Each has as many."""
        return self.num_processes // self.num_machines

    @property
    def shared_by(self) -> str | None:
        """The setting that has processes share out what they hold; None: each holds everything."""
        return self.engine_by or (f"train.placement: {self.placement}" if self.placement == "fsdp2" else None)

    @model_validator(mode="after")
    def _pairs_must_agree(self) -> TrainBlock:
        factors = {"micro_batch_size": self.micro_batch_size or 1, "num_processes": self.num_processes}
        shared_by = " x ".join(f"{name} {value}" for name, value in factors.items() if value > 1)
        has_floor = bool({"min_lr", "min_lr_rate"} & set(self.lr_scheduler_kwargs))
        pairs = {
            "max_steps and num_train_epochs are both given; remove one": (
                self.max_steps is not None and self.num_train_epochs is not None
            ),
            "warmup_ratio and warmup_steps are both given; remove one": (
                self.warmup_ratio is not None and self.warmup_steps is not None
            ),
            "eval_strategy is 'steps' but eval_steps is missing; add for example 'eval_steps: 100'": (
                self.eval_strategy == "steps" and self.eval_steps is None
            ),
            "eval_steps is given but eval_strategy is 'epoch'; set 'eval_strategy: steps'": (
                self.eval_strategy == "epoch" and self.eval_steps is not None
            ),
            "lr_scheduler_kwargs: cosine_with_min_lr needs a floor; add for example {min_lr_rate: 0.1}": (
                self.lr_scheduler_type == "cosine_with_min_lr" and not has_floor
            ),
            f"global_batch_size: {self.global_batch_size} is not a multiple of {shared_by}": (
                self.global_batch_size and self.global_batch_size % math.prod(factors.values())
            ),
            "use_liger_kernel and torch_compile both fuse the same; give one of them": (
                self.use_liger_kernel and self.torch_compile
            ),
        }
        refuse(pairs | _wrong_placement(self) | _wrong_weights(self.class_weights))
        return self


def _wrong_placement(train: TrainBlock) -> dict[str, Any]:
    """What `placement`, `offload`, `num_processes` and `num_machines` say against each other."""
    place, offload, processes = train.placement, train.offload, train.num_processes
    has_own_file = train.engine_settings is not None
    least = -(-processes // train.num_machines) * train.num_machines
    instead = "zero2 or zero3 with an offload" if place == "fsdp2" else "single"
    both = "{} and extra.deepspeed both say where things lie; remove one of them"
    fits = ("zero3",) if offload == "all" else ("zero2", "zero3")
    return {
        f"num_processes: {processes} is the total over all machines, expected a multiple of num_machines "
        f"({train.num_machines}), such as {least}": processes % train.num_machines,
        f"placement: single, but num_processes is {processes}; set 1, or another placement": (
            place == "single" and processes > 1
        ),
        f"placement: {place} needs several processes, num_processes: 2 or more; with one process take {instead}": (
            place in ("ddp", "fsdp2") and processes == 1
        ),
        f"optim: '{train.optim}' needs whole tensors, which placement: fsdp2 shares out; able are "
        f"{', '.join(SHARED_OUT)}": place == "fsdp2" and train.optim not in (None, *SHARED_OUT),
        both.format("placement"): has_own_file and place != "auto",
        both.format("offload"): has_own_file and offload != "none",
        f"offload: '{offload}' needs placement: {' or '.join(fits)}, found {place}": (
            offload != "none" and not has_own_file and place not in fits
        ),
    }


def _wrong_weights(given: str | dict[str | int, Any] | tuple[Any, ...] | None) -> dict[str, bool]:
    if given is None or isinstance(given, str):
        expected = "expected balanced, or a weight for each class, {rare: 5, usual: 1}"
        return {f"class_weights: {expected}, found {given!r}": given not in (None, "balanced")}
    weights = list(given.values()) if isinstance(given, dict) else list(given)
    numbers = [one for one in weights if isinstance(one, (int, float)) and not isinstance(one, bool)]
    are_good = len(numbers) == len(weights) and all(math.isfinite(one) and one >= 0 for one in numbers) and any(numbers)
    return {f"class_weights: expected numbers of 0 or more, not all 0, found {weights}": not are_good}
