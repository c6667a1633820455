from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fulltune.recipe.fields import Recipe
from fulltune.recipe.training import ENGINE_SETTINGS
from fulltune.records.plan import Setting

FROM_RECIPE = "from the recipe"
PLACEMENT, OFFLOAD = "train.placement", "train.offload"
WHERE = (PLACEMENT, OFFLOAD, ENGINE_SETTINGS)


def recipe_value(recipe: Recipe, name: str) -> Any:
    """Return the value that the recipe sets explicitly, or None for a default or `auto`."""
    block, _, field = name.partition(".")
    values = getattr(recipe, block)
    if name == ENGINE_SETTINGS:
        return values.engine_settings
    value = getattr(values, field) if field in values.model_fields_set else None
    return None if value == "auto" else value


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """Return a copy of the recipe with new values for these settings."""
    for name, value in settings.items():
        block, _, field = name.partition(".")
        values = getattr(recipe, block)
        own = name == ENGINE_SETTINGS
        changed = values.with_engine_settings(value) if own else values.model_copy(update={field: value})
        recipe = recipe.model_copy(update={block: changed})
    return recipe


class Reasons:
    """Collects a plan's settings with their values and reasons."""

    def __init__(self) -> None:
        self.settings: list[Setting] = []

    def add(self, name: str, from_recipe: Any, default: Any = None, reason: str = "", caveat: str = "") -> Any:
        """Record and return the recipe's value, or `default` if the recipe has none. `caveat` is appended to the
        reason."""
        value, why = (from_recipe, FROM_RECIPE) if from_recipe is not None else (default, reason)
        self.settings.append(Setting(name=name, value=value, reason=why + caveat, is_automatic=from_recipe is None))
        return value

    def replace(self, name: str, value: Any, reason: str) -> None:
        place = next(i for i, setting in enumerate(self.settings) if setting.name == name)
        self.settings[place] = Setting(name=name, value=value, reason=reason, is_automatic=True)
