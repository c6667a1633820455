"""The plan of a trial: every number with its reason, and its memory, disk space and time.

Sizes are in bytes, times in seconds.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field

from fulltune.records.base import Record


class Setting(Record):
    """One setting of the run, and the reason for its value."""

    name: str
    """Dotted name as in the recipe, for example `train.global_batch_size`."""
    value: Any
    reason: str
    """`from the recipe`, or the rule that set the value."""
    is_automatic: bool
    """True if fulltune set the value, False if the recipe did."""


MemoryKind = Literal["weights", "gradients", "optimizer", "activations", "logits", "buffers"]
Phase = Literal["loading", "step", "evaluation", "saving", "resuming"]
"""Parts of an attempt, each with its own memory peak."""


class MemoryNeed(Record):
    """Device memory of one training process, without the libraries' own."""

    kinds: dict[MemoryKind, int]
    """Bytes alive at the peak of a step."""
    phases: dict[Phase, int]
    """Peak of each phase; `step` is the sum of `kinds`."""
    host: int = 0
    """Bytes that one process offloads to host memory."""

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

    one_checkpoint: int
    num_checkpoints: int
    """Checkpoints on disk at a time, the one being written included."""
    model: int
    """Finished model, and the initial weights while training runs."""

    @property
    def total(self) -> int:
        return self.one_checkpoint * self.num_checkpoints + self.model


STARTING, PROBE, DRY_RUN = "starting", "linear probe", "checks and dry run"
BASELINES, TRAINED = "scoring the baselines", "scoring the trained model"


class TimeNeed(Record):
    """Duration of a run: computed before it starts, measured after its dry-run step."""

    train_seconds: float
    eval_seconds: float
    save_seconds: float
    tokens: int
    """Tokens of all steps, padding included."""
    tokens_per_second: float
    """Training speed over all processes."""
    source: str
    """`arithmetic`, or `dry-run step`."""
    stop_seconds: float = 0.0
    """Longest time from a stop signal to a saved checkpoint; 0 if not measured."""
    around: dict[str, float] = Field(default_factory=dict)
    """Time before and after training, in order: `STARTING`, `PROBE`, `DRY_RUN`, `BASELINES`, `TRAINED`."""

    @property
    def total_seconds(self) -> float:
        """Training time, evaluations and checkpoints included."""
        return self.train_seconds + self.eval_seconds + self.save_seconds

    @property
    def whole_seconds(self) -> float:
        """Training time plus all known time around it."""
        return self.total_seconds + sum(self.around.values())


class GenericTexts(Record):
    """Generic texts that the run reads to measure and limit forgetting; 0 where none are read."""

    texts_per_evaluation: int = 0
    """Texts read at each evaluation."""
    budget: float | None = None
    """Most drift accepted, as a share; None for no limit."""
    replay_rows: int = 0
    """Texts replayed in each step."""
    steer_steps: int = 0
    """Steps between two measurements that set the replay weight."""
    texts_read_once: int = 0
    """Texts read before step 1, and after the last step to choose the weights."""
    scored_rows: int = 0
    """Eval rows scored to choose the weights."""


class MemorySettings(Record):
    """Settings of a plan that change its memory."""

    micro_batch_size: int
    longest_tokens: int
    """Tokens of the longest row, or of its longest choice."""
    gradient_accumulation_steps: int = 1
    eval_batch_size: int = 1
    num_processes: int = 1
    """Processes over all machines."""
    num_machines: int = 1
    """Machines, each with the same number of processes."""
    device: str = "cpu"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    fast_bf16: bool = True
    """False if the GPU only emulates bf16."""
    weights_dtype: Literal["fp32", "bf16"] = "fp32"
    optim: str = "adamw_torch_fused"
    bf16_rounding: Literal["stochastic", "kahan", "nearest"] | None = None
    activation_checkpointing: bool = False
    can_recompute: bool = True
    """The model supports activation checkpointing."""
    plain_logits: bool = True
    """True if the loss may be chunked: nothing scales or caps the logits after the head, and no user loss needs all of
    them."""
    torch_compile: bool = False
    chunked_loss: bool = False
    generic_first: bool = False
    """Generic text is trained on before a step's rows, so its gradients are already allocated."""
    num_saves: int | None = None
    """Checkpoints that the run writes; None for many."""
    probe_bytes: int = 0
    """Memory of a linear probe beside the model's weights; 0 if none is fitted."""
    num_all_parameters: int | None = None
    """Parameters with those that the method adds; None if it adds none."""
    num_trainable: int | None = None
    """Parameters that are trained; None for all."""

    def changed(self, **values: Any) -> Self:
        """Copy the settings with some values replaced."""
        return self.model_copy(update=values)

    @property
    def processes_per_machine(self) -> int:
        return self.num_processes // self.num_machines


