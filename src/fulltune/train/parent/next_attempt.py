from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fulltune.plan.savings import MEMORY_SAVINGS, SETTING_OF, Changes, suggest_memory_savings
from fulltune.recipe.fields import Recipe
from fulltune.records.plan import MemoryNeed, Phase, Plan, Setting
from fulltune.records.training import Outcome, OutcomeStatus
from fulltune.stats.curves import without_cause
from fulltune.system.memory import requested_bytes
from fulltune.text import format_bytes
from fulltune.train.loop.step_guard import learning_rate_factor

MAX_UNCHANGED: dict[OutcomeStatus, int] = {"hung": 1, "killed": 4, "lost": 20}
"""Maximum number of resumes with an unchanged plan, by status."""
_MARK = "; memory ran out"
_WHERE: dict[Phase | None, str] = {
    None: "",
    "loading": " while the model was loaded",
    "step": " in a training step",
    "evaluation": " in an evaluation",
    "saving": " while saving",
    "resuming": " while resuming",
}
_MIN_REPORTED_BYTES = 2**20
_GROWTH_BYTES_OF_LIBRARIES = 64 * 2**20
_NO_SECOND_ATTEMPT = "with your own compute_loss, training runs in this process, so a second attempt is impossible"


EstimateMemory = Callable[[Plan], MemoryNeed | None]


@dataclass(frozen=True)
class NextAttempt:
    plan: Plan
    resume: bool
    reason: str = ""


def plan_next_attempt(
    recipe: Recipe, plan: Plan, history: Sequence[Outcome], estimate_memory: EstimateMemory = lambda plan: None
) -> NextAttempt | None:
    """Plan the attempt after the last outcome in `history`; return None if no change would help."""
    last = history[-1]
    if sum(outcome.status == last.status for outcome in history) <= MAX_UNCHANGED.get(last.status, 0):
        there = " when all machines are back" if last.status == "lost" else ""
        return NextAttempt(plan, True, f"{last.reason}; resuming from the last undamaged checkpoint{there}")
    if last.status != "out_of_memory":
        return None
    if (tiers := plan.stream) is not None and tiers.cache_bytes:
        after = plan.changed(stream=tiers.model_copy(update={"cache_bytes": 0}), time=None)
        reason = f"{describe_memory_shortage(last, plan)}; no weights stay in memory from one step to the next"
        return NextAttempt(after.changed(memory=estimate_memory(after)), True, reason)
    repeats = sum(outcome.status == "out_of_memory" and outcome.phase == last.phase for outcome in history)
    if last.phase in ("loading", "saving", "resuming") and repeats == 1:
        return NextAttempt(
            plan,
            True,
            f"{describe_memory_shortage(last, plan)}; retrying once unchanged, in case another process used the memory",
        )

    def fits(changes: Changes) -> bool:
        """Return False if the changes need more memory than was available, else True."""
        if last.memory_growth_bytes < _GROWTH_BYTES_OF_LIBRARIES:
            return True
        memory = estimate_memory(plan.model_copy(update=changes))
        return memory is None or memory.phases["step"] <= last.memory_growth_bytes + requested_bytes(last.reason)

    for _, changes, text in memory_fallbacks(recipe, plan, last.phase, fits):
        if changes is not None:
            reason = f"{describe_memory_shortage(last, plan)}; {text}"
            return NextAttempt(_changed_plan(plan, last, changes, estimate_memory), True, reason)
    return None


def _changed_plan(plan: Plan, last: Outcome, changes: Changes, estimate_memory: EstimateMemory) -> Plan:
    """Return the plan with changed settings, because of the shortage in `last`, and a new memory estimate."""

    def reason(old: Setting) -> str:
        planned = old.reason.partition(_MARK)[0] if _MARK in old.reason else f"planned {old.value} ({old.reason})"
        return f"{planned}{_MARK}{_WHERE[last.phase]} of attempt {last.attempt}"

    after = plan.model_copy(update=changes)
    after = after.model_copy(
        update={
            "memory": estimate_memory(after),
            "time": None,
            "settings": settings_with_reasons(plan, changes, reason),
        }
    )
    if after.memory is not None and after.optim != plan.optim:
        state = plan.state | {"optimizer": after.memory.kinds["optimizer"]}
        after = after.model_copy(update={"state": state})
    return after


