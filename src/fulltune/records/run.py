"""What the stages hand to each other and write to disk: frozen records, one JSON file each.

Layer 0: imports nothing of ours but errors, no torch, no transformers. Sizes are in bytes, times in seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from fulltune.errors import SetupError
from fulltune.files import write_text
from fulltune.recipe.tasks import ProblemType


class Record(BaseModel):
    """A frozen record that knows how to write itself to disk and read itself back."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        ser_json_inf_nan="constants",  # a metric that is NaN must come back as NaN, not as null
    )

    def save(self, path: Path) -> None:
        """Write the record as JSON; a reader sees the old file or the new one, never half of it."""
        write_text(path, self.model_dump_json(indent=2) + "\n")

    def __repr__(self) -> str:
        """One line: what is not as usual, nested records by their names; `model_dump()` gives everything."""
        fields = type(self).model_fields
        said = [f"{name}={_brief(value)}" for name, value in self if value != fields[name].default]
        return f"{type(self).__name__}({', '.join(said)})"

    __str__ = __repr__

    def _inside(self) -> str:
        """It as a value inside another one."""
        return f"{type(self).__name__}(...)"

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a record that `save` wrote.

        Raises:
            SetupError: When the file is damaged or of another version of fulltune.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValueError:
            raise SetupError(
                f"{path}: damaged, or written by another version of fulltune; delete it and run the command again"
            ) from None


def _brief(value: Any) -> str:
    match value:
        case Record():
            return value._inside()
        case float():
            return f"{value:.4g}"
        case str():
            return repr(value if len(value) <= _LONGEST else f"{value[:_LONGEST]}...")
        case dict():
            return "{" + _few([f"{key}: {_brief(inner)}" for key, inner in value.items()]) + "}"
        case tuple() | list():
            return "(" + _few([_brief(inner) for inner in value]) + ")"
        case _:
            return repr(value)


_LONGEST, _MOST = 60, 4


def _few(said: list[str]) -> str:
    more = [f"{len(said) - _MOST} more"] if len(said) > _MOST else []
    return ", ".join([*said[:_MOST], *more])


class Setting(Record):
    """One value that the run used, and why it has this value."""

    name: str
    """Dotted name as in the recipe, for example `train.global_batch_size`."""
    value: Any
    reason: str
    """Why: `from the recipe`, or the rule that chose it."""
    chosen: bool
    """True when fulltune filled it in, False when the recipe gave it."""


# ---- data ------------------------------------------------------------------------------------------------------


class Segment(Record):
    """A piece of a decoded row: tokens that are trained, or tokens that are only read."""

    text: str
    trained: bool


class Preview(Record):
    """A row as the model sees it, decoded from its tokens."""

    segments: tuple[Segment, ...]
    label: str | None = None
    """The target in words, for tasks whose target is not text."""


SplitName = Literal["train", "eval", "test"]


class SplitSummary(Record):
    """Counts of one split (train, eval or test) after checking."""

    rows: int
    tokens: int
    trained_tokens: int
    """Tokens that carry a loss; for classifiers, rows."""
    truncated_rows: int
    dropped_rows: int
    length_percentiles: dict[str, int]
    """Tokens per row: keys `p50`, `p95`, `max`."""
    label_counts: dict[str, int] = {}
    asked_rows: int | None = None
    """What the recipe's fraction of the train file comes to, where there are more: each label gives a text at least."""


class DataSummary(Record):
    """What the data stage made: three splits that never mix."""

    task: str
    problem_type: ProblemType
    columns: dict[str, str]
    """Role (`text`, `label`, `prompt` ...) to column name in the user's files."""
    labels: tuple[str, ...] = ()
    """Class names; position = class id. Empty for regression and text generation."""
    joint: str = ""
    """Text put between prompt and completion (causal-lm), or before each source (seq2seq)."""
    num_choices: int = 0
    """Choices of each row (multiple-choice)."""
    packed: bool = False
    """Several short texts share a row, kept apart by their position ids."""
    max_length: int
    max_length_reason: str
    limit: int = 0
    """Longest row that could have been kept, in tokens: `max_length` is less when all rows are shorter."""
    length_explained: float = 0.0
    """Share of the variance of the train rows' length that the target explains, 0 to 1."""
    splits: dict[SplitName, SplitSummary]
    sources: dict[SplitName, str]
    """Split to where its rows came from, in words."""
    dropped: dict[str, int] = {}
    """Reason to number of rows left out; the rows are in `data/dropped.jsonl`."""
    notes: tuple[str, ...] = ()
    """What is worth knowing: duplicates found, labels seen in one split only ..."""
    test_in_eval: float = 0.0
    """Share of the test rows whose text, or prompt, also stands in eval."""
    previews: tuple[Preview, ...] = ()
    fingerprint: str
    """Hash of the files' content and of every setting that shapes the rows."""


