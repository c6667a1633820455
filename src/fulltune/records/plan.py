"""Sizes in these records are in bytes, times in seconds."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from fulltune.records.base import Record


class Setting(Record):
    name: str
    value: Any
    reason: str
    """`from the recipe`, or the rule that chose the value."""
    is_automatic: bool


MemoryKind = Literal["weights", "gradients", "optimizer", "activations", "logits", "buffers"]
Phase = Literal["loading", "step", "evaluation", "saving", "resuming"]
"""Parts of an attempt, each with its own memory peak."""


class MemoryNeed(Record):
    """The device memory that a training process needs, without Python and libraries."""

    kinds: dict[MemoryKind, int]
    """Bytes in use at the peak of a step, by kind of content."""
    phases: dict[Phase, int]
    host: int = 0
    """Bytes that a process offloads to host memory."""

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def peak_phase(self) -> Phase:
        return max(self.phases, key=lambda phase: self.phases[phase])

    @property
    def largest(self) -> MemoryKind:
        return max(self.kinds, key=lambda kind: self.kinds[kind])


class DiskNeed(Record):
    checkpoint_bytes: int
    num_checkpoints: int
    model: int

    @property
    def total(self) -> int:
        return self.checkpoint_bytes * self.num_checkpoints + self.model


STARTING, PROBE, DRY_RUN = "starting", "linear probe", "checks and dry run"
BASELINES, TRAINED = "scoring the baselines", "scoring the trained model"


class TimeNeed(Record):
    """The duration of a run, forecast or measured in the dry run."""

    train_seconds: float
    eval_seconds: float
    save_seconds: float
    tokens: int
    tokens_per_second: float
    source: str
    answers_seconds: float = 0.0
    """Part of `eval_seconds` for generated answers."""
    stop_seconds: float = 0.0
    """Longest time from a stop signal to the saved checkpoint, or 0 if unknown."""
    overhead_seconds: dict[str, float] = Field(default_factory=dict)
    """Time of each phase outside training, such as `STARTING`, in order."""

    @property
    def total_seconds(self) -> float:
        """Training time, including evaluations and checkpoints."""
        return self.train_seconds + self.eval_seconds + self.save_seconds

    @property
    def whole_seconds(self) -> float:
        """Training time plus the known time before and after it."""
        return self.total_seconds + sum(self.overhead_seconds.values())


class GenericTexts(Record):
    """Numbers of generic texts read to measure and limit forgetting."""

    texts_per_evaluation: int = 0
    budget: float | None = None
    replay_rows: int = 0
    steer_steps: int = 0
    """Number of steps between two updates of the replay weight."""
    texts_read_once: int = 0
    """Number of texts read before step 1 and again after the last step."""
    scored_rows: int = 0
    """Number of eval rows that are scored again after the last step."""


class AnswersPlan(Record):
    """Answers to eval prompts that are generated at each evaluation, in the same batches each time."""

    rows: int
    batch_size: int
    max_new_tokens: int
    gather_once: bool = False
    """True if sharded weights are gathered once per evaluation instead of for each token."""
    seconds: float | None = None
    """Time of all evaluations' answers together, or None if the hardware's speed is unknown."""


class StreamPlan(Record):
    """How a streamed run uses disk and memory. A unit is a block, or another module with weights."""

    largest_unit: str
    largest_size: int  # in parameters
    num_units: int
    gradients: Literal["fp32", "bf16"]
    disk: str = ""
    """Folder that the recipe names for the state, or empty for the run folder."""
    disk_free_bytes: int | None = None  # where the state is
    limits: dict[str, str | None]
    cache_bytes: int = 0
    """Host memory that keeps weights from one step to the next."""
    rated_writes: int
    read_per_second: float
    written_per_second: float
    is_measured: bool
    state_bytes: int
    """Bytes of weights and optimizer state on the disk, with a spare place for each size of unit."""
    gradient_bytes: int
    step_seconds: dict[str, float] = Field(default_factory=dict)
    """Time of a step's parts, which overlap except for the optimizer; empty if unknown."""

    @property
    def unit_in_words(self) -> str:
        return f"the largest unit is {self.largest_unit}, {self.largest_size:,} parameters"


class MemorySettings(Record):
    micro_batch_size: int
    longest_tokens: int
    gradient_accumulation_steps: int = 1
    eval_batch_size: int = 1
    num_processes: int = 1
    num_machines: int = 1
    device: str = "cpu"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    fast_bf16: bool = True
    """False if the GPU only emulates bf16."""
    weights_dtype: Literal["fp32", "bf16"] = "fp32"
    optim: str = "adamw_torch_fused"
    bf16_rounding: Literal["stochastic", "kahan", "nearest"] | None = None
    activation_checkpointing: bool = False
    can_recompute: bool = True
    plain_logits: bool = True
    """False if the loss cannot be chunked, for example because logits are scaled after the head."""
    has_experts: bool = False
    torch_compile: bool = False
    chunked_loss: bool = False
    generic_first: bool = False
    num_saves: int | None = None
    """Number of checkpoints that the run writes, or None if there are many."""
    probe_bytes: int = 0
    """Memory needed to fit the linear probe, or 0 if there is none."""
    num_all_parameters: int | None = None
    """Number of parameters including the method's, or None if the method adds none."""
    num_trainable: int | None = None
    """Number of trained parameters, or None for all."""
    saves_all: bool = False
    """True if checkpoints hold the whole model although some parameters are frozen."""
    stream: StreamPlan | None = None

    def changed(self, **values: Any) -> Self:
        return self.model_copy(update=values)

    @property
    def processes_per_machine(self) -> int:
        return self.num_processes // self.num_machines


