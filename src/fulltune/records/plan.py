"""Plan of a trial, with reasons, memory, disk space and time. Sizes are in bytes, times in seconds."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field

from fulltune.records.base import Record


class Setting(Record):
    """A setting with its value and reason."""

    name: str
    """Dotted name, such as `train.global_batch_size`."""
    value: Any
    reason: str
    """`from the recipe`, or the rule that set the value."""
    is_automatic: bool
    """True if fulltune set the value."""


MemoryKind = Literal["weights", "gradients", "optimizer", "activations", "logits", "buffers"]
Phase = Literal["loading", "step", "evaluation", "saving", "resuming"]
"""Parts of an attempt with their own memory peaks."""


class MemoryNeed(Record):
    """Device memory of a training process, without its libraries."""

    kinds: dict[MemoryKind, int]
    """Bytes alive at the peak of a step."""
    phases: dict[Phase, int]
    """Peak memory of each phase."""
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
    """Disk space of a run at its fullest."""

    checkpoint_bytes: int
    num_checkpoints: int
    """Checkpoints on disk at a time."""
    model: int
    """Size of the finished model and the initial weights."""

    @property
    def total(self) -> int:
        return self.checkpoint_bytes * self.num_checkpoints + self.model


STARTING, PROBE, DRY_RUN = "starting", "linear probe", "checks and dry run"
BASELINES, TRAINED = "scoring the baselines", "scoring the trained model"


class TimeNeed(Record):
    """Duration of a run, computed before it starts or measured in its dry run."""

    train_seconds: float
    eval_seconds: float
    save_seconds: float
    tokens: int
    """Tokens of all steps with padding."""
    tokens_per_second: float
    source: str
    """`arithmetic`, or `dry-run step`."""
    stop_seconds: float = 0.0
    """Longest time from a stop signal to a saved checkpoint; 0 if unknown."""
    overhead_seconds: dict[str, float] = Field(default_factory=dict)
    """Time of other phases, keyed by the constants above, in order."""

    @property
    def total_seconds(self) -> float:
        """Training time, evaluations and checkpoints included."""
        return self.train_seconds + self.eval_seconds + self.save_seconds

    @property
    def whole_seconds(self) -> float:
        """Training time plus the known time around it."""
        return self.total_seconds + sum(self.overhead_seconds.values())


class GenericTexts(Record):
    """Generic texts that the run reads against forgetting; 0 for none."""

    texts_per_evaluation: int = 0
    budget: float | None = None
    """Most drift accepted, as a share, or None."""
    replay_rows: int = 0
    """Texts replayed per step."""
    steer_steps: int = 0
    """Steps between updates of the replay weight."""
    texts_read_once: int = 0
    """Texts read before step 1 and after the last step."""
    scored_rows: int = 0
    """Eval rows scored after the last step."""


class MemorySettings(Record):
    """Settings that change a plan's memory."""

    micro_batch_size: int
    longest_tokens: int
    """Tokens of the longest row, or of its longest choice."""
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
    """False if logits are scaled or capped after the head, or a user's loss needs all of them: the loss is then not
    chunked."""
    torch_compile: bool = False
    chunked_loss: bool = False
    generic_first: bool = False
    """Generic text is trained before a step's rows."""
    num_saves: int | None = None
    """Checkpoints that the run writes; None for many."""
    probe_bytes: int = 0
    """Memory of a linear probe, 0 without one."""
    num_all_parameters: int | None = None
    """Parameters of model and method, if the method adds some."""
    num_trainable: int | None = None
    """Trained parameters, or None for all."""

    def changed(self, **values: Any) -> Self:
        """Copy the settings with some values replaced."""
        return self.model_copy(update=values)

    @property
    def processes_per_machine(self) -> int:
        return self.num_processes // self.num_machines


