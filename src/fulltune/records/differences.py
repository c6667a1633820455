"""What a comparison of methods writes to disk: its design, what is unfair about it, differences, verdict.

Differences are always *oriented*: full fine-tuning minus the other arm in units of the metric, with the sign turned
for metrics where smaller is better, so that a positive number means that full fine-tuning is better.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fulltune.recipe.methods import ArmKind
from fulltune.records.base import Record

# ---- design ----------------------------------------------------------------------------------------------------


class ArmDesign(Record):
    """How one arm is trained."""

    name: str
    kind: ArmKind
    settings: dict[str, Any] = Field(default_factory=dict)
    """The method's own settings, such as `target_modules` and `rank`."""
    rates_searched: tuple[float, ...] = ()
    """Learning rates that were tried on the development rows; empty: none was."""
    whole_runs: int = 0
    """That chose between rates; 0: short trials alone did."""
    learning_rate: float | None = None
    """The one that was taken; None: not chosen yet, or nothing is trained."""
    on_edge: bool | None = None
    """A better one may lie beyond those tried; None: to be judged from the rates alone."""
    seeds: tuple[int, ...] = ()
    weights_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """In which the trained weights are kept."""
    bf16_rounding: Literal["stochastic", "kahan", "nearest"] | None = None
    train_tokens: int | None = None
    """That one trial of this arm sees; None: not known yet."""
    waited: bool = False
    """The verdict did not hinge on it, which explains fewer seeds."""
    time_was_up: bool = False
    """There was no time for more seeds."""
    no_time_to_search: bool = False
    """There was no time to search its rate."""


class ComparisonDesign(Record):
    """Everything that decides whether a comparison is fair."""

    arms: tuple[ArmDesign, ...]
    weights_source: Literal["plain", "gguf", "4bit", "8bit"] = "plain"
    """What the pretrained weights were read from: quantised ones have lost what full fine-tuning starts from."""
    full_wins: bool = False
    """The verdict is FULL, which says that full fine-tuning beats every other method."""
    test_in_eval: float = 0.0
    """Share of the reported rows that also choose rates and checkpoints."""
    test_openings: int = 0
    """How often the test rows were scored."""
    opened_by_others: tuple[str, ...] = ()
    """Other comparisons that opened the same test rows."""
    left_out: tuple[str, ...] = ()
    """Methods of the recipe for which there was no time."""
    margin: float = 0.0
    """Differences of the metric that do not matter."""
    eval_rows: int = 0
    """That choose between rates."""
    rates_told: float | None = None
    """By how much more of the metric a rate is taken in place of the usual one; None: not known, or it is no share."""
    test_in_train: str = ""
    """What the data stage says of test rows that stand in train as well."""


class Finding(Record):
    """Something that makes a comparison unfair, or that its reader must know."""

    rule: str
    """One of those of `compare/lint.py`."""
    level: Literal["unfair", "worth knowing"]
    where: str
    """The arm, or the part of the design."""
    what: str
    to_do: str


# ---- differences -----------------------------------------------------------------------------------------------


class ArmScore(Record):
    """The metric of one arm."""

    arm: str
    kind: ArmKind
    values: tuple[float, ...]
    """One for each seed."""
    mean: float
    low: float
    high: float
    """Interval of the mean over seeds and rows."""
    seed_sd: float | None
    """Between seeds, without what comes from the rows being few; None: not known from one seed."""


class Difference(Record):
    """Full fine-tuning minus one arm; positive: full is better."""

    arm: str
    kind: ArmKind
    decides: bool
    """False for arms that are shown for orientation (`base`, `head`)."""
    cheaper: bool
    num_seeds: int
    """Of the arm."""
    estimate: float
    low: float
    high: float
    """Interval at `Decision.confidence`, of this difference alone."""
    adjusted_low: float
    adjusted_high: float
    """Interval that together with those of the other arms holds with the confidence asked (Holm, spent alpha)."""
    p_value: float
    adjusted_p: float
    equivalence_p: float
    """Larger of the two one-sided tests against plus and minus the margin."""
    adjusted_equivalence_p: float
    equivalent: bool
    """Inside plus or minus the margin."""
    not_worse: bool
    """The arm loses less than the margin; it may be better."""
    full_better: bool
    arm_better: bool
    """Each by at least the margin, and certain."""
    standard_error: float
    row_variance: float
    """Part of its square that more rows make smaller."""
    seed_variance: float
    """Part that only more seeds make smaller."""
    seeds_known: bool
    """False: one seed everywhere, so that the spread between seeds is not known and nothing can be decided."""
    detectable: float
    """Smallest true difference that this comparison would have called with a chance of 80 %, never below the margin."""
    rows_needed: int | None = None
    """Test rows that would decide, were the difference what it seems; None: rows alone would not."""
    seeds_needed: int | None = None
    """Seeds of both arms that would decide; None: seeds alone would not."""


VerdictKind = Literal["FULL", "PEFT", "VARIANT", "EQUIVALENT", "UNDECIDED"]
"""`VARIANT`: full fine-tuning with other settings is better than that with the recipe's own."""


class Decision(Record):
    """The verdict on one set of rows, and everything it was made from."""

    verdict: VerdictKind
    recommended: str
    """Name of the arm to take: of the verdict; where it is UNDECIDED the cheapest that loses less than the margin, or
    empty."""
    metric: str
    greater_is_better: bool
    margin: float
    confidence: float
    alpha: float
    """Chance of a wrong FULL, PEFT or VARIANT: 1 - confidence, or the part of it that this look may spend."""
    num_rows: int
    num_clusters: int
    num_draws: int
    scores: tuple[ArmScore, ...]
    differences: tuple[Difference, ...]
    headline: str
    """The verdict in one sentence without numbers."""
    because: tuple[str, ...]
    """One sentence for each arm that decided."""
    would_decide: tuple[str, ...] = ()
    """What would settle an UNDECIDED: more rows, more seeds, or neither."""
    notes: tuple[str, ...] = ()

    def difference(self, arm: str) -> Difference:
        return next(difference for difference in self.differences if difference.arm == arm)


# ---- between seeds ---------------------------------------------------------------------------------------------


class ArmStep(Record):
    """What happens to an arm after a look at the development rows."""

    arm: str
    decision: Literal["more", "wait", "enough"]
    """`wait`: others go on, and the verdict does not hinge on this one for now."""
    seeds: int
    """That it is to have before the next look."""
    chance: float | None = None
    """Of a clear answer on the test rows were it stopped now; None: not known."""


class Look(Record):
    """What was decided after so many seeds, from the development rows."""

    num_seeds: int
    max_seeds: int
    spent: float
    """Part of alpha that this look may spend: at it the sealed rows are tested, when it is the one that ends it."""
    enough: bool
    """No more seeds for any arm."""
    reason: str
    arms: tuple[ArmStep, ...]
