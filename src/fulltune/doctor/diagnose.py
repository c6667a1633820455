"""From a log to findings: pure functions of curves, by the guards' and the report's own rules."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fulltune.doctor.log import Log
from fulltune.report.format.plots import Point
from fulltune.report.run.fitting import LEAST_EVALUATIONS, Curves, at_ceiling, fitting
from fulltune.text import counted, first_few, format_number, format_share, listed
from fulltune.train.loop.guards import diverged, ended_high, rate_factor, without_cause
from fulltune.train.loop.step_guard import StepMemory, judge

FEW_STEPS = 100
FLAT = 0.03
"""Share of its beginning by which a loss has to fall to have learned something."""
VANISHED = 1e-3
"""Gradient norm as a share of what it was in the first steps."""
LEAST = 8
"""Readings below which nothing is said of a curve's shape."""
_CALIBRATE = "'fulltune run' calibrates the probabilities; where it is open, more eval rows tell of the answers"
EATEN = 0.5
"""Share of the values with a gradient below which updates were lost."""


@dataclass(frozen=True)
class Diagnosis:
    """Something that went wrong, or that nothing did."""

    name: str
    evidence: str
    advice: str = ""


def diagnose(log: Log) -> tuple[Diagnosis, ...]:
    """What the log tells, the gravest first; one finding that all is well where nothing is found."""
    # What a guard has said of a run of fulltune goes first: it saw more than the curves.
    told = log.outcome is not None and log.outcome.status in ("diverged", "spiked")
    height = [] if told else [*_height(log)]
    # Of a loss that ran away nothing else is told.
    # One remedy after the other: what a flat or ruined curve would say besides is of no use.
    shape = [] if height or told else [*_worse(log)] or [*_flat(log)] or [*_unfit(log), *_length(log)]
    found = [*_ended(log), *height, *shape, *_held(log), *_steps(log), *_eaten(log)]
    return tuple(found) or (_sound(log),)


def _sound(log: Log) -> Diagnosis:
    """That nothing was found, as far as there is anything to see."""
    if len(log.train_loss) < LEAST:
        return Diagnosis("too little to tell", f"{counted(len(log.train_loss), 'reading')} of the train loss")
    unseen = "" if len(log.eval_loss) >= LEAST_EVALUATIONS else "; with so few evaluations over-fitting cannot be seen"
    return Diagnosis("sound", f"the curves show nothing that went wrong{unseen}")


def _ended(log: Log) -> Iterator[Diagnosis]:
    """How the run ended, where it did not end well."""
    outcome = log.outcome
    if outcome is None and log.rate is not None:  # of a run folder
        evidence = f"{log.steps:,} of {log.total_steps:,} steps, and no outcome: it is still running, or was killed"
        yield Diagnosis("unfinished", evidence, "if it was killed, the same command continues it")
    if outcome is None or outcome.status == "done":
        return
    if outcome.status in ("diverged", "spiked"):
        lower = _rate(log, rate_factor(log.rollbacks) / 10)
        yield Diagnosis("diverged", without_cause(outcome.reason), f"a lower rate: {lower}")
    else:
        advice = "the same command continues it" if outcome.status == "interrupted" else ""
        yield Diagnosis(outcome.status.replace("_", " "), outcome.reason, advice)


def _height(log: Log) -> Iterator[Diagnosis]:
    """A loss that is not finite, or that left the place where it began."""
    lower = _rate(log, 1 / 10)
    # Norms that are not finite now and then are fp16's scaler at work, which leaves such updates out.
    norms = log.grad_norm if _mostly_lost(log.grad_norm) else ()
    series = {"train loss": log.train_loss, "gradient norm": norms, "eval loss": log.eval_loss}
    for name, points in series.items():
        if lost := [step for step, value in points if not math.isfinite(value)]:
            evidence = f"the {name} is not finite at {counted(len(lost), 'reading')}, first at step {lost[0]:,}"
            yield Diagnosis("diverged", evidence, f"look at the rows of that step; a lower rate: {lower}")
            return
    losses, evals = [value for _, value in log.train_loss], [value for _, value in log.eval_loss]
    rate = max((value for _, value in log.learning_rate), default=0.0)
    for judged in (diverged(losses, rate), ended_high(losses, evals, rate)):
        if judged.action != "go on":
            yield Diagnosis("diverged", without_cause(judged.reason), f"a lower rate: {lower}")
            return


def _mostly_lost(points: Sequence[Point]) -> bool:
    last = points[-LEAST:]
    return sum(not math.isfinite(value) for _, value in last) * 2 > len(last)


def _flat(log: Log) -> Iterator[Diagnosis]:
    """A loss that hardly fell."""
    losses = [value for _, value in log.train_loss if math.isfinite(value)]
    size = len(losses) // 4
    if len(losses) < LEAST or not size:
        return
    began, ended = statistics.median(losses[:size]), statistics.median(losses[-size:])
    if not 0 < (1 - FLAT) * began < ended < (1 + FLAT) * began:
        return
    evidence = f"the train loss stayed where it began: {format_number(began)}, and {format_number(ended)} at the end"
    norms = [value for _, value in log.grad_norm if math.isfinite(value)]
    if len(norms) >= LEAST and statistics.median(norms[-size:]) < VANISHED * max(norms[:size]):
        said = f"{evidence}; the gradients vanished ({norms[0]:.2g} to {norms[-1]:.2g})"
        yield Diagnosis("plateau", said, f"a lower rate with a longer warm-up: {_rate(log, 1 / 3)}, or another seed")
        return
    yield Diagnosis("plateau", evidence, f"a higher rate: {_rate(log, 3)}; are the labels those of these rows?")