class Plan(MemorySettings):
    """All numbers of one trial, each with its reason in `settings`."""

    trial: str
    """Name of the trial, for example `full-seed42`."""
    data_fingerprint: str = ""
    """Fingerprint of the rows that the plan is for."""
    method: str
    model_name: str = ""
    """Folder in `models` of one of several trials; a run's only trial uses its method's name."""
    seed: int
    learning_rate: float
    head_learning_rate: float | None = None
    """Rate of the task's head and pooler; None for `learning_rate`."""
    head_init: Literal["probe", "random"] | None = None
    """Start of a new head; None if the head is pretrained."""
    layerwise_lr_decay: float
    num_train_epochs: float
    total_steps: int
    warmup_steps: int
    lr_scheduler_type: str
    global_batch_size: int
    placement: Literal["single", "ddp", "fsdp2", "zero2", "zero3", "deepspeed"] = "single"
    """Layout of weights, gradients and optimizer state; `deepspeed` means the user's own file."""
    offload: str = "none"
    """What is kept in host memory (`train.offload`)."""
    group_by_length: bool = True
    loader_workers: int = 0
    """Processes that read rows ahead; 0 for none, or as `train.extra` says."""
    eval_steps: int
    """Optimizer steps between evaluations, each with a checkpoint; 0 to evaluate only at the end."""
    eval_on_start: bool = True
    """Also evaluate before step 1."""
    generic: GenericTexts = GenericTexts()
    save_steps: int
    logging_steps: int
    metric: str
    greater_is_better: bool
    num_parameters: int
    """Parameters of the pretrained model with the task's head."""
    state: dict[MemoryKind, int]
    """Bytes of `weights`, `gradients` and `optimizer` between two steps."""
    rollbacks: tuple[int, ...] = ()
    """Steps of the checkpoints returned to, oldest first; 0 is the start.

    Each changes the order of the rows; each after the first return to a checkpoint halves the learning rate.
    """
    memory_limit_bytes: int | None = None
    available_bytes: int | None = None
    """Memory available to one process when the plan was made, if known."""
    memory: MemoryNeed | None = None
    sent_bytes_per_micro_batch: int = 0
    """Bytes that each process sends for each micro batch; a machine's network carries the same amount."""
    sent_bytes_per_update: int = 0
    """Bytes that each process sends once per optimizer step, besides those of its micro batches."""
    disk: DiskNeed | None = None
    time: TimeNeed | None = None
    busy: str = ""
    """Warning that other programs slowed this machine while its speed was measured."""
    settings: tuple[Setting, ...]

    @property
    def num_trainable_parameters(self) -> int:
        return self.num_parameters if self.num_trainable is None else self.num_trainable

    @property
    def num_frozen_parameters(self) -> int:
        """Frozen parameters, with those that the method adds; 0 for full fine-tuning."""
        return (
            0 if self.num_trainable is None else (self.num_all_parameters or self.num_parameters) - self.num_trainable
        )

    @property
    def sent_bytes(self) -> int:
        """Bytes that each process sends in one optimizer step."""
        return self.gradient_accumulation_steps * self.sent_bytes_per_micro_batch + self.sent_bytes_per_update

    @property
    def model_folder(self) -> str:
        """Folder of the finished model, relative to the run folder."""
        return f"models/{self.model_name or self.method}"

    @property
    def file(self) -> str:
        """File of this plan, relative to the run folder."""
        return f"plan/{self.trial if self.model_name else self.method}.json"


# ---- what `fulltune plan` shows besides ---------------------------------------------------------------------------


class PlacementOption(Record):
    """One layout of weights, gradients and optimizer state over devices, host and disk."""

    name: str
    kinds: dict[MemoryKind, int]
    """Bytes on each device at `micro_batch_size`."""
    device_bytes: int
    host_bytes: int
    """Host memory of all processes of one machine."""
    micro_batch_size: int
    activation_checkpointing: bool
    shortage: str | None
    """What is missing and how much, if the layout does not fit."""
    tokens_per_second: float | None
    """Speed over all devices; None if this hardware's speed is unknown."""
    bound_by: str
    """Longest part of a step."""
    settings: dict[str, Any]
    """Recipe settings that select this layout."""

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
    """True if this change alone makes the run fit."""
    costs: str
    """Drawback of the change."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Recipe settings of the change, by dotted names."""
    hardware: str = ""
    """Value for `--for`, if other hardware is the change."""


class Advice(Record):
    """What published experience says about a method for this task."""

    method: Literal["full fine-tuning", "LoRA", "adapters", "prompt tuning"]
    verdict: Literal["take", "try", "leave"]
    rule: str


class Survey(Record):
    """What `fulltune plan` shows besides the plan itself."""

    hardware: str
    assumptions: tuple[str, ...] = ()
    """Usual values assumed for hardware that was not described."""
    num_devices: int
    """Devices over all machines."""
    num_machines: int = 1
    num_parameters: int
    model_type: str
    train_rows: int
    """Train rows of an epoch."""
    eval_rows: int
    length_percentiles: dict[str, int]
    """Tokens per train row: keys `p50`, `p95`, `max`."""
    max_length: int
    fits: bool
    """True if a layout that fulltune can run fits."""
    full_fits: bool = True
    """The same for full fine-tuning, whatever the recipe's method."""
    placement: str = ""
    """Name of the plan's layout."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings that the plan changes in the recipe, by dotted names."""
    placements: tuple[PlacementOption, ...]
    disk_free_bytes: int | None = None
    host_free_bytes: int
    """Free host memory of one machine."""
    device_free_bytes: int
    """Device memory available to one process."""
    price: float | None = None
    """Price of the whole run."""
    currency: str = ""
    ways_out: tuple[WayOut, ...] = ()
    advice: tuple[Advice, ...] = ()
    command: str = ""
    """Command that runs the plan, unless a run folder was planned."""
    comparison: str = ""
    """Command of a comparison that would settle the advice, if it fits as it is."""
    notes: tuple[str, ...] = ()
    """What is missing when nothing fits."""
