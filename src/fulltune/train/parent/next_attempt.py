"""What to try after an attempt that failed, as pure functions: smaller, or back to a healthy checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fulltune.plan.levers import LEVERS, SETTING_OF, Changes, what_helps
from fulltune.recipe.fields import Recipe
from fulltune.records.plan import MemoryNeed, Phase, Plan, Setting
from fulltune.records.training import Outcome, OutcomeStatus
from fulltune.stats.curves import without_cause
from fulltune.system.memory import asked_bytes
from fulltune.text import format_bytes
from fulltune.train.loop.step_guard import rate_factor

MOST: dict[OutcomeStatus, int] = {"hung": 1, "killed": 4, "lost": 20}
"""How often a command goes on as it was. Machines that can be taken away at any time are lost more often than processes
are killed."""
_MARK = "; memory ran out"
_WHERE: dict[Phase | None, str] = {
    None: "",
    "loading": " while the model was loaded",
    "step": " in a training step",
    "evaluation": " in an evaluation",
    "saving": " while saving",
    "resuming": " while resuming",
}
_WORTH_NAMING = 2**20
_TELLING = 64 * 2**20
"""Less growth is in the noise of the libraries, and says nothing about what would fit."""
_NO_SECOND = "functions of your own train in this process, which allows no second attempt"


Need = Callable[[Plan], MemoryNeed | None]
"""The plan stage's arithmetic for a changed plan; None where it does not know."""


@dataclass(frozen=True)
class NextAttempt:
    """The next attempt: its plan, whether it continues from the last whole checkpoint, and why."""

    plan: Plan
    resume: bool
    reason: str = ""


def unknown(plan: Plan) -> None:
    """A `Need` without arithmetic."""
    return None


def next_attempt(recipe: Recipe, plan: Plan, history: Sequence[Outcome], need: Need = unknown) -> NextAttempt | None:
    """Choose the remedy for the last outcome of this command's attempts, or None when there is none."""
    last = history[-1]
    if sum(outcome.status == last.status for outcome in history) <= MOST.get(last.status, 0):
        there = " when all machines are there" if last.status == "lost" else ""
        return NextAttempt(plan, True, f"{last.reason}; going on from the last whole checkpoint{there}")
    if last.status != "out_of_memory":
        return None
    seen = sum(outcome.status == "out_of_memory" and outcome.phase == last.phase for outcome in history)
    if last.phase in ("loading", "saving", "resuming") and seen == 1:
        return NextAttempt(
            plan, True, f"{short_of(last, plan)}; retrying once unchanged, in case another process used the memory"
        )

    def fits(changes: Changes) -> bool:
        if last.memory_growth_bytes < _TELLING:
            return True
        known = need(plan.model_copy(update=changes))
        return known is None or known.phases["step"] <= last.memory_growth_bytes + asked_bytes(last.reason)

    for _, changes, text in fallbacks(recipe, plan, last.phase, fits):
        if changes is not None:
            reason = f"{short_of(last, plan)}; {text}"
            return NextAttempt(_changed(plan, last, changes, need), True, reason)
    return None


def _changed(plan: Plan, last: Outcome, changes: Changes, need: Need) -> Plan:
    def reason(old: Setting) -> str:
        planned = old.reason.partition(_MARK)[0] if _MARK in old.reason else f"planned {old.value} ({old.reason})"
        return f"{planned}{_MARK}{_WHERE[last.phase]} of attempt {last.attempt}"

    after = plan.model_copy(update=changes)
    after = after.model_copy(update={"memory": need(after), "time": None, "settings": noted(plan, changes, reason)})
    if after.memory is not None and after.optim != plan.optim:
        state = plan.state | {"optimizer": after.memory.kinds["optimizer"]}
        after = after.model_copy(update={"state": state})
    return after


def short_of(outcome: Outcome, plan: Plan) -> str:
    """Where memory ran out, what was held and asked for then, and which tensors took most, as far as they are known."""
    parts = [f"memory ran out{_WHERE[outcome.phase]}"]
    if outcome.memory_growth_bytes >= _WORTH_NAMING:
        parts.append(f"with {format_bytes(outcome.memory_growth_bytes)} held")
    if (asked := asked_bytes(outcome.reason)) >= _WORTH_NAMING:
        parts.append(f"when {format_bytes(asked)} more were asked for")
    words = " ".join(parts)
    if plan.memory is None or outcome.phase not in (None, "step"):
        return words
    largest = plan.memory.largest
    return f"{words} (by the plan most for {largest}: {format_bytes(plan.memory.kinds[largest])})"


