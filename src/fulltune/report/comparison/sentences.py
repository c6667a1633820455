"""A comparison in sentences and numbers, the same in its report and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fulltune.records.comparison import ArmRow, Comparison
from fulltune.records.differences import Decision, Difference
from fulltune.records.scores import Estimate
from fulltune.report.format import words
from fulltune.text import counted, format_number, format_percent, format_seconds, is_share, listed

NOTHING = "–"
"""For what a method does not have, such as a time of training where nothing is trained."""


@dataclass(frozen=True)
class Writer:
    """Writes values and differences of one metric, as exactly as the margin asks for."""

    metric: str
    margin: float

    @classmethod
    def of(cls, decision: Decision) -> Writer:
        return cls(decision.metric, decision.margin)

    @property
    def in_points(self) -> bool:
        return is_share(self.metric)

    @property
    def name(self) -> str:
        return words.metric_name(self.metric)

    @property
    def _decimals(self) -> int:
        """One more than the margin has, two at least."""
        margin = 100 * self.margin if self.in_points else self.margin
        return min(6, max(2, 1 - math.floor(math.log10(margin) + 1e-9))) if margin > 0 else 3

    def value(self, value: float) -> str:
        """`92.1%`, `2.305`, `12.31`."""
        if not math.isfinite(value):
            return "not finite"
        if self.in_points:
            return f"{100 * value:.{self._decimals - 1}f}%"
        before_point = len(str(abs(int(value)))) - 1
        return f"{value:,.{max(0, self._decimals - before_point)}f}"

    def estimate(self, estimate: Estimate) -> str:
        """`92.1% [90.9, 93.3]`."""
        low, high = (self.value(bound).removesuffix("%") for bound in (estimate.low, estimate.high))
        return f"{self.value(estimate.value)} [{low}, {high}]"

    def difference(self, value: float) -> str:
        """With its sign, in points where the metric is a share: `+0.62`."""
        if not math.isfinite(value):
            return "not finite"
        rounded = round(100 * value if self.in_points else value, self._decimals) + 0.0  # no -0.00
        return f"{rounded:+,.{self._decimals}f}"

    def adjusted(self, found: Difference) -> str:
        """`+0.62 [-0.35, +1.58]`: the interval that holds for all methods together."""
        low, high = self.difference(found.adjusted_low), self.difference(found.adjusted_high)
        return f"{self.difference(found.estimate)} [{low}, {high}]"

    def amount(self, value: float) -> str:
        """A size of a difference, without a sign: `1 point`, `1.4 points`, `0.013`."""
        if not self.in_points:
            return f"{value:.2g}"
        shown = f"{100 * value:.2g}" if value < 0.995 else f"{100 * value:.0f}"
        return f"{shown} point{'' if shown == '1' else 's'}"

    def found_from(self, value: float) -> str:
        """From which size on a difference is found: `from 1.4 points on`."""
        return "none, however large" if self.in_points and value >= 1 else f"from {self.amount(value)} on"

    @property
    def unit(self) -> str:
        """What stands behind a difference in a table's head."""
        return " [points]" if self.in_points else ""


def label(decision: Decision) -> str:
    """The verdict in capitals, with the method's name where it names one."""
    name = decision.recommended
    take = {"PEFT": f": {name}", "VARIANT": f": {name}", "EQUIVALENT": f": take {name}"}
    return decision.verdict + take.get(decision.verdict, "")


def level(comparison: Comparison) -> str:
    """The confidence of its intervals: `95%`."""
    return f"{100 * comparison.decision.confidence:g}%"


def headline(comparison: Comparison) -> str:
    """The verdict in a sentence; before it, what trains nothing and comes near, because then little was gained."""
    return f"{_near_without_training(comparison)} {comparison.decision.headline}".lstrip()


def to_do(comparison: Comparison) -> tuple[str, ...]:
    """What would decide what is open."""
    decision = comparison.decision
    if not comparison.can_go_on:
        return decision.would_decide
    had = comparison.expectation.budget_seconds
    given = f" (it had {format_seconds(had)})" if had else ""
    more = f"give more time{given}: the same command with a larger --budget continues from these trials"
    return (more, *decision.would_decide)