def _worse(log: Log) -> Iterator[Diagnosis]:
    """A model that was better before it was trained."""
    fit = fitting(_curves(log))
    if fit.kind == "got worse":
        evidence = fit.sentences[0].partition(": ")[2].rstrip(".")
        yield Diagnosis("got worse", evidence, f"a lower rate: {_rate(log, 1 / 10 if fit.turn == 0 else 1 / 3)}")


def _unfit(log: Log) -> Iterator[Diagnosis]:
    """Over- and under-fitting."""
    fit = fitting(_curves(log))
    if fit.kind not in ("sound", "not known"):
        said = " ".join(one for one in fit.sentences if one).split(": ", 1)[-1]
        evidence, _, helps = said.partition(" What helps: ")
        yield Diagnosis(fit.kind, evidence.rstrip("."), helps.rstrip(".") or _CALIBRATE)


def _curves(log: Log) -> Curves:
    return Curves(
        train_loss=log.train_loss,
        eval_loss=log.eval_loss,
        metric=log.metric,
        metric_name=log.metric_name,
        greater_is_better=log.greater_is_better,
        eval_rows=log.eval_rows,
        epochs_per_step=log.epochs / log.steps if log.steps else 0.0,
        kept_step=log.kept_step,
        before=log.before,
    )


def _held(log: Log) -> Iterator[Diagnosis]:
    """A model that is not the trained one, because it would have forgotten too much."""
    evidence, helps = log.held_back
    if evidence:
        yield Diagnosis("held back", evidence, helps)


def _steps(log: Log) -> Iterator[Diagnosis]:
    """Steps that were skipped or taken back, or that would have been."""
    if log.skipped or log.rollbacks:
        places = [f"step {step:,}" if step else "the beginning" for step in dict.fromkeys(log.rollbacks)]
        often = f"{len(log.rollbacks)} times, " if len(log.rollbacks) > 1 else ""
        parts = [f"{counted(len(log.skipped), 'step')} skipped"] * bool(log.skipped)
        lower = rate_factor(log.rollbacks)
        at = "" if lower == 1 else f"; the last time on at {lower:g} of the planned rate"
        evidence = "; ".join([*parts, *[f"rolled back {often}to {listed(places)}{at}"] * bool(places)])
        advice = "the journal in the report names the rows: look at them"
        yield Diagnosis("bad steps", evidence, advice if log.skipped else "")
        return
    norms, memory, suspects = dict(log.grad_norm), StepMemory(), []
    for number, (step, loss) in enumerate(log.train_loss, start=1):
        judged = judge(memory, number, loss, norms.get(step))
        memory = judged.seen
        if judged.action == "skip" and judged.is_finite:
            suspects.append(step)
    if suspects:
        named = first_few([f"{step:,}" for step in suspects])
        evidence = f"loss and gradient norm were both far above the usual at step {named}"
        advice = "look at the rows of these steps; 'fulltune run' skips such steps by itself"
        yield Diagnosis("bad rows", evidence, advice)


def _eaten(log: Log) -> Iterator[Diagnosis]:
    """Updates that rounding lost."""
    moved = log.outcome.moved if log.outcome else None
    if moved is not None and moved.share < EATEN:
        evidence = f"only {format_share(moved.share)} of the values that received a gradient moved"
        advice = "fp32 weights, --set model.weights_dtype=fp32, or --set train.bf16_rounding=stochastic"
        yield Diagnosis("eaten updates", evidence, advice)


def _length(log: Log) -> Iterator[Diagnosis]:
    """A run that was too short."""
    losses = log.train_loss
    unfinished = log.outcome is not None and log.outcome.status != "done"
    if unfinished or not losses or log.steps >= FEW_STEPS or (log.total_steps and log.steps < log.total_steps):
        return
    best = _best(log.metric, log.greater_is_better)
    if at_ceiling(log.metric_name, log.metric) or fitting(_curves(log)).kind.startswith("over-"):
        return
    if best is not None and best == log.metric[-1][0]:
        evidence = f"{counted(log.steps, 'step')} in all, and the eval rows were answered best at the last evaluation"
        yield Diagnosis("too few steps", evidence, "three times as many steps or epochs")


def _best(points: Sequence[Point], greater_is_better: bool) -> int | None:
    finite = [point for point in points if math.isfinite(point[1])]
    sign = 1 if greater_is_better else -1
    return max(finite, key=lambda point: sign * point[1])[0] if finite else None


def _rate(log: Log, factor: float) -> str:
    """The setting of another rate, or that rate alone."""
    rate = log.rate or max((value for _, value in log.learning_rate if math.isfinite(value)), default=0.0)
    if not rate:
        return f"{factor:.2g} times the rate"
    found = f"{float(f'{factor * rate:.2g}'):g}"
    return f"--set method.learning_rate={found}" if log.rate else found