def noted(plan: Plan, changes: Changes, reason: Callable[[Setting], str]) -> tuple[Setting, ...]:
    """The plan's settings with new values and their reasons, which follow from the old ones; a setting that the plan
    does not name and that stays as it was needs no line."""
    present = {setting.name: setting for setting in plan.settings}
    for field, value in changes.items():
        name, before = SETTING_OF[field], getattr(plan, field)
        old = present.get(name) or Setting(name=name, value=before, reason="default", is_automatic=True)
        if name in present or value != before:
            is_automatic = old.is_automatic or value != old.value
            present[name] = Setting(name=name, value=value, reason=reason(old), is_automatic=is_automatic)
    return tuple(present.values())


def killed_too_often(last: Outcome) -> str:
    """What a person reads when something kills the training again and again."""
    return (
        f"{last.reason}; so it was {MOST['killed'] + 1} times in this command, without a sign that memory ran out: a "
        "person, a scheduler or a watcher of memory (earlyoom, systemd-oomd) may do that; see to that, then the same "
        "command goes on from the last checkpoint, or, if memory is short, with a smaller train.micro_batch_size"
    )


def no_way_out(recipe: Recipe, plan: Plan, last: Outcome, tried: Sequence[str]) -> list[str]:
    """What a person reads when memory ran out and nothing is left to change: what was tried, what was not and why."""
    lines = [f"{short_of(last, plan)}: {last.reason}"]
    lines += [f"tried: {reason}" for reason in tried]
    for name, changes, text in fallbacks(recipe, plan, last.phase, lambda changes: True):
        lines.append(f"not possible: {name}: {text}" if changes is None else f"not tried: {name}: {_NO_SECOND}")
    lines.append(f"what may help: {'; '.join([*what_helps(recipe, plan, last.phase or 'step'), 'a smaller model'])}")
    return lines


# ---- back to a healthy checkpoint ------------------------------------------------------------------------------------


def roll_back(plan: Plan, most: int, outcome: Outcome, healthy_step: int) -> NextAttempt | None:
    """The attempt after one that spiked; None: going back does not help, or was done often enough."""
    since = outcome.first_bad_step
    # Since step 1: no healthy checkpoint exists, and starting over would spike again.
    if outcome.status != "spiked" or since is None or since <= 1 or len(plan.rollbacks) >= most:
        return None
    rollbacks = (*plan.rollbacks, healthy_step)
    lower = rate_factor(rollbacks)
    at = "at the same rate" if lower == 1 else f"at {lower:g} of the planned rate ({plan.learning_rate * lower:.3g})"
    going = f"back to the checkpoint of step {healthy_step:,}, on" if healthy_step else "starting over"
    said = (
        f"{without_cause(outcome.reason)}; {going} {at} with the rows in another order "
        f"(rollback {len(rollbacks)} of at most {most})"
    )
    return NextAttempt(plan.model_copy(update={"rollbacks": rollbacks}), resume=healthy_step > 0, reason=said)


# ---- when memory ran out ---------------------------------------------------------------------------------------------


def fallbacks(
    recipe: Recipe, plan: Plan, phase: Phase | None, fits: Callable[[Changes], bool]
) -> Iterator[tuple[str, Changes | None, str]]:
    """What helps in this phase of an attempt (None: a step), the mildest first; what the recipe gives is kept: a name,
    the changes and what they are, or None and why they are not to be had."""
    for lever in LEVERS:
        if (phase or "step") not in lever.fallback:
            continue
        if refusal := lever.refusal(recipe, plan):
            yield lever.name, None, refusal
            continue
        options = [_with_eval_batch(plan, changes) for changes in lever.apply(recipe, plan)]
        changes = next((one for one in options if fits(one)), options[-1])
        yield lever.name, changes, lever.done.format(now=plan, **changes)


def _with_eval_batch(plan: Plan, changes: Changes) -> Changes:
    """The eval batch falls with the micro batch: it is twice as large by default."""
    size = changes.get("micro_batch_size")
    if size is None:
        return changes
    return {**changes, "eval_batch_size": max(1, plan.eval_batch_size * size // plan.micro_batch_size)}
