"""What a comparison of methods and a search for a rate write to disk: trials, rates, differences, the verdict.

Differences are *oriented*: full fine-tuning minus the other method in units of the metric, with the sign turned where
smaller is better, so that a positive number means that full fine-tuning is better.
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
    """One method with a learning rate and a seed."""

    name: str
    """For example `lora-seed2`, in the rate search `lora-rate0.002-6.0pct`."""
    method: str
    learning_rate: float
    seed: int
    share: float = 1.0
    """Share of a whole run's steps."""
    searches: bool = False
    """Of the rate search: scored once, at its end, and its model is not kept."""


class TrialResult(Record):
    """A finished trial, without its model; what has a default is not known of one that diverged."""

    trial: Trial
    metric: float
    """On the eval rows, of the weights that were kept; NaN where it diverged."""
    train_seconds: float
    """From the first import of its process to the saved model, without the checks before step 1; see `run_seconds`."""
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    memory_growth_bytes: int = 0
    num_trainable: int = 0
    tokens: int = 0
    """Of the texts, seen in training; without padding and virtual tokens."""
    train_flops: float = 0.0
    """Floating-point operations of all steps, forward and backward, traced; 0: not known."""
    saved_bytes: int = 0
    """Of what was saved of the model: for PEFT methods the adapter alone. Without tokenizer and notes."""
    seconds_per_row: float | None = None
    """To answer a test row, in batches; None: not asked."""
    problems: tuple[str, ...] = ()
    """Why it diverged."""


class Search(Record):
    """How a method's learning rate was found: rates with their metrics on the eval rows, NaN where a trial diverged."""

    method: str
    tried: dict[float, float] = Field(default_factory=dict)
    """Short trials; empty: there was no search."""
    share: float = 0.0
    """Of a whole run's steps, that a short trial had."""
    chosen: float
    """NaN: not chosen yet."""
    reason: str = ""
    whole: dict[float, float] = Field(default_factory=dict)
    """Whole runs with different rates, of which the best was chosen; empty: there were none."""
    usual: float | None = None
    """Kept where the eval rows do not tell: the method's default, of given rates the nearest to it; None: there was one
    rate."""
    on_edge: bool = False
    """The best rate is the lowest or the highest of those tried, and clearly ahead: a better one may lie beyond."""
    time_was_up: bool = False
    """There was no time to search, so that it is the usual rate, or to search further; with more time it is done."""


class Searched(Record):
    """A search for a run's learning rate that ended."""

    trial: str
    """The run whose weights are kept, as it is called in `attempts` and `scores`."""
    rate: Search
    metric_name: str
    eval_rows: int
    seconds: float
    """Of the whole search, the kept run included."""
    run_seconds: float


# ---- a design --------------------------------------------------------------------------------------------------


class Expectation(Record):
    """What a design costs and what it can decide; said before it starts."""

    methods: tuple[str, ...]
    num_seeds: int
    """Of full and the best of the others, at most; with a budget those that fit into it."""
    most_seeds: int
    """The same without a budget."""
    num_search_trials: int = 0
    seconds: float = 0.0
    """Where only full and the leader get all seeds; with what was spent before."""
    detectable: tuple[float, float] | None = None
    """Smallest difference of the metric that such a comparison usually finds where seeds differ by half a point, and by
    two; None: not known before seeds have been run, because there are two or the metric is no share."""
    notes: tuple[str, ...] = ()
    search_share: float = 0.06
    """Of a run's steps in a search; 0: no search, each method is trained at its usual rate."""
    budget_seconds: float | None = None
    """That it was made for; None: no limit."""
    sequential: bool = True
    """No more seeds than a clear answer needs."""


class Finding(Record):
    """Something that makes a comparison unfair, or that its reader must know."""

    rule: str
    level: Literal["unfair", "worth knowing"]
    where: str
    """The method, or the part of the design."""
    what: str
    to_do: str


class Look(Record):
    """What was decided after so many seeds, from the eval rows."""

    num_seeds: int
    max_seeds: int
    spent: float
    """Part of alpha that this look may spend: at it the sealed rows are tested, when it is the one that ends it."""
    reason: str
    asked: dict[str, int] = Field(default_factory=dict)
    """How many seeds which methods are to have before the next look; empty: it is enough."""
    waiting: tuple[str, ...] = ()
    """Methods that have fewer seeds, because the verdict does not hinge on them for now."""


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


# ---- the verdict -----------------------------------------------------------------------------------------------


class Difference(Record):
    """Full fine-tuning minus one method; positive: full is better."""

    method: str
    kind: MethodKind
    decides: bool
    """False for methods that are shown for orientation (`base`, `head`)."""
    cheaper: bool
    num_seeds: int
    """Of the method."""
    estimate: float
    low: float
    high: float
    """Interval at `Decision.confidence`, of this difference alone."""
    adjusted_low: float
    adjusted_high: float
    """Interval that together with those of the other methods holds with the confidence asked (Holm, spent alpha)."""
    adjusted_p: float
    adjusted_equivalence_p: float
    """Of the larger of the two one-sided tests against plus and minus the margin."""
    equivalent: bool
    """Inside plus or minus the margin."""
    not_worse: bool
    """The method loses less than the margin; it may be better."""
    full_better: bool
    other_better: bool
    """Each by at least the margin, and certain."""
    seeds_known: bool
    """False: one seed everywhere, so that the spread between seeds is not known and nothing can be decided."""
    detectable: float
    """Smallest true difference that this comparison would have called with a chance of 80 %, never below the margin."""
    rows_needed: int | None = None
    """Test rows that would decide, were the difference what it seems; None: rows alone would not."""
    seeds_needed: int | None = None
    """Seeds of both methods that would decide; None: seeds alone would not."""

    @property
    def is_open(self) -> bool:
        """It decides, and nothing is decided about it."""
        return self.decides and not (self.full_better or self.other_better or self.equivalent)


