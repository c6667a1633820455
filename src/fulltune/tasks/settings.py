"""Settings of which only the data tell that they have no effect."""

from __future__ import annotations

from fulltune.errors import RecipeError
from fulltune.recipe import Recipe
from fulltune.recipe_rules import SMOOTHING
from fulltune.records import DataSummary


def check_settings_for(recipe: Recipe, summary: DataSummary) -> None:
    """Refuse what makes no sense for a label that turned out to be a number.

    Raises:
        RecipeError: Naming the setting.
    """
    if summary.problem_type == "regression" and recipe.train.label_smoothing_factor:
        raise RecipeError(SMOOTHING)