def terms(comparison: Comparison) -> str:
    """On what terms the verdict holds: margin, certainty, rows."""
    decision, write = comparison.decision, Writer.of(comparison.decision)
    rivals = sum(one.decides for one in decision.differences)
    together = f" for the {rivals} methods together" if rivals > 1 else ""
    smaller = "" if comparison.greater_is_better else f" Smaller {write.name} is better."
    return (
        f"Margin: differences below {write.amount(decision.margin)} of {write.name} do not matter. Confidence: "
        f"{level(comparison)}{together}. Measured on {counted(decision.num_rows, 'test row')}.{smaller}"
    )


def marks(comparison: Comparison) -> list[str]:
    """All that a reader must know before believing the verdict, what is unfair first."""
    said = [
        f"{'Unfair' if one.level == 'unfair' else 'Note'}: {one.where}: {one.what}. To do: {one.to_do}."
        for one in sorted(comparison.findings, key=lambda one: one.level != "unfair")
    ]
    decision = comparison.decision
    write, known = Writer.of(decision), _known(comparison)
    still_open = [one for one in known if not (one.full_better or one.arm_better or one.equivalent)]
    if any(one.detectable > decision.margin for one in still_open):
        said.append(
            "Note: differences that so many test rows and seeds find in 8 of 10 cases: "
            f"{_found_from(still_open, write)}; the margin is {write.amount(decision.margin)}."
        )
    if blind := [one.arm for one in known if write.in_points and one.adjusted_high - one.adjusted_low >= 1]:
        said.append(
            f"Note: {listed(blind)}: too few seeds to estimate the spread between seeds, so the difference's interval "
            "covers nearly everything; add seeds."
        )
    return said


def _known(comparison: Comparison) -> list[Difference]:
    """The deciding differences of which the spread between seeds is known."""
    return [one for one in comparison.decision.differences if one.decides and one.seeds_known]


def could_find(comparison: Comparison) -> str:
    """From which size on a difference to each method is found in 8 of 10 cases; empty where that is not known."""
    return _found_from(_known(comparison), Writer.of(comparison.decision))


def _found_from(differences: Sequence[Difference], write: Writer) -> str:
    return ", ".join(f"{write.found_from(one.detectable)} ({one.arm})" for one in differences)


def _near_without_training(comparison: Comparison) -> str:
    """The strongest baseline, where the recommended method (else the best) is not above it by more than its interval.

    It says what both have and claims nothing of their difference, whose interval over seeds and clusters of rows is not
    known: a baseline is kept with resamples of single rows only.
    """
    known = [one for one in comparison.baselines if comparison.metric in one.metrics]
    trained = [row for row in comparison.rows if row.seeds]
    if not known or not trained:
        return ""
    sign = 1 if comparison.greater_is_better else -1
    best = max(known, key=lambda one: sign * one.metrics[comparison.metric].value)
    top = max(trained, key=lambda row: sign * row.metric.value)
    row = next((one for one in trained if one.arm == comparison.decision.recommended), top)
    value, write = best.metrics[comparison.metric].value, Writer.of(comparison.decision)
    if sign * value >= sign * top.metric.value:
        return f"No method here does better than {best.name}, which trains nothing and has {write.value(value)}."
    if sign * value < min(sign * row.metric.low, sign * row.metric.high):
        return ""
    return (
        f"{best.name}, which trains nothing, has {write.value(value)} on the same test rows, within the interval of "
        f"{row.arm}, {write.estimate(row.metric)}."
    )


def warning(comparison: Comparison) -> str:
    """The marks in one line beside the verdict; empty when there are none."""
    found = marks(comparison)
    unfair = sum(one.startswith("Unfair") for one in found)
    counts = ((unfair, "unfair setting"), (len(found) - unfair, "note"))
    parts = [counted(count, noun) for count, noun in counts if count]
    opened = len({(one.trials, one.alpha) for one in comparison.openings})  # the same trials again show nothing new
    again = f"The sealed test rows were used for a verdict {opened} times. " if opened > 1 else ""
    return f"{again}{listed(parts)}: see Fairness." if parts else ""


def held(holds: bool | None) -> str:
    """What became of a claim."""
    return {True: "holds", False: "does not hold", None: "not decided"}[holds]