def describe_memory_shortage(outcome: Outcome, plan: Plan) -> str:
    """Describe where memory ran out, with the bytes in use and requested."""
    parts = [f"memory ran out{_WHERE[outcome.phase]}"]
    if outcome.memory_growth_bytes >= _MIN_REPORTED_BYTES:
        parts.append(f"with {format_bytes(outcome.memory_growth_bytes)} in use")
    if (requested := requested_bytes(outcome.reason)) >= _MIN_REPORTED_BYTES:
        parts.append(f"when {format_bytes(requested)} more was requested")
    text = " ".join(parts)
    if plan.memory is None or outcome.phase not in (None, "step"):
        return text
    largest = plan.memory.largest
    return f"{text} (largest planned part: {largest}, {format_bytes(plan.memory.kinds[largest])})"


def settings_with_reasons(plan: Plan, changes: Changes, reason: Callable[[Setting], str]) -> tuple[Setting, ...]:
    """Return the plan's settings with the changed values; `reason` maps an old setting to the reason for its change."""
    present = {setting.name: setting for setting in plan.settings}
    for field, value in changes.items():
        name, before = SETTING_OF[field], getattr(plan, field)
        old = present.get(name) or Setting(name=name, value=before, reason="default", is_automatic=True)
        if name in present or value != before:
            is_automatic = old.is_automatic or value != old.value
            present[name] = Setting(name=name, value=value, reason=reason(old), is_automatic=is_automatic)
    return tuple(present.values())


def killed_too_often_message(last: Outcome) -> str:
    return (
        f"{last.reason}. This happened {MAX_UNCHANGED['killed'] + 1} times in this command, without a sign that memory "
        "ran out. A person, a scheduler or a memory watcher (earlyoom, systemd-oomd) may have killed it. Prevent that, "
        "then run the same command to resume; if memory is short, set a smaller train.micro_batch_size"
    )


def out_of_memory_messages(recipe: Recipe, plan: Plan, last: Outcome, tried: Sequence[str]) -> list[str]:
    """Return the error's lines for when memory ran out and no setting can help. `tried` lists earlier changes."""
    lines = [f"{describe_memory_shortage(last, plan)}: {last.reason}"]
    lines += [f"tried: {reason}" for reason in tried]
    for name, changes, text in memory_fallbacks(recipe, plan, last.phase, lambda changes: True):
        lines.append(f"not possible: {name}: {text}" if changes is None else f"not tried: {name}: {_NO_SECOND_ATTEMPT}")
    lines.append(
        f"what may help: {'; '.join([*suggest_memory_savings(recipe, plan, last.phase or 'step'), 'a smaller model'])}"
    )
    return lines


# ---- rollback --------------------------------------------------------------------------------------------------------


def plan_rollback(plan: Plan, max_rollbacks: int, outcome: Outcome, healthy_step: int) -> NextAttempt | None:
    """Plan the attempt after a loss spike, from step `healthy_step` (0: the start), or None if that cannot help."""
    since = outcome.first_bad_step
    # Since step 1: no healthy checkpoint exists, and starting over would spike again. A streamed state is the only one.
    if outcome.status != "spiked" or since is None or since <= 1 or len(plan.rollbacks) >= max_rollbacks:
        return None
    if plan.stream is not None:
        return None
    rollbacks = (*plan.rollbacks, healthy_step)
    lower = learning_rate_factor(rollbacks)
    at = "at the same rate" if lower == 1 else f"at {lower:g} of the planned rate ({plan.learning_rate * lower:.3g})"
    start = f"returning to the checkpoint of step {healthy_step:,} and continuing" if healthy_step else "starting over"
    reason = (
        f"{without_cause(outcome.reason)}; {start} {at} with the rows in another order "
        f"(rollback {len(rollbacks)} of at most {max_rollbacks})"
    )
    return NextAttempt(plan.model_copy(update={"rollbacks": rollbacks}), resume=healthy_step > 0, reason=reason)


# ---- when memory ran out ---------------------------------------------------------------------------------------------


def memory_fallbacks(
    recipe: Recipe, plan: Plan, phase: Phase | None, fits: Callable[[Changes], bool]
) -> Iterator[tuple[str, Changes | None, str]]:
    """Yield (name, changed settings, description) for each way to save memory in a phase (default: a step), mildest
    first. Settings are None for a way that is ruled out. `fits` returns whether changes save enough memory."""
    for saving in MEMORY_SAVINGS:
        if (phase or "step") not in saving.fallback:
            continue
        if refusal := saving.why_not_automatic(recipe, plan):
            yield saving.name, None, refusal
            continue
        options = saving.apply(recipe, plan)
        for option in options:
            if size := option.get("micro_batch_size"):
                option["eval_batch_size"] = max(1, plan.eval_batch_size * size // plan.micro_batch_size)
        changes = next((option for option in options if fits(option)), options[-1])
        yield saving.name, changes, saving.done.format(now=plan, **changes)
