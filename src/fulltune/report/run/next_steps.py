"""What to try next, from what a run shows of itself: a pure function of the verdict, the curves and the settings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from fulltune.records.scores import Confusion
from fulltune.report.format import words
from fulltune.report.format.blocks import Headline
from fulltune.report.format.plots import Point
from fulltune.report.run.about_forgetting import held_back
from fulltune.report.run.about_training import curves_of, fitting_of
from fulltune.report.run.fitting import CHANGED, Curves, Fitting, at_ceiling
from fulltune.report.run.read import RunView, headline_row
from fulltune.report.run.verdict import strongest_untrained
from fulltune.text import counted, format_metric, format_number, is_share, listed

_FEW_STEPS = 100
"""A pretrained model with a new head has hardly begun by then."""
_MOST_TIMES = 10
"""So much longer at most is proposed at once."""
_FEW_ROWS_OF_A_LABEL = 10
"""Fewer on average teach a label poorly, however often they are repeated."""
_STILL_FALLING = 0.05
"""Share of the train loss by which the last quarter lies below the one before."""
_LEARNED = 0.05
"""Share of the first train loss below which the train rows are known: there is nothing left to fall."""
_ONE_CLASS = 0.98
"""Share of the test rows that get the same label from a model that tells nothing apart."""
_UNEVEN = 2.0
"""A label with so many times the rows that the others have on average draws a model to itself."""
_GREW, _LEAST_READINGS = 1.2, 4
"""The last quarter's median loss over the first one's, each of so many readings: single batches differ by a third."""


_RATE, _LENGTH = "method.learning_rate", {"train.num_train_epochs", "train.max_steps"}


@dataclass(frozen=True)
class RunFacts:
    """What a finished run shows of itself."""

    verdict: str
    """The kind of the headline."""
    learning_rate: float
    epochs: float
    steps: int
    total_steps: int
    by_steps: bool = False
    """The recipe gives the length of the run in steps."""
    method_given: bool = True
    """The recipe has a block `method`: a setting of it can be changed alone."""
    train_rows: int = 0
    labels: int = 0
    """Of rows that have one each; 0: another problem."""
    max_rows: int | None = None
    """The recipe takes no more rows than that."""
    curves: Curves = field(default_factory=Curves)
    fit: Fitting = field(default_factory=lambda: Fitting("not known"))
    last_as_good: bool = False
    """The eval rows do not tell the last weights from the best ones."""
    searched: frozenset[str] = frozenset()
    """Settings that a search has tried: it is not for a reader to try them again."""
    bar: str = "the baseline"
    """What the verdict compares with."""
    blind: str = ""
    """That the model tells nothing apart, in words; empty: it does."""
    is_faultless: bool = False
    """Every test row is answered right: on these rows no other training can do better."""
    held_back: tuple[str, str] = ("", "")
    """What a budget for forgetting has kept the model from, and what helps."""
    weights_may_help: bool = False
    """It gives the label that by far most rows have, and all classes counted alike."""


def facts_of(view: RunView, headline: Headline) -> RunFacts | None:
    """What a run's files show of the trial that the headline is about; None: it was not scored or has no plan."""
    row = headline_row(view.scores)
    plan = view.plan_of(row.name) if row else None
    outcome = view.outcome_of(row.name) if row else None
    if row is None or plan is None or outcome is None:
        return None
    given = {setting.name: setting.value for setting in plan.settings if not setting.chosen}
    summary = view.summary
    train = summary.splits.get("train") if summary else None
    main = row.metrics.get(row.main_metric)
    label, is_usual = _one_label(row.confusion) if row.confusion else ("", False)
    entities = [row.metrics[name].value for name in ("precision", "recall") if name in row.metrics]
    blind = f"Nearly every test row gets the same label, '{words.clipped(label, 40)}'" if label else ""
    if not blind and entities and not any(entities):
        blind = "Not one entity of the test rows is found"
    bar = strongest_untrained(view.scores, row.main_metric, row.greater_is_better)
    tried = [view.searched.settings, *(one.settings for one in view.searched.tried)] if view.searched else []
    return RunFacts(
        verdict=headline.kind,
        searched=frozenset(name for settings in tried for name in settings),
        curves=curves_of(view, row.name, plan),
        fit=fitting_of(view, row.name),
        bar="the untouched model" if bar is None or bar.kind == "untouched" else bar.name,
        learning_rate=plan.learning_rate,
        last_as_good=bool(outcome.kept_because),
        epochs=plan.num_train_epochs,
        steps=outcome.steps,
        total_steps=plan.total_steps,
        by_steps="train.max_steps" in given,
        method_given=any(name.startswith("method.") for name in given),
        train_rows=train.rows if train else 0,
        labels=len(summary.labels) if summary and summary.form.is_calibrated else 0,
        max_rows=given.get("data.max_rows"),
        blind=blind,
        is_faultless=main is not None and is_share(row.main_metric) and main.value == 1,
        held_back=held_back(view.preserved.get(row.name)),
        weights_may_help="train.class_weights" not in given and is_usual,
    )


