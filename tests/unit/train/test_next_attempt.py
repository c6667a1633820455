"""What is tried after an attempt that failed, as tables: fallbacks, their order, what is kept, what is said."""

from __future__ import annotations

from typing import Any

import pytest

from fulltune.records.plan import Plan, Setting
from fulltune.records.training import Outcome
from fulltune.train.parent.next_attempt import (
    MAX_UNCHANGED,
    NextAttempt,
    killed_too_often_message,
    out_of_memory_messages,
    plan_next_attempt,
)
from tests.plans import MIB, need, outcome, plan, recipe

TRIED = ("micro_batch_size", "eval_batch_size", "activation_checkpointing", "chunked_loss", "optim")


def walk(recipe: Any, start: Plan, phase: str | None = "step", **facts: Any) -> list[NextAttempt]:
    """All changes until nothing is left, when every attempt runs out at the same place."""
    present, history, changes = start, [], []
    while True:
        history.append(outcome("out_of_memory", len(history) + 1, phase=phase))
        change = plan_next_attempt(recipe, present, history, facts.get("need", lambda plan: None))
        if change is None:
            return changes
        assert change.resume
        changes.append(change)
        present = change.plan
        product = present.micro_batch_size * present.gradient_accumulation_steps * present.num_processes
        assert product == present.global_batch_size == start.global_batch_size, "the global batch changed"
        assert present.eval_batch_size >= 1
        assert len(changes) < 20, "no end"


def steps(changes: list[NextAttempt], start: Plan) -> list[Any]:
    """What each change changed: the new micro or eval batch, or the name of the field."""
    values: list[Any] = []
    before = start
    for change in changes:
        changed = [name for name in TRIED if getattr(change.plan, name) != getattr(before, name)]
        name = changed[0] if changed else "the same"
        values.append(getattr(change.plan, name) if name.endswith("batch_size") else name)
        before = change.plan
    return values


@pytest.mark.parametrize(
    ("global_batch", "processes", "sizes"),
    [(8, 1, [4, 2, 1]), (12, 1, [6, 3, 1]), (25, 1, [5, 1]), (1, 1, []), (16, 2, [4, 2, 1]), (7, 1, [1])],
)
def test_a_step_halves_the_micro_batch_then_recomputes_then_takes_8_bit_states(
    global_batch: int, processes: int, sizes: list[int]
) -> None:
    start = plan(global_batch_size=global_batch, micro_batch_size=global_batch // processes, num_processes=processes)

    assert steps(walk(recipe(), start), start) == [*sizes, "activation_checkpointing", "optim"]
    assert steps(walk(recipe("causal-lm"), start), start) == [
        *sizes,
        "chunked_loss",
        "activation_checkpointing",
        "optim",
    ]


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        (None, [4, 2, 1, "activation_checkpointing", "optim"]),
        ("step", [4, 2, 1, "activation_checkpointing", "optim"]),
        ("evaluation", [8, 4, 2, 1, "optim"]),
        ("saving", ["the same", "optim"]),
        ("resuming", ["the same", "optim"]),
        ("loading", ["the same"]),
    ],
)
def test_each_part_of_an_attempt_has_its_own_remedies(phase: str | None, expected: list[Any]) -> None:
    assert steps(walk(recipe(), plan(), phase), plan()) == expected


