"""Records of a comparison of methods and of a learning rate search.

Differences are *oriented*: full fine-tuning minus the other method, with the sign turned if smaller is better. Positive
means that full is better.

"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from fulltune.recipe.methods import MethodKind
from fulltune.records.base import Record
from fulltune.records.scores import Estimate, Scores

# ---- trials and rates ------------------------------------------------------------------------------------------


class Trial(Record):
    """One training with a method, a learning rate and a seed."""

    name: str
    """For example `lora-seed2`, or in a rate search `lora-rate0.002-6.0pct`."""
    method: str
    learning_rate: float
    seed: int
    share: float = 1.0
    """Share of a whole run's steps."""
    searches: bool = False
    """True in a rate search: scored once, without keeping the model."""


class TrialResult(Record):
    """The result of a finished trial. A diverged one keeps the defaults."""

    trial: Trial
    metric: float
    """Eval metric of the best checkpoint; NaN if the trial diverged."""
    train_seconds: float
    """From the first import of the process to the saved model, without the checks before step 1."""
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    memory_growth_bytes: int = 0
    num_trainable: int = 0
    tokens: int = 0
    """Tokens seen in training, without padding and virtual tokens."""
    train_flops: float = 0.0
    """Traced floating-point operations of all steps; 0 if unknown."""
    saved_bytes: int = 0
    """Size of the saved weights, for PEFT of the adapter alone."""
    seconds_per_row: float | None = None
    problems: tuple[str, ...] = ()


class Search(Record):
    """A method's learning rate search, with NaN for diverged trials."""

    method: str
    tried: dict[float, float] = Field(default_factory=dict)
    """Metric of each short trial by rate; empty without a search."""
    share: float = 0.0
    """Share of a whole run's steps in a short trial."""
    chosen: float
    """The rate to use; NaN until it is chosen."""
    reason: str = ""
    whole: dict[float, float] = Field(default_factory=dict)
    """Metric of each whole run by rate; empty if there was only one."""
    usual: float | None = None
    """Rate to keep if the eval rows are inconclusive; None with a single rate."""
    on_edge: bool = False
    """True if the best rate is at the edge of those tried and clearly ahead."""
    time_was_up: bool = False
    """True if the budget ended the search; more time continues it."""


class Searched(Record):
    """The finished learning rate search of a run."""

    trial: str
    """Name of the chosen run in `attempts` and `scores`."""
    rate: Search
    metric_name: str
    eval_rows: int
    seconds: float
    """Time of the whole search, including the chosen run."""
    run_seconds: float


# ---- a design --------------------------------------------------------------------------------------------------


class Expectation(Record):
    """The design of a comparison with its forecast cost and detectable differences."""

    methods: tuple[str, ...]
    num_seeds: int
    """Most seeds of full and the best other method, within the budget."""
    most_seeds: int
    """Most seeds without a budget."""
    num_search_trials: int = 0
    seconds: float = 0.0
    """Forecast if only full and the leader get all seeds, including time already spent."""
    detectable: tuple[float, float] | None = None
    """Smallest differences usually detected if seeds differ by half a point and by two; None if unknown."""
    notes: tuple[str, ...] = ()
    search_share: float = 0.06
    """Share of a run's steps in a short trial; 0 without a search."""
    budget_seconds: float | None = None
    """Budget of the design; None for no limit."""
    sequential: bool = True
    """True if seeds end as soon as the answer is clear."""


class Finding(Record):
    """A rule of the lint that the comparison breaks."""

    rule: str
    level: Literal["unfair", "worth knowing"]
    where: str
    what: str
    to_do: str


class Look(Record):
    """A decision on the eval rows about how to continue after some seeds."""

    num_seeds: int
    max_seeds: int
    spent: float
    """Part of alpha that the verdict may spend if this look ends the seeds."""
    reason: str
    wanted_seeds: dict[str, int] = Field(default_factory=dict)
    """Wanted seeds of each method before the next look; empty ends the seeds."""
    waiting: tuple[str, ...] = ()
    """Methods with fewer seeds, on which the verdict does not depend for now."""


class Opening(Record):
    """A record of somebody looking at the sealed test rows."""

    time: str
    by: str
    command: str
    trials: tuple[str, ...]
    alpha: float
    """Permitted chance of a wrong answer in the verdict made then."""
    left: float
    """Permitted chance of a wrong answer left for later verdicts."""


# ---- the verdict -----------------------------------------------------------------------------------------------


class Difference(Record):
    """Full fine-tuning minus one method."""

    method: str
    kind: MethodKind
    decides: bool
    cheaper: bool
    num_seeds: int
    estimate: float
    low: float
    high: float
    """Interval of this difference alone, at `Decision.confidence`."""
    adjusted_low: float
    adjusted_high: float
    """Interval that holds jointly for all methods (Holm, spent alpha)."""
    adjusted_p: float
    adjusted_equivalence_p: float
    """The larger p-value of the two one-sided tests against the margin."""
    equivalent: bool
    """True if the difference lies within the margin."""
    not_worse: bool
    """True if the method loses less than the margin; it may be better."""
    full_better: bool
    other_better: bool
    """Both need a statistically certain difference of at least the margin."""
    seeds_known: bool
    """False if every method has one seed, so that nothing can be decided."""
    detectable: float
    """Smallest true difference detected with a chance of 80 %, at least the margin."""
    rows_needed: int | None = None
    """Test rows that would decide if the true difference equals the estimate, if rows alone would."""
    seeds_needed: int | None = None
    """Seeds of both methods that would decide, if seeds alone would."""

    @property
    def is_open(self) -> bool:
        """True for a deciding difference about which nothing is decided."""
        return self.decides and not (self.full_better or self.other_better or self.equivalent)


