"""Records of comparisons and learning rate searches. Differences are *oriented*: positive means that full fine-tuning
is better."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from fulltune.recipe.methods import MethodKind
from fulltune.records.base import Record
from fulltune.records.scores import Estimate, Scores

# ---- trials and rates ------------------------------------------------------------------------------------------


class Trial(Record):
    """One training run with a method, a learning rate and a seed."""

    name: str
    method: str
    learning_rate: float
    seed: int
    share: float = 1.0
    """Share of a whole run's steps."""
    searches: bool = False
    """True for a short trial of a learning rate search, whose model is not saved."""


class TrialResult(Record):
    """The result of a finished trial. If the trial diverged, the fields keep their defaults."""

    trial: Trial
    metric: float
    """Eval metric of the best checkpoint, or NaN if the trial diverged."""
    train_seconds: float
    """Seconds from the start of the process to the saved model, without the checks before step 1."""
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    memory_growth_bytes: int = 0
    num_trainable: int = 0
    tokens: int = 0
    """Tokens trained on, without padding and virtual tokens."""
    train_flops: float = 0.0
    """Floating-point operations of all steps, or 0 if unknown."""
    saved_bytes: int = 0
    seconds_per_row: float | None = None
    problems: tuple[str, ...] = ()


class Search(Record):
    """A method's learning rate search. Diverged trials have the metric NaN."""

    method: str
    tried: dict[float, float] = Field(default_factory=dict)
    """Metric of each short trial by learning rate."""
    share: float = 0.0
    chosen: float
    """The learning rate to use, or NaN until it is chosen."""
    reason: str = ""
    whole: dict[float, float] = Field(default_factory=dict)
    """Metric of each whole run by learning rate, or empty if there was only one."""
    usual: float | None = None
    """Default learning rate, which is kept if the eval rows are inconclusive."""
    on_edge: bool = False
    """True if the best rate is the smallest or largest one tried and is clearly ahead."""
    time_was_up: bool = False


class Searched(Record):
    trial: str
    rate: Search
    metric_name: str
    eval_rows: int
    seconds: float
    run_seconds: float


# ---- a design --------------------------------------------------------------------------------------------------


class Expectation(Record):
    """The design of a comparison, with its forecast duration and detectable differences."""

    methods: tuple[str, ...]
    num_seeds: int
    most_seeds: int
    """Maximum number of seeds if there is no budget."""
    num_search_trials: int = 0
    seconds: float = 0.0
    """Forecast time if only full fine-tuning and the best other method get all seeds."""
    detectable: tuple[float, float] | None = None
    """Smallest differences usually detected if the standard deviation between seeds is 0.5 or 2 points, or None if
    unknown."""
    notes: tuple[str, ...] = ()
    search_share: float = 0.06
    budget_seconds: float | None = None
    sequential: bool = True


class Finding(Record):
    """A violated rule of fair comparison."""

    rule: str
    level: Literal["unfair", "worth knowing"]
    where: str
    what: str
    to_do: str


class Look(Record):
    """An interim decision on the eval rows about which methods get more seeds."""

    num_seeds: int
    spent: float
    """Part of alpha that the verdict may use if no more seeds follow."""
    reason: str
    wanted_seeds: dict[str, int] = Field(default_factory=dict)
    """Number of seeds that each method needs next, or empty if no more seeds follow."""
    waiting: tuple[str, ...] = ()


class TestRowsUse(Record):
    """Log entry for a command that computed a verdict from the test rows."""

    time: str
    trials: tuple[str, ...]
    alpha: float
    left: float


# ---- the verdict -----------------------------------------------------------------------------------------------


class Difference(Record):
    method: str
    kind: MethodKind
    decides: bool
    cheaper: bool
    num_seeds: int
    estimate: float
    adjusted_low: float
    adjusted_high: float
    """Upper end of the interval, adjusted for comparing several methods (Holm) and for earlier looks."""
    equivalent: bool
    """True if the difference is shown to lie within the margin."""
    not_worse: bool
    """True if the method is shown to be worse by less than the margin, or better."""
    full_better: bool
    other_better: bool
    """True if the method is shown to be better by at least the margin."""
    seeds_known: bool
    detectable: float
    """Smallest true difference (at least the margin) that is detected with 80 % probability."""
    rows_needed: int | None = None
    """Number of test rows needed for a decision, or None if no number suffices."""
    seeds_needed: int | None = None
    """Number of seeds per method needed for a decision, or None if no number suffices."""

    @property
    def is_open(self) -> bool:
        """True if the verdict needs this difference but the difference is undecided."""
        return self.decides and not (self.full_better or self.other_better or self.equivalent)