@pytest.mark.parametrize(
    ("task", "train", "start", "expected"),
    [
        ("text-classification", {"activation_checkpointing": False}, {}, ["optim"]),
        ("text-classification", {"optim": "adamw_torch"}, {"optim": "adamw_torch"}, ["activation_checkpointing"]),
        ("text-classification", {"optim": "adafactor"}, {"optim": "adafactor"}, ["activation_checkpointing"]),
        ("seq2seq", {"chunked_loss": False}, {}, ["activation_checkpointing", "optim"]),
        ("seq2seq", {"chunked_loss": True}, {"chunked_loss": True}, ["activation_checkpointing", "optim"]),
        (
            "causal-lm",
            {"activation_checkpointing": True},
            {"activation_checkpointing": True},
            ["chunked_loss", "optim"],
        ),
        (
            "token-classification",
            {},
            {"weights_dtype": "bf16", "optim": "adamw_bf16"},
            ["activation_checkpointing", "optim"],
        ),
        ("text-classification", {}, {"optim": "adamw_8bit"}, ["activation_checkpointing"]),
    ],
)
def test_what_the_recipe_gives_is_kept(
    task: str, train: dict[str, Any], start: dict[str, Any], expected: list[Any]
) -> None:
    first = plan(micro_batch_size=1, gradient_accumulation_steps=8, **start)

    assert steps(walk(recipe(task, train=train), first), first) == expected


def test_micro_and_eval_batch_are_halved_also_where_the_recipe_gives_them() -> None:
    fixed = recipe(train={"micro_batch_size": 8, "global_batch_size": 8}, evaluate={"batch_size": 16})

    assert walk(fixed, plan())[0].plan.micro_batch_size == 4
    assert walk(fixed, plan(), "evaluation")[0].plan.eval_batch_size == 8


def deepspeed(**values: Any) -> dict[str, Any]:
    return {"extra": {"deepspeed": {"zero_optimization": {"stage": 2}, **values}}}


def test_deepspeed_keeps_its_own_micro_batch_and_optimizer() -> None:
    fixed = recipe(train=deepspeed(train_micro_batch_size_per_gpu=8))

    assert steps(walk(fixed, plan()), plan()) == ["activation_checkpointing"]
    assert steps(walk(recipe(train=deepspeed()), plan()), plan()) == [4, 2, 1, "activation_checkpointing"]


# ---- how far at once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "requested", "expected"),
    [
        (0, 0, 4),  # nothing known: half
        (900, 0, 4),  # 400 + 4 x 100 fit
        (700, 0, 2),
        (500, 0, 1),
        (500, 200, 2),  # with what was asked for
        (100, 0, 1),  # too little for any: the smallest
    ],
)
def test_the_micro_batch_falls_as_far_as_the_shortage_says(used: int, requested: int, expected: int) -> None:
    reason = f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {requested * MIB} bytes."
    last = outcome("out_of_memory", phase="step", memory_growth_bytes=used * MIB, reason=reason)

    change = plan_next_attempt(recipe("causal-lm"), plan(), [last], need)

    assert change is not None
    assert change.plan.micro_batch_size == expected
    assert change.plan.eval_batch_size == 2 * expected


# ---- killed ----------------------------------------------------------------------------------------------------


def test_killed_goes_on_as_it_was_some_times_and_is_never_taken_for_memory() -> None:
    why = "the training process was killed (SIGKILL)"
    killed = outcome("killed", phase="evaluation", reason=why)
    reason = f"{why}; resuming from the last undamaged checkpoint"
    for kills in range(1, MAX_UNCHANGED["killed"] + 1):
        assert plan_next_attempt(recipe(), plan(), [killed] * kills) == NextAttempt(plan(), True, reason)
    assert plan_next_attempt(recipe(), plan(), [killed] * (MAX_UNCHANGED["killed"] + 1)) is None
    for fact in (why, "5 times in this command", "without a sign that memory", "train.micro_batch_size"):
        assert fact in killed_too_often_message(killed)


def test_killed_before_does_not_make_memory_of_another_attempt_worse() -> None:
    history = [outcome("killed", phase="saving"), outcome("out_of_memory", 2, phase="saving")]
    change = plan_next_attempt(recipe(), plan(), history)
    assert change is not None
    assert change.plan == plan(), "once more as it was, as after the first shortage"


