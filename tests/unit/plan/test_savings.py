"""The one table of what saves memory: its five users filter and order it, and every setting in it exists."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from fulltune.plan import alternatives, choose, savings
from fulltune.plan.savings import MEMORY_SAVINGS, SETTING_OF, MemorySaving
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


@pytest.mark.parametrize("saving", MEMORY_SAVINGS, ids=lambda saving: saving.name)
def test_settings_of_a_saving_exist(saving: MemorySaving) -> None:
    for name in filter(None, (saving.setting, saving.also)):
        block, _, field = name.partition(".")
        assert field.partition(".")[0] in type(getattr(RECIPE, block)).model_fields, name
    assert {*saving.fallback} <= {*get_args(Phase)}
    assert len({one.name for one in MEMORY_SAVINGS}) == len(MEMORY_SAVINGS)


@pytest.mark.parametrize("field", SETTING_OF)
def test_fields_that_savings_change_are_those_of_plans_and_recipes(field: str) -> None:
    assert field in Plan.model_fields or field == "longest_tokens"
    block, _, name = SETTING_OF[field].partition(".")
    assert not name or name.partition(".")[0] in type(getattr(RECIPE, block)).model_fields


@pytest.mark.parametrize("saving", MEMORY_SAVINGS, ids=lambda saving: saving.name)
def test_saving_is_where_its_flags_say(saving: MemorySaving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alternatives, "MAX_ALTERNATIVES", 99)
    for phase in get_args(Phase):
        offered = [name for name, *_ in memory_fallbacks(RECIPE, PLAN, phase, lambda changes: True)]
        assert (saving.name in offered) == (phase in saving.fallback)
    if saving.why_unusable(RECIPE, PLAN if saving.fallback else SETTINGS):
        return
    changes = saving.apply(RECIPE, SETTINGS)[-1]

    need = needs_less_with(changes)
    basis: Any = SimpleNamespace(
        recipe=RECIPE, start=SETTINGS, rows_per_process=8, memory_need=need, available_bytes=999
    )
    option = choose.lowest_memory_settings(basis)
    # Every micro batch is tried, and the eval batch follows.
    assert (option.memory.peak == 999) == (saving.is_automatic or not saving.respects_recipe)

    ways = [way.costs for way in alternatives.propose_for_memory(basis, SETTINGS)]
    assert (saving.costs in ways) == saving.is_proposed

    rows = [row.name for row in measure.speedups_to_measure(RECIPE, PLAN)]
    assert (f"+ {saving.measured.format(**changes)}" in rows) == bool(saving.measured)

    assert any(
        one.startswith(f"{saving.setting}: ") for one in savings.suggest_memory_savings(RECIPE, PLAN, "step")
    ) or (not saving.is_proposed)


@pytest.mark.parametrize(("processes", "placement"), [(1, "stream"), (4, "fsdp2")])
def test_offloading_a_mixture_of_experts_names_a_placement_that_trains_it(processes: int, placement: str) -> None:
    plan = PLAN.changed(has_experts=True, num_processes=processes)
    refusals = {name: text for name, changes, text in memory_fallbacks(RECIPE, plan, "step", bool) if changes is None}
    assert refusals["offload"].endswith(f"set train.placement: {placement}")
    assert "zero" not in refusals["offload"]


def test_offloading_embeddings_names_a_placement_that_trains_them() -> None:
    recipe = RECIPE.model_copy(update={"task": "embedding"})
    refusals = {name: text for name, changes, text in memory_fallbacks(recipe, PLAN, "step", bool) if changes is None}
    assert (
        refusals["offload"] == "DeepSpeed is not supported for embedding; set train.placement: fsdp2 with several GPUs"
    )
