"""The plan of a trial: every number with its reason, and what it needs of memory, disk and time.

Sizes are in bytes, times in seconds.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field

from fulltune.records.base import Record


class Setting(Record):
    """One value that the run used, and why it has this value."""

    name: str
    """Dotted name as in the recipe, for example `train.global_batch_size`."""
    value: Any
    reason: str
    """Why: `from the recipe`, or the rule that chose it."""
    chosen: bool
    """True when fulltune filled it in, False when the recipe gave it."""


MemoryKind = Literal["weights", "gradients", "optimizer", "activations", "logits", "buffers"]
Phase = Literal["loading", "step", "evaluation", "saving", "resuming"]
"""Parts of an attempt that each have a peak of memory of their own."""


class MemoryNeed(Record):
    """Bytes that one training process needs on its device, beyond what the libraries themselves take."""

    kinds: dict[MemoryKind, int]
    """What is alive at the peak of a step."""
    phases: dict[Phase, int]
    """Peak of each part of an attempt; `step` is the sum of `kinds`."""
    host: int = 0
    """Offloaded to the memory of the host, by one process."""

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
    """Bytes of a run on disk at its fullest."""

    one_checkpoint: int
    num_checkpoints: int
    """Kept ones, the best one, and the one that is being written."""
    model: int
    """The finished model, and the weights before step 1 while training goes on."""

    @property
    def total(self) -> int:
        return self.one_checkpoint * self.num_checkpoints + self.model


STARTING, PROBE, DRY_RUN = "starting", "linear probe", "checks and dry run"
BASELINES, TRAINED = "scoring the baselines", "scoring the trained model"


class TimeNeed(Record):
    """How long a run takes: by arithmetic before it starts, by measurement after its dry-run step."""

    train_seconds: float
    eval_seconds: float
    save_seconds: float
    tokens: int
    """Of all steps, padding included."""
    tokens_per_second: float
    """While training, over all processes."""
    source: str
    """`arithmetic`, or `dry-run step`."""
    stop_seconds: float = 0.0
    """From a signal to a saved checkpoint, at most: a step, an evaluation and a checkpoint; 0: not measured."""
    around: dict[str, float] = Field(default_factory=dict)
    """What the command does before and after, in order: `STARTING`, `PROBE`, `DRY_RUN`, `BASELINES`, `TRAINED`."""

    @property
    def total_seconds(self) -> float:
        """The training, from its first step to its last, with evaluations and checkpoints."""
        return self.train_seconds + self.eval_seconds + self.save_seconds

    @property
    def whole_seconds(self) -> float:
        """The same with what is around it, as far as it is known."""
        return self.total_seconds + sum(self.around.values())


class GenericTexts(Record):
    """Texts that have nothing to do with the task, by which a run sees what the model could do before; 0: none."""

    watched: int = 0
    """At each evaluation."""
    budget: float | None = None
    """How far they may move, as a share; None: as far as they do."""
    rows: int = 0
    """Trained along in each step."""
    steer_steps: int = 0
    """Steps between two measurements that set their weight."""
    read_once: int = 0
    """Before step 1, and to choose what is kept after the last one."""
    scored_rows: int = 0
    """Eval rows that are scored for that choice."""


class MemorySettings(Record):
    """What a plan can change about its memory."""

    micro_batch_size: int
    longest_tokens: int
    """Tokens of the longest row; with several choices of the longest choice."""
    gradient_accumulation_steps: int = 1
    eval_batch_size: int = 1
    num_processes: int = 1
    """Over all machines."""
    num_machines: int = 1
    """That the processes are spread over, as many on each."""
    device: str = "cpu"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    fast_bf16: bool = True
    """False: the GPU only emulates bf16."""
    weights_dtype: Literal["fp32", "bf16"] = "fp32"
    optim: str = "adamw_torch_fused"
    bf16_rounding: Literal["stochastic", "kahan", "nearest"] | None = None
    activation_checkpointing: bool = False
    can_recompute: bool = True
    """The model offers activation checkpointing."""
    plain_logits: bool = True
    """Nothing scales or caps the model's logits after its head, as far as its config says, and no loss of the user's
    needs them whole: the loss may be chunked."""
    torch_compile: bool = False
    """The model's repeated blocks run compiled."""
    chunked_loss: bool = False
    generic_first: bool = False
    """Generic text is trained on before a step's rows: its gradients lie there when they come."""
    num_saves: int | None = None
    """Checkpoints that the run writes; for the disk. None: many."""
    probe_bytes: int = 0
    """Of a linear probe of the untouched model, beside its weights; 0: none is fitted."""
    num_held: int | None = None
    """Parameters with what the method adds; None: it adds none."""
    num_trained: int | None = None
    """Parameters that are trained; None: all."""

    def changed(self, **values: Any) -> Self:
        """The same settings with other values for some."""
        return self.model_copy(update=values)

    @property
    def processes_per_machine(self) -> int:
        """Each has as many."""
        return self.num_processes // self.num_machines