def test_hung_is_tried_once_as_it_was() -> None:
    hung = outcome("hung", reason="it sent no heartbeat")
    assert plan_next_attempt(recipe(), plan(), [hung]) == NextAttempt(
        plan(), True, "it sent no heartbeat; resuming from the last undamaged checkpoint"
    )
    assert plan_next_attempt(recipe(), plan(), [hung, hung]) is None


@pytest.mark.parametrize("status", ["crashed", "stopped_by_guard", "disk_full"])
def test_other_failures_are_not_tried_again(status: str) -> None:
    assert plan_next_attempt(recipe(), plan(), [outcome(status)]) is None


def test_a_shortage_that_passes_while_saving_costs_nothing_but_a_second_one_does() -> None:
    """The shortage of another part of an attempt is another one."""
    saving = outcome("out_of_memory", phase="saving")
    history: list[Outcome] = [outcome("out_of_memory", phase="step"), saving]

    again = plan_next_attempt(recipe(), plan(), history)
    second = plan_next_attempt(recipe(), plan(), [*history, saving])

    assert again is not None
    assert again.plan == plan()
    assert second is not None
    assert second.plan.optim == "adamw_8bit"


# ---- what is said and kept -------------------------------------------------------------------------------------


def test_reason_says_what_was_short_and_what_changes() -> None:
    reason = f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {90 * MIB} bytes."
    last = outcome("out_of_memory", phase="step", memory_growth_bytes=1100 * MIB, reason=reason)

    change = plan_next_attempt(recipe("causal-lm"), plan(memory=need(plan())), [last], need)

    assert change is not None
    assert change.reason == (
        "memory ran out in a training step with 1.07 GiB in use when 90 MiB more was requested (largest planned "
        "part: logits, 480 MiB); micro batch 4 instead of 8, with the same global batch of 8"
    )
    assert change.plan.memory == need(change.plan)


def test_settings_keep_what_was_planned_with_its_reason() -> None:
    settings = (
        Setting(name="train.seed", value=42, reason="default", is_automatic=True),
        Setting(name="train.micro_batch_size", value=8, reason="from the recipe", is_automatic=False),
    )

    changes = walk(recipe(), plan(settings=settings))

    by_name = {setting.name: setting for setting in changes[1].plan.settings}
    assert by_name["train.seed"] == settings[0]
    assert by_name["train.micro_batch_size"] == Setting(
        name="train.micro_batch_size",
        value=2,
        reason="planned 8 (from the recipe); memory ran out in a training step of attempt 2",
        is_automatic=True,
    )
    assert by_name["gradient accumulation"].value == 4
    assert by_name["evaluate.batch_size"].value == 4
    assert changes[-1].plan.settings[-1].reason == (
        "planned adamw_torch_fused (default); memory ran out in a training step of attempt 5"
    )


def test_message_at_the_end_shows_every_fallback() -> None:
    fixed = recipe("causal-lm", train={"optim": "adafactor", "chunked_loss": False})
    last = plan(micro_batch_size=1, gradient_accumulation_steps=8, activation_checkpointing=True, optim="adafactor")
    last = last.model_copy(update={"memory": need(last)})
    failed = outcome("out_of_memory", 3, phase="step", reason="MemoryError", memory_growth_bytes=400 * MIB)

    lines = out_of_memory_messages(fixed, last, failed, ["first change", "second change"])

    assert lines == [
        "memory ran out in a training step with 400 MiB in use (largest planned part: optimizer, 200 MiB): MemoryError",
        "tried: first change",
        "tried: second change",
        "not possible: smaller micro batch: already at its smallest value",
        "not possible: chunked loss: the recipe sets train.chunked_loss: false",
        "not possible: activation checkpointing: already on",
        "not possible: 8-bit AdamW states: the recipe sets train.optim: adafactor",
        "not possible: offload: without a GPU, everything is already in host memory",
        "what may help: train.chunked_loss: true; train.optim: adamw_8bit; model.weights_dtype: bf16; "
        "data.max_length: 256; a smaller model",
    ]