# ---- plan ------------------------------------------------------------------------------------------------------


class StateBytes(Record):
    """Bytes that exist between two steps, whatever the batch; activations come on top."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


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
    offloaded: int = 0
    """What DeepSpeed keeps on an NVMe disk while it trains."""

    @property
    def total(self) -> int:
        return self.one_checkpoint * self.num_checkpoints + self.model + self.offloaded


STARTING, DRY_RUN = "starting", "checks and dry run"
BASELINES, TRAINED = "scoring the baselines", "scoring the trained model"
MOST_EMBEDDED = 10_000
"""Train rows behind a classifier's baseline of frozen embeddings, at most; more would change its scores little and cost
minutes."""


class TimePart(Record):
    """A part of the command that is not training."""

    name: str
    """`STARTING`, `DRY_RUN`, `BASELINES` or `TRAINED`."""
    seconds: float
    basis: Literal["arithmetic", "rule of thumb", "measured"]


class Command(Record):
    """A whole `fulltune run`, from its start to its report."""

    seconds: float


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
    around: tuple[TimePart, ...] = ()
    """What the command does before and after."""

    @property
    def total_seconds(self) -> float:
        """The training, from its first step to its last, with evaluations and checkpoints."""
        return self.train_seconds + self.eval_seconds + self.save_seconds

    @property
    def whole_seconds(self) -> float:
        """The same with what is around it, as far as it is known."""
        return self.total_seconds + sum(part.seconds for part in self.around)


class Plan(Record):
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
    layerwise_lr_decay: float
    num_train_epochs: float
    total_steps: int
    warmup_steps: int
    lr_scheduler_type: str
    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    num_processes: int
    eval_batch_size: int
    device: str
    precision: Literal["fp32", "bf16", "fp16"]
    weights_dtype: Literal["fp32", "bf16"]
    activation_checkpointing: bool
    can_recompute: bool = True
    """The model offers activation checkpointing."""
    plain_logits: bool = True
    """Nothing scales or caps the model's logits after its head, as far as its config says."""
    group_by_length: bool = True
    eval_steps: int
    """Optimizer steps between two evaluations and between two saves on that occasion; 0: never during training."""
    save_steps: int
    logging_steps: int
    metric: str
    greater_is_better: bool
    num_parameters: int
    """Of the pretrained model with the task's head."""
    num_trainable_parameters: int
    num_frozen_parameters: int = 0
    """Those that stay as they are, with what the method adds for them; 0: full fine-tuning."""
    state: StateBytes
    optim: str = "adamw_torch_fused"
    bf16_rounding: Literal["stochastic", "kahan", "nearest"] | None = None
    optimizer_in_backward: bool = False
    chunked_loss: bool = False
    attn_implementation: str | None = None
    """Chosen by measurement; None: as the recipe says."""
    torch_compile: bool = False
    """Chosen by measurement; False: as the recipe says."""
    memory_limit_bytes: int | None = None
    available_bytes: int | None = None
    """What one process could take when the plan was made; None: a plan of an earlier version."""
    memory: MemoryNeed | None = None
    disk: DiskNeed | None = None
    time: TimeNeed | None = None
    settings: tuple[Setting, ...]

    @property
    def model_folder(self) -> str:
        """Where the finished model lies, relative to the run folder."""
        return f"models/{self.model_name or self.method}"

    @property
    def file(self) -> str:
        """Where the plan itself lies, relative to the run folder."""
        return f"plan/{self.trial if self.model_name else self.method}.json"