VerdictKind = Literal["FULL", "PEFT", "VARIANT", "EQUIVALENT", "UNDECIDED"]
"""Possible verdicts. `VARIANT` means that full fine-tuning with other settings beats the recipe's own settings."""


class Decision(Record):
    """A verdict for one set of rows, with its statistics."""

    verdict: VerdictKind
    recommended: str
    """Recommended method; if the verdict is UNDECIDED, the cheapest that loses less than the margin, or empty if there
    is none."""
    metric: str
    greater_is_better: bool
    margin: float
    confidence: float
    alpha: float
    """Accepted probability of a wrong verdict FULL, PEFT or VARIANT."""
    num_rows: int
    scores: dict[str, Estimate]
    values: dict[str, tuple[float, ...]]
    seed_sds: dict[str, float]
    """Standard deviation of each method's metric between seeds, excluding the variance between rows."""
    differences: tuple[Difference, ...]
    headline: str
    because: tuple[str, ...]
    would_decide: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def difference(self, method: str) -> Difference:
        return next(difference for difference in self.differences if difference.method == method)


UNKNOWN = Estimate(value=math.nan, low=math.nan, high=math.nan)


class MethodRow(Record):
    """One method's settings, costs (medians over seeds), maximum memory and scores. For untrained methods, the training
    fields keep their defaults."""

    method: str
    kind: MethodKind
    settings: dict[str, Any] = Field(default_factory=dict)
    search: Search | None = None
    seeds: tuple[int, ...] = ()
    waited: bool = False
    """True if the method has fewer seeds, because more would not change the verdict."""
    weights_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    bf16_rounding: Literal["stochastic", "kahan", "nearest"] | None = None
    num_parameters: int = 0
    num_trainable: int = 0
    metric: Estimate = UNKNOWN
    """Mean over seeds, with an interval over both rows and seeds."""
    gain_share: float | None = None
    """Share of full fine-tuning's gain that this method reaches, or None if there is no gain."""
    train_seconds: float = 0.0
    train_tokens: int = 0
    tokens_per_second: float = 0.0
    train_flops: float = 0.0
    peak_memory_bytes: int = 0
    memory_growth_bytes: int = 0
    saved_bytes: int = 0
    drift: Estimate | None = None
    seconds_per_row: float | None = None


class Comparison(Record):
    """A finished comparison with everything that its report needs."""

    name: str
    model: str
    task: str
    train_rows: int
    mixed_rows: int = 0
    eval_rows: int
    test_rows: int
    decision: Decision
    rows: tuple[MethodRow, ...]
    baselines: tuple[Scores, ...]
    expectation: Expectation
    looks: tuple[Look, ...]
    findings: tuple[Finding, ...]
    openings: tuple[TestRowsUse, ...]
    drift_unit: str
    generic_text: str
    seconds: float
    cores: int
    time_was_up: bool = False
    device: str
    data_fingerprint: str
    command: str
    versions: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def can_resume(self) -> bool:
        """True if the verdict is undecided because time ran out, and part of alpha is unspent."""
        has_alpha = bool(self.openings and self.openings[-1].left)
        return self.time_was_up and self.decision.verdict == "UNDECIDED" and has_alpha

    @property
    def verdicts_on_test_rows(self) -> int:
        """Number of verdicts on the test rows. Verdicts on the same trials count once."""
        return len({(one.trials, one.alpha) for one in self.openings})


# ---- several tasks on one base ---------------------------------------------------------------------------------


class MethodOverTasks(Record):
    """One method's results over all tasks."""

    method: str
    kind: MethodKind
    stored_bytes: int
    """Size of the weights for all tasks, with a shared base model counted once."""
    bytes_per_task: int
    train_seconds: float
    scores: dict[str, Estimate]
    behind: Estimate | None = None
    """Mean over tasks of full fine-tuning's score minus this method's, or None for full itself or if a metric is not a
    share."""


class ManyTasks(Record):
    """Compares one fully fine-tuned model per task with small adapters that share one base model."""

    model: str
    tasks: dict[str, Decision]
    methods: tuple[MethodOverTasks, ...]