def _one_label(confusion: Confusion) -> tuple[str, bool]:
    """The label that nearly all rows get although there are others, empty: none; and whether by far most have it."""
    given = [sum(counts) for counts in zip(*confusion.counts, strict=True)]
    expected = [sum(counts) for counts in confusion.counts]
    most, place = max(((count, place) for place, count in enumerate(given)), default=(0, 0))
    several = max(expected, default=0) < _ONE_CLASS * sum(expected)
    if not several or most < _ONE_CLASS * max(1, sum(given)):
        return "", False
    usual = expected.pop(place)
    return confusion.labels[place], usual >= _UNEVEN * statistics.mean(expected)


def next_steps(run: RunFacts) -> tuple[str, ...]:
    """What to change, each alone with what speaks for it and the setting; empty where the model is better as it is."""
    if run.verdict not in ("worse", "unresolved"):
        return ()
    if run.is_faultless:
        return (
            "Every test row is answered right: no other training can do better on them. Take more test rows, or harder "
            "ones.",
        )
    evidence, helps = run.held_back
    if evidence:  # the curves are of a model that was not kept
        return (f"{_capital(evidence)}. {_capital(helps)}.",)
    narrower = ["More test rows narrow the interval: four times as many halve it"] * (run.verdict == "unresolved")
    if at_ceiling(run.curves.metric_name, run.curves.metric) and not run.blind:
        value = format_metric(run.curves.metric_name, run.curves.metric[-1][1])
        unless = ", unless harder or more test rows show a difference" if narrower else ""
        kept = f"Keep {run.bar}, which needs no training{unless}"
        return (f"{_capital(run.curves.on_eval)} is {value}: nothing is left to gain there. {kept}.",)
    lower, higher = _rate(run, 1 / 3), _rate(run, 3)
    found = []
    grew, is_sure = _loss_grew(run.curves.train_loss)
    passed, got_worse = _best_long_ago(run), run.fit.kind == "got worse" and run.fit.turn == 0
    has_free_rate, has_free_length = _RATE not in run.searched, not run.searched & _LENGTH
    if got_worse and has_free_rate:
        found.append(f"The eval rows were answered best before step 1. Try a tenth of the rate: {_rate(run, 1 / 10)}")
    elif grew and has_free_rate:
        found.append(f"{grew}. A likely cause: the learning rate is too high. Try a third of it: {lower}")
    elif passed and has_free_rate:
        found.append(f"{passed}. Try a lower rate: {lower}")
    if not has_free_length:
        pass  # a search chose it
    elif run.fit.kind in ("over-fitted", "over-confident") and (turn := run.fit.turn) is not None:
        found.append(
            f"The run is {run.fit.kind} from step {turn:,} on (see 'Learning curves'). "
            f"Stop there: {_shorter(run, turn)}"
        )
    elif not (is_sure or passed or got_worse) and (longer := _reasons_to_go_on(run)):
        found.append(f"{listed(longer)}. Train for longer: {_longer(run)}")
    if run.weights_may_help:
        weights = "Let rare labels count more: --set train.class_weights=balanced"
        found.insert(0, f"{run.blind}, the most frequent one. {weights}")
    elif run.blind:
        rates = f"Try a lower rate, {lower}, or a higher one, {higher}" if has_free_rate else "More train rows may help"
        other = found.pop(0) if found else rates
        found.insert(0, f"{run.blind}. {other}")
    more = "Use more: remove data.max_rows" if run.max_rows is not None else "Use more if there are any"
    if run.train_rows < _FEW_ROWS_OF_A_LABEL * run.labels:
        found.insert(
            0,
            f"{run.train_rows:,} train rows are about {run.train_rows / run.labels:.2g} for each of {run.labels:,} "
            f"labels, too few to learn most of them well: more rows help more than more epochs. {more}",
        )
    elif run.max_rows is not None:
        found.append(f"Only {counted(run.train_rows, 'row')} are used for training. {more}")
    if not found:
        others = f"other rates, {lower} or {higher}, or " if has_free_rate else ""
        found.append(f"The curves show no reason. Try {others}more train rows than these {run.train_rows:,}")
    return tuple(f"{one}." for one in [*found, *narrower])