class Plan(MemorySettings):
    trial: str
    data_fingerprint: str = ""
    method: str
    model_name: str = ""
    seed: int
    learning_rate: float
    head_learning_rate: float | None = None
    """Learning rate of head and pooler, or None if it equals `learning_rate`."""
    head_init: Literal["probe", "random"] | None = None
    layerwise_lr_decay: float
    num_train_epochs: float
    total_steps: int
    warmup_steps: int
    lr_scheduler_type: str
    global_batch_size: int
    placement: Literal["single", "ddp", "fsdp2", "zero2", "zero3", "stream", "deepspeed"] = "single"
    """Placement over processes, or `deepspeed` for the user's own settings."""
    offload: str = "none"
    group_by_length: bool = True
    packing: bool = False
    """Whether the rows of a micro batch share blocks. Raw text is packed earlier, in the prepared rows."""
    loader_workers: int = 0
    eval_steps: int
    """Steps between evaluations, or 0 to evaluate only at the end."""
    eval_on_start: bool = True
    generic: GenericTexts = GenericTexts()
    answers: AnswersPlan | None = None
    save_steps: int
    logging_steps: int
    metric: str
    greater_is_better: bool
    num_parameters: int
    state: dict[MemoryKind, int]
    """Bytes in use between two steps, by kind of content."""
    rollbacks: tuple[int, ...] = ()
    """Steps that the run has returned to, oldest first, where 0 is the start."""
    memory_limit_bytes: int | None = None
    available_bytes: int | None = None
    memory: MemoryNeed | None = None
    sent_bytes_per_micro_batch: int = 0
    """Bytes that each process (and each machine as a whole) sends per micro batch."""
    sent_bytes_per_update: int = 0
    disk: DiskNeed
    time: TimeNeed | None = None
    busy: str = ""
    settings: tuple[Setting, ...]

    @property
    def num_trainable_parameters(self) -> int:
        return self.num_parameters if self.num_trainable is None else self.num_trainable

    @property
    def num_frozen_parameters(self) -> int:
        return (
            0 if self.num_trainable is None else (self.num_all_parameters or self.num_parameters) - self.num_trainable
        )

    @property
    def freeze(self) -> tuple[str, ...]:
        """Patterns of the parameters that full fine-tuning leaves unchanged."""
        return tuple(next((one.value for one in self.settings if one.name == "method.freeze"), ()))

    @property
    def sent_bytes(self) -> int:
        return self.gradient_accumulation_steps * self.sent_bytes_per_micro_batch + self.sent_bytes_per_update

    def state_folder(self, run_folder: Path) -> Path:
        """Return the folder of a streamed run's training state."""
        if not self.stream or not self.stream.disk:
            return run_folder / "state" / self.trial
        path = hashlib.sha256(os.fsencode(run_folder.resolve())).hexdigest()[:8]  # runs may have the same name
        return Path(self.stream.disk, f"{run_folder.name}-{path}", self.trial)

    @property
    def model_folder(self) -> str:
        """Folder of the finished model, relative to the run folder."""
        return f"models/{self.model_name or self.method}"

    @property
    def file(self) -> str:
        """Path of the plan's file, relative to the run folder."""
        return f"plan/{self.trial if self.model_name else self.method}.json"


# ---- what `fulltune plan` shows besides ---------------------------------------------------------------------------


class PlacementOption(Record):
    """One way to place weights, gradients and optimizer state on the devices."""

    name: str
    kinds: dict[MemoryKind, int]
    device_bytes: int
    host_bytes: int
    micro_batch_size: int
    activation_checkpointing: bool
    shortage: str | None
    """How much memory is missing, or None if the placement fits."""
    tokens_per_second: float | None
    bound_by: str
    settings: dict[str, Any]

    @property
    def fits(self) -> bool:
        return self.shortage is None


class Alternative(Record):
    """A change that frees memory or disk space when a run does not fit."""

    change: str
    frees_bytes: int
    enough: bool
    costs: str
    settings: dict[str, Any] = Field(default_factory=dict)
    hardware: str = ""
    """Value for `--for` if the change is to use other hardware."""


class Advice(Record):
    method: Literal["full fine-tuning", "LoRA", "adapters", "prompt tuning"]
    verdict: Literal["take", "try", "leave"]
    rule: str


class Survey(Record):
    """What `fulltune plan` shows in addition to the plan."""

    hardware: str
    assumptions: tuple[str, ...] = ()
    num_devices: int
    num_machines: int = 1
    num_parameters: int
    model_type: str
    train_rows: int
    eval_rows: int
    length_percentiles: dict[str, int]
    max_length: int
    fits: bool
    full_fits: bool = True
    placement: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    placements: tuple[PlacementOption, ...]
    disk_free_bytes: int | None = None
    host_free_bytes: int
    device_free_bytes: int
    price: float | None = None
    currency: str = ""
    ways_out: tuple[Alternative, ...] = ()
    advice: tuple[Advice, ...] = ()
    command: str = ""
    notes: tuple[str, ...] = ()