class Placement(Record):
    """One way to place weights, gradients and optimizer state on devices, host and disk."""

    name: str
    kinds: dict[MemoryKind, int]
    """Bytes on each device, at the micro batch below."""
    device_bytes: int
    host_bytes: int
    """Of all processes together."""
    disk_bytes: int
    """For offloading; checkpoints come on top."""
    micro_batch_size: int
    activation_checkpointing: bool
    fits: bool
    short: str
    """What is too little, and by how much; empty when it fits."""
    tokens_per_second: float | None
    """Over all devices; None: the speed of this hardware is not known."""
    bound_by: str
    """The longest part of a step."""
    runs: bool
    """fulltune can run it today."""
    settings: dict[str, Any]
    """What to change in the recipe for it."""
    how: str
    """The same in words."""
    needs: str = ""
    """What only a person can say; without it the placement is not chosen."""


class WayOut(Record):
    """A change that frees memory or disk space."""

    change: str
    """The setting, or what to do."""
    frees_bytes: int
    where: Literal["device", "host", "disk"]
    enough: bool
    """With it alone the run fits."""
    costs: str
    """What is lost by it."""
    settings: dict[str, Any] = {}
    """What to change in the recipe for it, by dotted names."""
    hardware: str = ""
    """What to give to `--for`."""


class Alternative(Record):
    """Another plan than the chosen one."""

    kind: Literal["cheaper", "faster"]
    change: str
    effect: str


class Advice(Record):
    """What the field's experience says about a method here."""

    method: Literal["full fine-tuning", "LoRA", "adapters", "prompt tuning"]
    verdict: Literal["take", "try", "leave"]
    rule: str
    evidence: str


