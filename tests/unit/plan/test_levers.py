"""The one table of what saves memory: its five users filter and order it, and every setting in it exists."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from fulltune.plan import choose, levers, ways_out
from fulltune.plan.levers import LEVERS, SETTING_OF, Lever
from fulltune.records.plan import MemoryNeed, MemorySettings, Phase, Plan
from fulltune.train.parent import measure
from fulltune.train.parent.next_attempt import memory_fallbacks
from tests import plans

RECIPE = plans.recipe("causal-lm", train={"max_grad_norm": 0})
SETTINGS = MemorySettings(micro_batch_size=8, longest_tokens=1024, eval_batch_size=16)
PLAN = plans.plan(device="cuda")


def needs_less_with(changes: dict[str, Any]) -> Callable[[MemorySettings], MemoryNeed]:
    """999 bytes with all of these, else 1,000."""

    def need(settings: MemorySettings) -> MemoryNeed:
        has_all = all(getattr(settings, name) == value for name, value in changes.items())
        size = 999 if has_all else 1000
        return MemoryNeed(kinds={"weights": size}, phases={"step": size})

    return need


@pytest.mark.parametrize("lever", LEVERS, ids=lambda lever: lever.name)
def test_settings_of_a_lever_exist(lever: Lever) -> None:
    for name in filter(None, (lever.setting, lever.also)):
        block, _, field = name.partition(".")
        assert field.partition(".")[0] in type(getattr(RECIPE, block)).model_fields, name
    assert {*lever.fallback} <= {*get_args(Phase)}
    assert len({one.name for one in LEVERS}) == len(LEVERS)


@pytest.mark.parametrize("field", SETTING_OF)
def test_fields_that_levers_change_are_those_of_plans_and_recipes(field: str) -> None:
    assert field in Plan.model_fields or field == "longest_tokens"
    block, _, name = SETTING_OF[field].partition(".")
    assert not name or name.partition(".")[0] in type(getattr(RECIPE, block)).model_fields


@pytest.mark.parametrize("lever", LEVERS, ids=lambda lever: lever.name)
def test_lever_is_where_its_flags_say(lever: Lever, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways_out, "MAX_WAYS", 99)
    for phase in get_args(Phase):
        offered = [name for name, *_ in memory_fallbacks(RECIPE, PLAN, phase, lambda changes: True)]
        assert (lever.name in offered) == (phase in lever.fallback)
    if lever.why_unusable(RECIPE, PLAN if lever.fallback else SETTINGS):
        return
    changes = lever.apply(RECIPE, SETTINGS)[-1]

    need = needs_less_with(changes)
    basis: Any = SimpleNamespace(
        recipe=RECIPE, start=SETTINGS, rows_per_process=8, memory_need=need, available_bytes=999
    )
    option = choose.lowest_memory_settings(basis)
    # Every micro batch is tried, and the eval batch follows.
    assert (option.memory.peak == 999) == (lever.searched or not lever.respects_recipe)

    ways = [way.costs for way in ways_out.memory_ways_out(basis, SETTINGS)]
    assert (lever.costs in ways) == lever.way_out

    rows = [row.name for row in measure.speedups_to_measure(RECIPE, PLAN)]
    assert (f"+ {lever.measured.format(**changes)}" in rows) == bool(lever.measured)

    assert any(one.startswith(f"{lever.setting}: ") for one in levers.memory_savings(RECIPE, PLAN, "step")) or (
        not lever.way_out
    )
