"""What a comparison of methods and a search for settings write to disk: trials, rates and what became of them."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from fulltune.records.base import Record
from fulltune.records.differences import Decision, Finding, Look
from fulltune.records.forgetting import Preserved
from fulltune.records.scores import Estimate, Scores


class Trial(Record):
    """One arm with a learning rate and a seed."""

    name: str
    """For example `lora-seed2`, in the rate search `lora-rate0.002-6.0pct`."""
    arm: str
    learning_rate: float
    seed: int
    share: float = 1.0
    """Share of a whole run's steps."""
    searches: bool = False
    """Of the rate search: scored once, at its end, and its model is not kept."""


class TrialResult(Record):
    """A finished trial; what is needed to compare it, without its model. What has a default is not known of one that
    diverged."""

    trial: Trial
    metric: float
    """On the eval rows, of the weights that were kept; NaN where it diverged."""
    steps: int = 0
    best_step: int = 0
    train_seconds: float
    """From the first import of its process to the saved model, without the checks before step 1; see `run_seconds`."""
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    memory_growth_bytes: int = 0
    num_parameters: int
    num_trainable: int
    tokens: int = 0
    """Of the texts, seen in training; without padding and virtual tokens."""
    train_flops: float = 0.0
    """Floating-point operations of all steps, forward and backward, traced; 0: not known."""
    saved_bytes: int = 0
    """Of what was saved of the model: for PEFT methods the adapter alone. Without tokenizer and notes."""
    device: str
    precision: str
    weights_dtype: str
    bf16_rounding: str | None = None
    seconds_per_row: float | None = None
    """To answer a test row, in batches; None: not asked."""
    problems: tuple[str, ...] = ()
    """Why it diverged."""


class Tried(Record):
    """One rate of a search."""

    learning_rate: float
    share: float
    metric: float


class Search(Record):
    """How an arm's learning rate was found."""

    arm: str
    tried: tuple[Tried, ...]
    chosen: float
    reason: str
    whole: tuple[Tried, ...] = ()
    """Whole runs with different rates, of which the best was chosen; empty: there were none."""
    usual: float | None = None
    """Kept where the eval rows do not tell: the method's default, of given rates the nearest to it; None: there was one
    rate."""
    other_runs: int = 0
    """Whole runs that count for nothing else: of other rates, and of rates that diverged."""
    other_seconds: float = 0.0
    """Of those."""
    on_edge: bool = False
    """The best rate is the lowest or the highest of those tried, and clearly ahead: a better one may lie beyond."""
    time_was_up: bool = False
    """There was no time to search, so that it is the usual rate, or to search further; with more time it is done."""


class Opening(Record):
    """Somebody looked at the sealed test rows."""

    time: str
    """ISO 8601 with time zone."""
    by: str
    """User and host."""
    command: str
    trials: tuple[str, ...]
    """Whose scores were made."""
    alpha: float
    """Chance of a wrong answer that the verdict made then may have."""
    left: float
    """Of that chance, for everything after this verdict."""


class Expectation(Record):
    """What a design costs and what it can decide; said before it starts."""

    arms: tuple[str, ...]
    num_seeds: int
    """Of full and the best of the others, at most; with a budget those that fit into it."""
    num_search_trials: int
    seconds: float
    """Where only full and the leader get all seeds; with what was spent before."""
    most_seconds: float
    """Where all methods do."""
    detectable: float | None
    """Smallest difference of the metric that such a comparison usually finds where seeds differ by half a point; None:
    not known before seeds have been run, because there are two or the metric is no share."""
    detectable_apart: float | None = None
    """The same where seeds differ by two points."""
    notes: tuple[str, ...] = ()
    search_share: float = 0.06
    """Of a run's steps in a search; 0: no search, each method is trained at its usual rate."""
    budget_seconds: float | None = None
    """That it was made for; None: no limit."""
    recipe_seeds: int | None = None
    """Seeds at most without a budget; None: `num_seeds`."""
    left_out: tuple[str, ...] = ()
    """Methods of the recipe for which the budget is too small."""
    sequential: bool = True
    """No more seeds than a clear answer needs."""


class ArmRow(Record):
    """One arm in the table; costs are the median over its runs, of memory the most."""

    arm: str
    kind: str
    settings: dict[str, Any] = Field(default_factory=dict)
    num_parameters: int
    """Of the pretrained model with the task's head."""
    num_trainable: int
    learning_rate: float | None = None
    seeds: tuple[int, ...] = ()
    metric: Estimate
    """On the test rows, mean over the seeds; the interval covers rows and seeds."""
    values: tuple[float, ...] = ()
    """Of each seed."""
    gain_share: float | None = None
    """Of what full fine-tuning gains over the untouched model; None: not known, or it gains nothing."""
    train_seconds: float = 0.0
    search_seconds: float = 0.0
    """Of all trials of its rate search together."""
    tokens_per_second: float = 0.0
    train_flops: float = 0.0
    """Of one whole run."""
    peak_memory_bytes: int = 0
    memory_growth_bytes: int = 0
    saved_bytes: int = 0
    drift: Estimate | None = None
    """On generic text, mean over texts and seeds."""
    seconds_per_row: float | None = None
    """To answer a test row, in batches."""
    waited: bool = False
    """It has fewer seeds than others because the verdict did not hinge on it."""


