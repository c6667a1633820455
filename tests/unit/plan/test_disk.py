"""Checkpoints that exist at once: what is planned against what the training's own callback leaves on the disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fulltune.plan import budget, changed, time
from fulltune.records.plan import MemorySettings
from fulltune.train import checkpoints
from fulltune.train.journal import Journal
from fulltune.train.loop.callbacks import Checkpoints
from tests import plans
from tests.unit.plan import sizes


def sealing(folder: Path, limit: int, journal: Journal, on_seal: Callable[[], None]) -> Checkpoints:
    """The training's own callback; `on_seal` is called when the disk is at its fullest."""
    recipe = plans.recipe(train={"save_total_limit": limit})
    plan = SimpleNamespace(stream=None)
    request: Any = SimpleNamespace(checkpoints=folder, all_initial_weights=[], recipe=recipe, plan=plan)
    usage: Any = SimpleNamespace(update_peak_disk=lambda *_: on_seal())
    return Checkpoints(request, journal, usage)


def saves(total: int, between_evaluations: int, between_saves: int) -> list[int]:
    """Steps after which the Trainer saves: at each evaluation, every so many steps, and after the last one."""
    steps = range(1, total + 1)
    return [step for step in steps if not step % between_evaluations or not step % between_saves or step == total]


def most_at_once(folder: Path, steps: list[int], limit: int, best: int) -> int:
    """Sealed checkpoints at the fullest, when the best is that of one step."""
    counts: list[int] = []
    seals = sealing(folder, limit, Journal(None), lambda: counts.append(len(list(folder.glob("checkpoint-*")))))
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(b"x")
        known = best if step >= best else steps[0]
        (checkpoint / checkpoints.STATE).write_text(json.dumps({"best_global_step": known}), encoding="utf-8")
        state = SimpleNamespace(is_world_process_zero=True, global_step=step, best_global_step=known)
        seals.on_save(SimpleNamespace(world_size=1), state, None)
    return max(counts)


@pytest.mark.parametrize(
    ("total", "between_evaluations", "between_saves", "limit", "expected"),
    [
        (15, 12, 12, 2, 2),  # an epoch and a quarter: 12 and 15
        (10, 10, 10, 2, 1),
        (5, 100, 100, 2, 1),
        (5, 4, 2, 2, 3),  # 2, 4 and 5
        (30, 10, 10, 2, 3),
        (31, 10, 10, 2, 4),  # the best of step 10, the two before, and the one being written
        (31, 10, 10, 1, 3),
        (100, 10, 10, 2, 4),
        (100, 10, 10, 5, 7),
        (100, 100, 30, 1, 3),
    ],
)
def test_planned_checkpoints_are_those_at_the_fullest_moment(
    tmp_path: Path, total: int, between_evaluations: int, between_saves: int, limit: int, expected: int
) -> None:
    written = time.count_interval_steps(total, between_evaluations, between_saves)
    recipe = plans.recipe(train={"save_total_limit": limit})

    planned = changed.with_disk_need(recipe, plans.plan(num_saves=written), 2**60, "").disk

    steps = saves(total, between_evaluations, between_saves)
    numbers = [most_at_once(tmp_path / str(n), steps, limit, best) for n, best in enumerate(steps)]
    assert planned is not None
    assert (planned.num_checkpoints, max(numbers)) == (expected, expected)


def test_partial_epochs_are_counted_by_the_plan_of_a_recipe() -> None:
    from fulltune.plan import resolve
    from fulltune.plan.settings import Reasons

    for (epochs, rows), expected in zip(product((1.0, 1.25, 2.0), (96,)), (1, 2, 2), strict=True):
        recipe = plans.recipe(train={"num_train_epochs": epochs, "global_batch_size": 8})
        steps = resolve.choose_steps(recipe, sizes.summary(recipe.task, rows, 8), 8, Reasons())
        assert time.count_interval_steps(steps.total, steps.between_evaluations, steps.between_saves) == expected


@pytest.mark.parametrize(("placement", "expected"), [("ddp", 6.1), ("fsdp2", 12.0)])
def test_shared_out_moments_of_8_bits_are_in_fp32_in_a_checkpoint(placement: str, expected: float) -> None:
    recipe = plans.recipe(train={"placement": placement, "num_processes": 2})
    settings = MemorySettings(micro_batch_size=1, longest_tokens=64, num_processes=2, optim="adamw_8bit")
    size = budget.disk_need(recipe, 10**9, settings).checkpoint_bytes - budget.SMALL_FILES_BYTES
    assert size / 10**9 == pytest.approx(expected, abs=0.1)


def test_a_checkpoint_is_sealed_in_the_phase_saving(tmp_path: Path) -> None:
    journal, seen = Journal(None), []
    journal.set_phase("step")
    seals = sealing(tmp_path, 2, journal, lambda: seen.append(journal.phase))
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / checkpoints.STATE).write_text('{"best_global_step": 1}', encoding="utf-8")
    state = SimpleNamespace(is_world_process_zero=True, global_step=1, best_global_step=1)
    seals.on_save(SimpleNamespace(world_size=1), state, None)
    assert (seen, journal.phase) == (["saving"], "step")