VerdictKind = Literal["FULL", "PEFT", "VARIANT", "EQUIVALENT", "UNDECIDED"]
"""`VARIANT`: full fine-tuning with other settings beats the recipe's own."""


class Decision(Record):
    """The verdict on one set of rows, with everything it rests on."""

    verdict: VerdictKind
    recommended: str
    """Method to take. If UNDECIDED, the cheapest that loses less than the margin, or an empty string."""
    metric: str
    greater_is_better: bool
    margin: float
    confidence: float
    alpha: float
    """Permitted chance of a wrong FULL, PEFT or VARIANT."""
    num_rows: int
    num_clusters: int
    num_draws: int
    scores: dict[str, Estimate]
    values: dict[str, tuple[float, ...]]
    """Metric of each seed, by method."""
    seed_sds: dict[str, float]
    """Standard deviation between a method's seeds beyond the noise of the rows."""
    differences: tuple[Difference, ...]
    headline: str
    """The verdict in one sentence without numbers."""
    because: tuple[str, ...]
    would_decide: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def difference(self, method: str) -> Difference:
        return next(difference for difference in self.differences if difference.method == method)


UNKNOWN = Estimate(value=math.nan, low=math.nan, high=math.nan)


class MethodRow(Record):
    """One method's settings, costs (medians, memory as maximum) and scores. An untrained method keeps the defaults."""

    method: str
    kind: MethodKind
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the method's own, such as `target_modules` and `rank`."""
    search: Search | None = None
    """Rate search; None for untrained methods."""
    seeds: tuple[int, ...] = ()
    waited: bool = False
    """True for fewer seeds, because the verdict did not depend on this method."""
    weights_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the stored trained weights."""
    bf16_rounding: Literal["stochastic", "kahan", "nearest"] | None = None
    num_parameters: int = 0
    """Parameters of the pretrained model with the task's head."""
    num_trainable: int = 0
    metric: Estimate = UNKNOWN
    """Mean over the seeds on the test rows; the interval covers rows and seeds."""
    gain_share: float | None = None
    """Share of full fine-tuning's gain over the untouched model, if there is one."""
    train_seconds: float = 0.0
    train_tokens: int = 0
    tokens_per_second: float = 0.0
    train_flops: float = 0.0
    """Floating-point operations of one whole run."""
    peak_memory_bytes: int = 0
    memory_growth_bytes: int = 0
    saved_bytes: int = 0
    drift: Estimate | None = None
    seconds_per_row: float | None = None

    @property
    def learning_rate(self) -> float | None:
        return None if self.search is None else self.search.chosen


class Comparison(Record):
    """A finished comparison. Its report is made from this record."""

    name: str
    model: str
    task: str
    train_rows: int
    mixed_rows: int = 0
    """Rows mixed into each epoch beside the train rows."""
    eval_rows: int
    test_rows: int
    decision: Decision
    rows: tuple[MethodRow, ...]
    baselines: tuple[Scores, ...]
    expectation: Expectation
    looks: tuple[Look, ...]
    findings: tuple[Finding, ...]
    openings: tuple[Opening, ...]
    drift_unit: str
    generic_text: str
    """Source of the generic texts."""
    num_trials: int
    seconds: float
    """Time of all commands on this comparison."""
    cores: int
    time_was_up: bool = False
    """True if the budget left fewer seeds or methods than the recipe allows."""
    device: str
    data_fingerprint: str
    command: str
    versions: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def can_resume(self) -> bool:
        """True if more time could add something and some alpha is left."""
        has_alpha = bool(self.openings and self.openings[-1].left)
        return self.time_was_up and self.decision.verdict == "UNDECIDED" and has_alpha

    @property
    def verdicts_on_test_rows(self) -> int:
        """Number of verdicts on the test rows, without repetitions of the same trials."""
        return len({(one.trials, one.alpha) for one in self.openings})


# ---- several tasks on one base ---------------------------------------------------------------------------------


class MethodOverTasks(Record):
    """One method over all tasks: a whole model for each, or small parts on one base."""

    method: str
    kind: MethodKind
    stored_bytes: int
    """Weights of all tasks, on disk and in memory; methods with parts count the base once."""
    bytes_per_task: int
    train_seconds: float
    """Time of one run for each task."""
    scores: dict[str, Estimate]
    behind: Estimate | None = None
    """Full minus this method, mean over tasks, with a joint interval. None for full itself, or if a metric is no
    share."""


class ManyTasks(Record):
    """Full models for several tasks against small parts on one base."""

    model: str
    base_bytes: int
    tasks: dict[str, Decision]
    """Verdicts by the name of recipe and comparison folder."""
    methods: tuple[MethodOverTasks, ...]
    """Methods that all tasks compared, full first."""