class Survey(Record):
    """What `fulltune plan` shows besides the plan itself."""

    hardware: str
    assumed: tuple[str, ...] = ()
    """What was not said about the hardware and is a usual value."""
    num_devices: int
    num_parameters: int
    model_type: str
    train_rows: int
    eval_rows: int
    asked_eval_rows: int | None = None
    """By `data.eval_fraction`, where they are more."""
    length_percentiles: dict[str, int]
    """Tokens per train row: keys `p50`, `p95`, `max`."""
    max_length: int
    fits: bool
    """Some placement that fulltune can run fits."""
    full_fits: bool = True
    """Of full fine-tuning, whatever the recipe's method is."""
    placement: str = ""
    """Name of the one that the plan is for."""
    settings: dict[str, Any] = {}
    """What the plan has and the recipe has not, by dotted names."""
    placements: tuple[Placement, ...]
    no_sharing: str = ""
    """Why nothing is shared out or offloaded among them."""
    disk_free_bytes: int | None = None
    host_free_bytes: int
    device_free_bytes: int
    """What one process may take."""
    on_cpu: bool = False
    """That is the host's memory."""
    time: TimeNeed | None = None
    price: float | None = None
    """Of the whole run."""
    currency: str = ""
    ways_out: tuple[WayOut, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    advice: tuple[Advice, ...] = ()
    command: str = ""
    """Runs what was planned with another seed."""
    comparison: str = ""
    """What settles the advice by measurement; empty where the plan's placement is for one method alone."""
    comparison_first: str = ""
    """What to change in the recipe before that; empty: nothing."""
    rows_prepared: bool = True
    """The rows have been read; else they were imagined."""
    notes: tuple[str, ...] = ()
    """What is short, when nothing fits."""


# ---- training --------------------------------------------------------------------------------------------------

OutcomeStatus = Literal[
    "done",
    "interrupted",
    "stopped_by_guard",
    "diverged",
    "out_of_memory",
    "does_not_fit",
    "disk_full",
    "refused",
    "error",
    "killed",
    "crashed",
]


class Check(Record):
    """One line of the table that is printed before step 1."""

    name: str
    result: str
    passed: bool


class Moved(Record):
    """Which parameters training changed, counted against the weights before step 1."""

    num_tensors_with_gradient: int
    num_tensors_moved: int
    num_values_with_gradient: int
    num_values_moved: int
    unmoved_tensors: tuple[str, ...] = ()
    """Names of tensors that received a gradient and did not change (at most 20)."""

    @property
    def share(self) -> float:
        """Share of the values that received a gradient and changed, 0 to 1."""
        return self.num_values_moved / max(1, self.num_values_with_gradient)


class Outcome(Record):
    """How an attempt ended."""

    status: OutcomeStatus
    reason: str
    trial: str
    attempt: int
    steps: int = 0
    best_step: int | None = None
    best_metric: float | None = None
    moved: Moved | None = None
    checks: tuple[Check, ...] = ()
    train_seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    """Most that the training process held: of the host, with a GPU reserved on it."""
    memory_growth_bytes: int = 0
    """The same beyond what it held before the model was loaded: what `Plan.memory` predicts."""
    phase: Phase | None = None
    """What it was doing when it ended."""
    forecast: TimeNeed | None = None
    """Made after the dry-run step."""
    dry_run_growth_bytes: int = 0
    """Peak up to the end of the dry-run step, beyond what was held before the model was loaded."""
    dry_run_loss: float | None = None
    """Of the longest micro batch, before any update."""
    disk_bytes: int = 0
    """Most that checkpoints and weights took on the disk."""
    model_folder: str | None = None
    """Relative to the run folder."""
    log_tail: tuple[str, ...] = ()


class Measured(Record):
    """One setting, tried for a step in a process of its own (`fulltune plan --measure`)."""

    name: str
    """What was changed, in words."""
    kind: Literal["lever", "micro batch", "attention", "compile"]
    """Levers add up from row to row; the others each change one thing of the best so far."""
    changes: dict[str, Any]
    """Fields of the plan that differ from it."""
    peak_memory_bytes: int = 0
    """Most that the process held beyond what it held before the model was loaded."""
    tokens_per_second: float = 0.0
    """Tokens of the rows, without padding, over all processes."""
    train_seconds: float = 0.0
    """Of all steps of the run at this speed, without evaluation and checkpoints."""
    loss: float | None = None
    """Of the longest micro batch before any update, with the run's seed."""
    problem: str = ""
    """Why it cannot be had here; empty when it ran and fits."""
    taken: bool = False
    """The plan's final settings."""


class Measurements(Record):
    """What `fulltune plan --measure` tried, in this order."""

    available_bytes: int
    """What each process may take."""
    rows: tuple[Measured, ...]


# ---- evaluation ------------------------------------------------------------------------------------------------


class Estimate(Record):
    """A metric on the test rows with its bootstrap interval."""

    value: float
    low: float
    high: float
    rows: int | None = None
    """Test rows that it is of: fewer than all where answers were generated for some. None: not written down (records of
    earlier versions), or no metric of rows."""
    clusters: int | None = None
    """Groups of dependent rows (the same text, prompt or passage, or nearly so) that the interval rests on; None: as
    `rows`."""

    def _inside(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    @property
    def lone(self) -> str:
        """Why it has no interval: it is of one row, or of rows that all depend on each other; empty: it has one."""
        if self.rows == 1:
            return "one row"
        return "one group of rows" if self.clusters == 1 else ""


class Calibration(Record):
    """How far the probabilities can be believed; the temperature is fitted on the eval rows."""

    temperature: float
    expected_calibration_error: float
    expected_calibration_error_scaled: float
    """After dividing the logits by the temperature."""
    note: str = ""
    """Why the temperature was not fitted and is 1; empty: it was."""


class Confusion(Record):
    """Counts of test rows: true label (row) by predicted label (column)."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


class Answer(Record):
    """One test row and what a model said to it."""

    text: str
    expected: str
    predicted: str
    loss: float | None = None


class Scores(Record):
    """One model, or one baseline, on the test rows."""

    name: str
    """`majority class`, `nearest centroid (frozen)`, `before training`, or the trial's name."""
    kind: Literal["baseline", "untouched", "trained"]
    rows: int
    metrics: dict[str, Estimate]
    main_metric: str
    greater_is_better: bool
    confidence: float
    differences: dict[str, Estimate] = {}
    """Of a trained model: its main metric minus that of the row with this name, on the same test rows, with the
    interval of the difference itself."""
    seconds: float = 0.0
    calibration: Calibration | None = None
    confusion: Confusion | None = None
    worst: tuple[Answer, ...] = ()
    """The rows with the highest loss among the wrong ones, highest first."""
    answers: tuple[Answer, ...] = ()
    """For text generation: test rows, drawn at random among those with different prompts, and what was generated."""
    left_out: str = ""
    """Metrics that could not be computed here, and what they need."""


# ---- the run ---------------------------------------------------------------------------------------------------


class Environment(Record):
    """Where and with what a run was made."""

    started: str
    """ISO 8601 with time zone."""
    fulltune: str
    python: str
    platform: str
    packages: dict[str, str]
    cpu: str
    num_cores: int
    memory_bytes: int
    devices: tuple[str, ...]
    commit: str | None = None