class Plan(MemorySettings):
    """All numbers of a trial."""

    trial: str
    """Name such as `full-seed42`."""
    data_fingerprint: str = ""
    method: str
    model_name: str = ""
    """Folder in `models`, for one of several trials."""
    seed: int
    learning_rate: float
    head_learning_rate: float | None = None
    """Learning rate of head and pooler, if it differs."""
    head_init: Literal["probe", "random"] | None = None
    """Start of a new head."""
    layerwise_lr_decay: float
    num_train_epochs: float
    total_steps: int
    warmup_steps: int
    lr_scheduler_type: str
    global_batch_size: int
    placement: Literal["single", "ddp", "fsdp2", "zero2", "zero3", "deepspeed"] = "single"
    """Layout over processes; `deepspeed` is a user's file."""
    offload: str = "none"
    group_by_length: bool = True
    loader_workers: int = 0
    """Processes that read rows ahead."""
    eval_steps: int
    """Steps between evaluations; 0 for none before the end."""
    eval_on_start: bool = True
    generic: GenericTexts = GenericTexts()
    save_steps: int
    logging_steps: int
    metric: str
    greater_is_better: bool
    num_parameters: int
    state: dict[MemoryKind, int]
    """Memory between two steps."""
    rollbacks: tuple[int, ...] = ()
    """Steps returned to, oldest first; 0 is the start.

    Each changes the order of rows. Each but the first to a checkpoint halves the learning rate.
    """
    memory_limit_bytes: int | None = None
    available_bytes: int | None = None
    """Memory available to a process, if known."""
    memory: MemoryNeed | None = None
    sent_bytes_per_micro_batch: int = 0
    """Bytes that a process sends per micro batch, as many as its machine sends."""
    sent_bytes_per_update: int = 0
    """Further bytes that a process sends per optimizer step."""
    disk: DiskNeed | None = None
    time: TimeNeed | None = None
    busy: str = ""
    """Warning that other programs slowed the measurement of this machine."""
    settings: tuple[Setting, ...]

    @property
    def num_trainable_parameters(self) -> int:
        return self.num_parameters if self.num_trainable is None else self.num_trainable

    @property
    def num_frozen_parameters(self) -> int:
        """Frozen parameters; 0 for full fine-tuning."""
        return (
            0 if self.num_trainable is None else (self.num_all_parameters or self.num_parameters) - self.num_trainable
        )

    @property
    def sent_bytes(self) -> int:
        """Bytes that a process sends per optimizer step."""
        return self.gradient_accumulation_steps * self.sent_bytes_per_micro_batch + self.sent_bytes_per_update

    @property
    def model_folder(self) -> str:
        """Folder of the model, relative to the run folder."""
        return f"models/{self.model_name or self.method}"

    @property
    def file(self) -> str:
        """File of the plan, relative to the run folder."""
        return f"plan/{self.trial if self.model_name else self.method}.json"


# ---- what `fulltune plan` shows besides ---------------------------------------------------------------------------


class PlacementOption(Record):
    """One layout of weights, gradients and optimizer state."""

    name: str
    kinds: dict[MemoryKind, int]
    """Bytes on each device."""
    device_bytes: int
    host_bytes: int
    """Host memory per machine."""
    micro_batch_size: int
    activation_checkpointing: bool
    shortage: str | None
    """Missing memory, if the layout does not fit."""
    tokens_per_second: float | None
    """Speed over all devices, if known."""
    bound_by: str
    settings: dict[str, Any]
    """Recipe settings of this layout."""

    @property
    def fits(self) -> bool:
        return self.shortage is None


class WayOut(Record):
    """A change that frees memory or disk space."""

    change: str
    """The setting, or what to do."""
    frees_bytes: int
    where: Literal["device", "disk"]
    enough: bool
    """True if the change alone suffices."""
    costs: str
    settings: dict[str, Any] = Field(default_factory=dict)
    """Recipe settings of the change."""
    hardware: str = ""
    """Value for `--for`."""


class Advice(Record):
    """Published experience with a method for such a task."""

    method: Literal["full fine-tuning", "LoRA", "adapters", "prompt tuning"]
    verdict: Literal["take", "try", "leave"]
    rule: str


class Survey(Record):
    """What `fulltune plan` shows besides the plan."""

    hardware: str
    assumptions: tuple[str, ...] = ()
    """Values assumed about the hardware."""
    num_devices: int
    num_machines: int = 1
    num_parameters: int
    model_type: str
    train_rows: int
    eval_rows: int
    length_percentiles: dict[str, int]
    """Tokens per train row: keys `p50`, `p95`, `max`."""
    max_length: int
    fits: bool
    """True if some layout fits."""
    full_fits: bool = True
    """True if full fine-tuning fits."""
    placement: str = ""
    """Name of the planned layout."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings that the plan adds to the recipe."""
    placements: tuple[PlacementOption, ...]
    disk_free_bytes: int | None = None
    host_free_bytes: int
    """Free host memory per machine."""
    device_free_bytes: int
    """Memory available to a process."""
    price: float | None = None
    currency: str = ""
    ways_out: tuple[WayOut, ...] = ()
    advice: tuple[Advice, ...] = ()
    command: str = ""
    """Command that runs the plan."""
    comparison: str = ""
    """Command of a comparison that would settle the advice."""
    notes: tuple[str, ...] = ()
    """What is missing if nothing fits."""