def _reasons_to_go_on(run: RunFacts) -> list[str]:
    """What speaks for a longer run; nothing where it stopped early or was better before its end."""
    if run.steps < run.total_steps or _was_better(run):
        return []
    reasons = []
    values = [value for _, value in run.curves.train_loss]
    if size := len(values) // 4:
        before, last = sum(values[-2 * size : -size]) / size, sum(values[-size:]) / size
        if before > 0 and _LEARNED * values[0] < last < min(values[0], (1 - _STILL_FALLING) * before):
            fell = f"{format_number(values[0])} to {format_number(last)}"
            reasons.append(f"the train loss was still falling at the end ({fell})")
    if len(run.curves.metric) > 1 and run.curves.best[0] == run.curves.metric[-1][0]:
        way = "rising" if run.curves.greater_is_better else "falling"
        reasons.append(f"{run.curves.on_eval} was still {way} at the last evaluation")
    if run.steps < _FEW_STEPS:
        reasons.append(f"{counted(run.steps, 'step')} are few" if run.steps > 1 else "one step is little")
    return [*map(_capital, reasons[:1]), *reasons[1:]]


def _loss_grew(loss: Sequence[Point]) -> tuple[str, bool]:
    """That the train loss ended far above where it began, else empty; and whether it is more than noise."""
    values = [value for _, value in loss]
    size = len(values) // 4
    if size < _LEAST_READINGS or not all(map(math.isfinite, values)):
        return "", False
    began, ended = statistics.median(values[:size]), statistics.median(values[-size:])
    if not ended > _GREW * began > 0:
        return "", False
    said = f"The train loss rose from {format_number(began)} to {format_number(ended)}"
    return f"{said} (medians of the first and last quarter)", max(values[:size]) < ended


def _best_long_ago(run: RunFacts) -> str:
    (step, value), metric = run.curves.best, run.curves.metric
    if run.last_as_good or len(metric) < 3 or 2 * step > metric[-1][0] or metric[-1][1] == value:
        return ""
    return f"{_capital(run.curves.on_eval)} was best at step {step:,} and worse at the end"


def _was_better(run: RunFacts) -> bool:
    losses = [value for _, value in run.curves.eval_loss if math.isfinite(value)]
    rose = bool(losses) and losses[-1] > (1 + CHANGED) * min(losses)
    metric = run.curves.metric
    return rose or (bool(metric) and not run.last_as_good and run.curves.best[1] != metric[-1][1])


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _longer(run: RunFacts) -> str:
    """Twice as long, or as long as it takes for the steps not to be few."""
    times = min(_MOST_TIMES, max(2, math.ceil(_FEW_STEPS / max(1, run.total_steps))))
    if run.by_steps:
        return f"--set train.max_steps={times * run.total_steps}"
    return f"--set train.num_train_epochs={times * run.epochs:g}"


def _shorter(run: RunFacts, step: int) -> str:
    """As long as it takes to this step, so that the rate falls to 0 there."""
    if run.by_steps:
        return f"--set train.max_steps={step}"
    epochs = float(f"{run.epochs * step / run.total_steps:.2g}")
    return f"--set train.num_train_epochs={epochs:g}"


def _rate(run: RunFacts, factor: float) -> str:
    kind = "" if run.method_given else "--set method.kind=full "
    return f"{kind}--set method.learning_rate={float(f'{factor * run.learning_rate:.2g}'):g}"