class Plan(MemorySettings):
    """All numbers of one trial, each with its reason in `settings`."""

    trial: str
    """For example `full-seed42`."""
    data_fingerprint: str = ""
    """The rows that this plan was made for."""
    method: str
    model_name: str = ""
    """Of a trial among others: its model's folder in `models`; empty for a run's only trial, named by its method."""
    seed: int
    learning_rate: float
    head_learning_rate: float | None = None
    """Of the task's head with its pooler; None: the same as everything else's."""
    head_init: Literal["probe", "random"] | None = None
    """Where the task's head starts; None: it is not new."""
    layerwise_lr_decay: float
    num_train_epochs: float
    total_steps: int
    warmup_steps: int
    lr_scheduler_type: str
    global_batch_size: int
    placement: Literal["single", "ddp", "fsdp2", "zero2", "zero3", "deepspeed"] = "single"
    """Where weights, gradients and optimizer state lie; deepspeed: as the user's own file says."""
    offload: str = "none"
    """What of them lies in the host's memory: `train.offload`."""
    group_by_length: bool = True
    loader_workers: int = 0
    """Processes that read rows ahead; 0: none, or as `train.extra` says."""
    eval_steps: int
    """Optimizer steps between two evaluations and between two saves on that occasion; 0: never during training."""
    eval_on_start: bool = True
    """Another evaluation before step 1."""
    generic: GenericTexts = GenericTexts()
    save_steps: int
    logging_steps: int
    metric: str
    greater_is_better: bool
    num_parameters: int
    """Of the pretrained model with the task's head."""
    state: dict[MemoryKind, int]
    """Bytes of `weights`, `gradients` and `optimizer` between two steps, whatever the batch."""
    rollbacks: tuple[int, ...] = ()
    """Steps of the checkpoints that the run went back to, oldest first; 0: it began anew. From each on the rows
    come in another order, and from each but a first one to a checkpoint the learning rate is half of what it was."""
    memory_limit_bytes: int | None = None
    available_bytes: int | None = None
    """What one process could take when the plan was made; None: not known."""
    memory: MemoryNeed | None = None
    sent_each_pass: int = 0
    """Bytes that each process sends to the others for each micro batch; as many go over a machine's network."""
    sent_each_step: int = 0
    """The same once in an optimizer step, whatever the number of micro batches."""
    disk: DiskNeed | None = None
    time: TimeNeed | None = None
    busy: str = ""
    """That others worked on this machine when its speeds were measured, in words; empty: nearly none did."""
    settings: tuple[Setting, ...]

    @property
    def num_trainable_parameters(self) -> int:
        return self.num_parameters if self.num_trained is None else self.num_trained

    @property
    def num_frozen_parameters(self) -> int:
        """Those that stay as they are, with what the method adds for them; 0: full fine-tuning."""
        return 0 if self.num_trained is None else (self.num_held or self.num_parameters) - self.num_trained

    @property
    def sent_bytes(self) -> int:
        """By each process to the others in an optimizer step."""
        return self.gradient_accumulation_steps * self.sent_each_pass + self.sent_each_step

    @property
    def model_folder(self) -> str:
        """Where the finished model lies, relative to the run folder."""
        return f"models/{self.model_name or self.method}"

    @property
    def file(self) -> str:
        """Where the plan itself lies, relative to the run folder."""
        return f"plan/{self.trial if self.model_name else self.method}.json"


# ---- what `fulltune plan` shows besides ---------------------------------------------------------------------------


class Placement(Record):
    """One way to place weights, gradients and optimizer state on devices, host and disk."""

    name: str
    kinds: dict[MemoryKind, int]
    """Bytes on each device, at the micro batch below."""
    device_bytes: int
    host_bytes: int
    """Of a machine's processes together."""
    micro_batch_size: int
    activation_checkpointing: bool
    short: str
    """What is too little, and by how much; empty when it fits."""
    tokens_per_second: float | None
    """Over all devices; None: the speed of this hardware is not known."""
    bound_by: str
    """The longest part of a step."""
    settings: dict[str, Any]
    """What to change in the recipe for it."""

    @property
    def fits(self) -> bool:
        return not self.short


class WayOut(Record):
    """A change that frees memory or disk space."""

    change: str
    """The setting, or what to do."""
    frees_bytes: int
    where: Literal["device", "disk"]
    enough: bool
    """With it alone the run fits."""
    costs: str
    """What is lost by it."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What to change in the recipe for it, by dotted names."""
    hardware: str = ""
    """What to give to `--for`."""


class Advice(Record):
    """What the field's experience says about a method here."""

    method: Literal["full fine-tuning", "LoRA", "adapters", "prompt tuning"]
    verdict: Literal["take", "try", "leave"]
    rule: str


class Survey(Record):
    """What `fulltune plan` shows besides the plan itself."""

    hardware: str
    assumed: tuple[str, ...] = ()
    """What was not said about the hardware and is a usual value."""
    num_devices: int
    """Over all machines."""
    num_machines: int = 1
    num_parameters: int
    model_type: str
    train_rows: int
    """Of an epoch."""
    eval_rows: int
    length_percentiles: dict[str, int]
    """Tokens per train row: keys `p50`, `p95`, `max`."""
    max_length: int
    fits: bool
    """Some placement that fulltune can run fits."""
    full_fits: bool = True
    """Of full fine-tuning, whatever the recipe's method is."""
    placement: str = ""
    """Name of the one that the plan is for."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What the plan has and the recipe has not, by dotted names."""
    placements: tuple[Placement, ...]
    disk_free_bytes: int | None = None
    host_free_bytes: int
    """Of one machine."""
    device_free_bytes: int
    """What one process may take."""
    price: float | None = None
    """Of the whole run."""
    currency: str = ""
    ways_out: tuple[WayOut, ...] = ()
    advice: tuple[Advice, ...] = ()
    command: str = ""
    """Runs what was planned; empty for a run folder, whose recipe lies elsewhere."""
    comparison: str = ""
    """What settles the advice by measurement; empty where something has to be changed in the recipe first."""
    notes: tuple[str, ...] = ()
    """What is short, when nothing fits."""