class Claim(Record):
    """A common claim about methods, and what it comes to here."""

    claim: str
    here: str
    holds: bool | None
    """None: these data do not tell."""


class Held(Record):
    """A whole run that was held to a budget for forgetting."""

    arm: str
    seed: int
    preserved: Preserved


class Comparison(Record):
    """All of a comparison: its report is made from this alone."""

    name: str
    model: str
    task: str
    train_rows: int
    mixed_rows: int = 0
    """What each epoch has besides."""
    eval_rows: int
    test_rows: int
    metric: str
    greater_is_better: bool
    decision: Decision
    rows: tuple[ArmRow, ...]
    baselines: tuple[Scores, ...]
    searches: tuple[Search, ...]
    expectation: Expectation
    looks: tuple[Look, ...]
    findings: tuple[Finding, ...]
    openings: tuple[Opening, ...]
    claims: tuple[Claim, ...]
    drift_unit: str
    """`nats per token` or `1 - cosine`."""
    drift_text: str
    """Where the generic texts come from."""
    held: tuple[Held, ...] = ()
    """With a budget for forgetting the whole runs that count, of all arms that can be held to one."""
    num_trials: int
    seconds: float
    """Of everything, over all commands that worked on it."""
    full_run_seconds: float
    """Training of one whole full fine-tuning run: the median over seeds."""
    fixed_design_seconds: float
    """What the same search and the same number of seeds for every arm would have taken."""
    cores: int
    time_was_up: bool = False
    """Because of its budget there are fewer seeds or methods than the recipe allows."""
    left_out: tuple[str, ...] = ()
    """Methods of the recipe for which there was no time."""
    device: str
    started: str
    data_fingerprint: str
    command: str
    versions: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def can_go_on(self) -> bool:
        """More time would add something, and a part of the chance of a wrong answer was kept for the next verdict."""
        kept = bool(self.openings and self.openings[-1].left)
        return self.time_was_up and self.decision.verdict == "UNDECIDED" and kept


# ---- several tasks on one base ---------------------------------------------------------------------------------


class TaskPart(Record):
    """One task's comparison, in short."""

    name: str
    """Of its recipe."""
    folder: str
    """Of its comparison."""
    metric: str
    greater_is_better: bool
    train_rows: int
    verdict: str
    recommended: str


class Way(Record):
    """One method for all tasks: a whole model for each, or one base with what the method trained for each."""

    arm: str
    kind: str
    stored_bytes: int
    """Weights of all tasks together, on disk and, with all of them loaded, in memory; with parts the base once."""
    bytes_per_task: int
    """That one more task adds, on average."""
    train_seconds: float
    """One run for each task."""
    scores: tuple[Estimate, ...]
    """On each task's test rows."""
    behind: Estimate | None = None
    """Full fine-tuning minus this method, mean over the tasks, with an interval that holds for all methods together;
    None: of full itself, or metrics that are no shares."""


class ManyTasks(Record):
    """What one full model for each task costs against parts side by side on one base."""

    model: str
    base_bytes: int
    confidence: float
    tasks: tuple[TaskPart, ...]
    ways: tuple[Way, ...]
    """Full first; only methods that all tasks compared."""


class TriedSettings(Record):
    """One combination of settings, in a whole run."""

    name: str
    """Of its folder in `search`."""
    settings: dict[str, Any]
    """Dotted names to values; empty: the recipe's own."""
    metric: float
    """On the eval rows; NaN: it failed."""
    seconds: float
    problem: str = ""


class Searched(Record):
    """A search that ended."""

    trial: str
    """The run whose weights are kept, as it is called in `attempts` and `scores`."""
    place: str
    """The folder in which it was trained, relative to the run folder."""
    settings: dict[str, Any]
    own: dict[str, Any] = Field(default_factory=dict)
    """What the recipe, or else the plan, has for the settings that were searched."""
    reason: str
    metric_name: str
    greater_is_better: bool
    eval_rows: int
    rate: Search | None = None
    """How the learning rate was found; None: other settings were searched."""
    ceiling: float | None = None
    """The lowest rate above the chosen one at which a short trial diverged or was clearly worse; None: none was."""
    tried: tuple[TriedSettings, ...] = ()
    """Whole runs with other settings and with the recipe's own, the best first."""
    num_combinations: int = 0
    bought: Estimate | None = None
    """The metric on the test rows less that of the usual settings, trained with the same seed; None: they are the
    same, or were not trained."""
    confidence: float = 0.95
    """Level of that interval."""
    seconds: float
    """Of the whole search, the kept run included."""
    run_seconds: float
    budget_seconds: float | None = None
    time_was_up: bool = False

    @property
    def in_words(self) -> str:
        """What was chosen, and why."""
        chosen = ", ".join(f"{name} {value}" for name, value in self.settings.items()) or "the recipe's own settings"
        return f"search: taking {chosen}: {self.reason.removeprefix('searched: ')}"

    @property
    def cost(self) -> float:
        """In whole runs."""
        return self.seconds / self.run_seconds if self.run_seconds else 0.0