def spent(comparison: Comparison) -> tuple[str, str]:
    """What everything took, and what stopping early saved, in a sentence each."""
    one, design = comparison.full_run_seconds, comparison.fixed_design_seconds
    took, fixed = f"{format_seconds(comparison.seconds)} in all", f"{format_seconds(design)} of training"
    if one > 0:
        parts = comparison.full_side_by_side
        parallel = f", with 1/{parts} of the cores" if parts > 1 else ""
        took += f", {ratio(comparison.seconds / one)} one full run ({format_seconds(one)}{parallel})"
        fixed += f", {ratio(design / one)} one full run"
    expected = comparison.expectation
    seeds = counted(expected.recipe_seeds or expected.num_seeds, "seed")
    searched = ", rate searches included," if any(row.search_seconds for row in comparison.rows) else ""
    said = f"{seeds} of every method{searched} take {fixed}"
    saved = design - sum(row.train_seconds * len(row.seeds) + row.search_seconds for row in comparison.rows)
    if not saved > 0.005 * design > 0:
        return took, f"{said}; stopping early saved nothing"
    amount, share = format_seconds(saved), format_percent(saved / design)
    if _time_was_up(comparison):
        return took, f"{said}; the budget ended before {amount} of it ({share})"
    return took, f"{said}; stopping early saved {amount} of it ({share})"


def _time_was_up(comparison: Comparison) -> bool:
    """It ended because of the budget; in older records: though the last look asked for more, or before all seeds."""
    if comparison.time_was_up:
        return True
    if comparison.looks:
        return not comparison.looks[-1].enough
    return any(0 < len(row.seeds) < comparison.expectation.num_seeds for row in comparison.rows)


def waited(comparison: Comparison) -> str:
    """Which methods got fewer seeds, and why; empty when none did."""
    decision = comparison.decision
    names = ", ".join(row.arm for row in comparison.rows if row.waited and row.arm != decision.recommended)
    if not names:
        return ""
    why = {
        "FULL": "they were enough to show that full is better",
        "UNDECIDED": "they waited for a clear answer about full and the best of the others",
    }
    return f"fewer seeds of {names}: {why.get(decision.verdict, 'the verdict did not hinge on them')}"


def full_of(comparison: Comparison) -> ArmRow | None:
    """The row of full fine-tuning."""
    return next((row for row in comparison.rows if row.kind == "full"), None)


def behind_full(row: ArmRow, comparison: Comparison) -> str:
    """By how much full is better than a method, with the interval that holds for all methods together."""
    if row.kind == "full":
        return "reference"
    found = next((one for one in comparison.decision.differences if one.arm == row.arm), None)
    return NOTHING if found is None else Writer.of(comparison.decision).adjusted(found)


# ---- numbers ---------------------------------------------------------------------------------------------------


def ratio(value: float) -> str:
    """`0.67×`, `1.04×`, `0.0065×`, `12.0×`."""
    if not math.isfinite(value):
        return NOTHING
    if value >= 9.995:
        return f"{value:,.1f}×" if value < 99.95 else f"{value:,.0f}×"
    return f"{value:.2f}".rstrip("0").rstrip(".") + "×" if value >= 0.095 or value == 0 else f"{value:.2g}×"


def to_full(row: ArmRow, full: ArmRow | None, field: str) -> str:
    """A cost relative to full fine-tuning's; empty where either is not known."""
    value, whole = getattr(row, field), getattr(full, field, 0)
    return ratio(value / whole) if whole and value > 0 else ""


def fine_share(value: float) -> str:
    """`100%`, `45.2%`, `0.65%`, `0.0034%`: small shares keep two digits."""
    if not math.isfinite(value):
        return NOTHING
    if abs(value) >= 0.1 or value == 0:
        return f"{100 * value:.1f}".removesuffix(".0") + "%"
    return f"{100 * value:.2g}%"


def short(value: float) -> str:
    """`22.7 M`, `1.5 T`, `950`: numbers too long to be read."""
    for power, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * power:
            return f"{format_number(value / power)} {letter}"
    return f"{value:,.0f}"


def short_count(value: int) -> str:
    """Parameters: as `short`, but 10⁹ of them are a billion: `6.7 B`."""
    return short(value).replace("G", "B")