VerdictKind = Literal["FULL", "PEFT", "VARIANT", "EQUIVALENT", "UNDECIDED"]
"""`VARIANT`: full fine-tuning with other settings is better than that with the recipe's own."""


class Decision(Record):
    """The verdict on one set of rows, and everything it was made from."""

    verdict: VerdictKind
    recommended: str
    """Name of the method to take. If UNDECIDED, the cheapest that loses less than the margin, or an empty string."""
    metric: str
    greater_is_better: bool
    margin: float
    confidence: float
    alpha: float
    """Chance of a wrong FULL, PEFT or VARIANT: 1 - confidence, or the part of it that this look may spend."""
    num_rows: int
    num_clusters: int
    num_draws: int
    scores: dict[str, Estimate]
    """Of each method, with an interval of the mean over seeds and rows."""
    values: dict[str, tuple[float, ...]]
    """Of each method, one for each seed."""
    seed_sds: dict[str, float]
    """Between a method's seeds, without what comes from the rows being few; not known from one seed."""
    differences: tuple[Difference, ...]
    headline: str
    """The verdict in one sentence without numbers."""
    because: tuple[str, ...]
    """One sentence for each method that decided."""
    would_decide: tuple[str, ...] = ()
    """What would settle an UNDECIDED: more rows, more seeds, or neither."""
    notes: tuple[str, ...] = ()

    def difference(self, method: str) -> Difference:
        return next(difference for difference in self.differences if difference.method == method)


UNKNOWN = Estimate(value=math.nan, low=math.nan, high=math.nan)


class MethodRow(Record):
    """One method's settings, costs (medians over its runs, memory as the maximum) and scores. An untrained method keeps
    the defaults."""

    method: str
    kind: MethodKind
    settings: dict[str, Any] = Field(default_factory=dict)
    """The method's own, such as `target_modules` and `rank`."""
    search: Search | None = None
    """How its rate was found; None: nothing is trained."""
    seeds: tuple[int, ...] = ()
    waited: bool = False
    """It has fewer seeds than others because the verdict did not hinge on it."""
    weights_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """In which the trained weights are kept."""
    bf16_rounding: Literal["stochastic", "kahan", "nearest"] | None = None
    num_parameters: int = 0
    """Of the pretrained model with the task's head."""
    num_trainable: int = 0
    metric: Estimate = UNKNOWN
    """On the test rows, mean over the seeds; the interval covers rows and seeds."""
    gain_share: float | None = None
    """Of what full fine-tuning gains over the untouched model; None: not known, or it gains nothing."""
    train_seconds: float = 0.0
    train_tokens: int = 0
    """That one whole run sees."""
    tokens_per_second: float = 0.0
    train_flops: float = 0.0
    """Of one whole run."""
    peak_memory_bytes: int = 0
    memory_growth_bytes: int = 0
    saved_bytes: int = 0
    drift: Estimate | None = None
    """How far generic text, mean over texts and seeds."""
    seconds_per_row: float | None = None
    """To answer a test row, in batches."""

    @property
    def learning_rate(self) -> float | None:
        return None if self.search is None else self.search.chosen


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
    decision: Decision
    rows: tuple[MethodRow, ...]
    baselines: tuple[Scores, ...]
    expectation: Expectation
    looks: tuple[Look, ...]
    findings: tuple[Finding, ...]
    openings: tuple[Opening, ...]
    drift_unit: str
    """`nats per token` or `1 - cosine`."""
    generic_text: str
    """Where the generic texts come from."""
    num_trials: int
    seconds: float
    """Of everything, over all commands that worked on it."""
    cores: int
    time_was_up: bool = False
    """Because of its budget there are fewer seeds or methods than the recipe allows."""
    device: str
    data_fingerprint: str
    command: str
    versions: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def can_resume(self) -> bool:
        """More time would add something, and a part of the chance of a wrong answer was kept for the next verdict."""
        kept = bool(self.openings and self.openings[-1].left)
        return self.time_was_up and self.decision.verdict == "UNDECIDED" and kept

    @property
    def verdicts_on_test_rows(self) -> int:
        """How often the test rows were used for one; the same trials again show nothing new."""
        return len({(one.trials, one.alpha) for one in self.openings})


# ---- several tasks on one base ---------------------------------------------------------------------------------


class MethodOverTasks(Record):
    """One method for all tasks: a whole model for each, or one base with what the method trained for each."""

    method: str
    kind: MethodKind
    stored_bytes: int
    """Weights of all tasks together, on disk and, with all of them loaded, in memory; with parts the base once."""
    bytes_per_task: int
    """That one more task adds, on average."""
    train_seconds: float
    """One run for each task."""
    scores: dict[str, Estimate]
    """On each task's test rows."""
    behind: Estimate | None = None
    """Full fine-tuning minus this method, mean over the tasks, with an interval that holds for all methods together;
    None: of full itself, or metrics that are no shares."""


class ManyTasks(Record):
    """What one full model for each task costs against parts side by side on one base."""

    model: str
    base_bytes: int
    tasks: dict[str, Decision]
    """By the name of its recipe, which is that of its comparison's folder, too."""
    methods: tuple[MethodOverTasks, ...]
    """Full first; only methods that all tasks compared."""
