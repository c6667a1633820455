"""Whether a model can do a recipe's task, and settings of which only the data tell that they have no effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulltune.errors import RecipeError, SetupError
from fulltune.models.base import Base
from fulltune.recipe.fields import Recipe
from fulltune.recipe.rules import conflicts
from fulltune.recipe.tasks import FACTS, TaskFacts
from fulltune.records.data import DataSummary

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_model(recipe: Recipe, base: Base) -> None:
    """Refuse a model that the task cannot use or that cannot be trained here."""
    if base.path is not None and (base.path / "adapter_config.json").exists():
        # Training would go on with the model beside it.
        raise SetupError(
            f"model: {base.block.name}: holds only what a method trained beside its pretrained model; make them one "
            f"(LoRA, head) with 'fulltune merge {base.path} --output WHOLE', and write model: WHOLE"
        )
    problem = unfit(base.config, FACTS[recipe.task])
    experts = [getattr(base.config.get_text_config(), name, None) for name in ("num_local_experts", "num_experts")]
    if problem is None and any(isinstance(count, int) and count > 1 for count in experts):
        # transformers 5.24 saves experts under other names than it trains them: a resumed run would lose them.
        problem = "is a mixture of experts, which cannot be trained here yet"
    if problem is not None:
        raise SetupError(f"model: {recipe.model.name}: {problem}")


def unfit(config: PretrainedConfig, facts: TaskFacts) -> str | None:
    """Why this kind of model cannot do a task: transformers has no such class for it, or it works otherwise."""
    from transformers.models.auto import modeling_auto

    from fulltune.models.shapes import is_decoder

    can = config.model_type in getattr(modeling_auto, facts.auto_class)._model_mapping._model_mapping
    if facts.writes:  # these lists also name encoders, and models that listen
        can &= bool(config.is_encoder_decoder if facts.auto_class.endswith("Seq2SeqLM") else is_decoder(config))
    return (
        None if can and config.model_type not in facts.other_models else f"a '{config.model_type}' model {facts.models}"
    )


def check_settings_for(recipe: Recipe, summary: DataSummary) -> None:
    """Refuse what makes no sense for these labels."""
    if problems := conflicts(recipe, summary.form):
        raise RecipeError(problems)
    class_weights(recipe, summary)


def class_weights(recipe: Recipe, summary: DataSummary) -> list[float] | None:
    """`train.class_weights` in the order of the labels; `balanced` makes each class count the same in total. Raises
    `RecipeError` when they do not match the labels."""
    given, labels, name = recipe.train.class_weights, summary.labels, "train.class_weights"
    if given is None:
        return None
    if not labels:
        raise RecipeError(f"{name}: the data have no classes ({summary.form.words}); remove it")
    if isinstance(given, str):
        if summary.form.tags_words:
            raise RecipeError(
                f"{name}: 'balanced' counts the rows of a class, and tags belong to words; give each tag its weight: "
                f"{', '.join(labels[:3])} ..."
            )
        counts = summary.splits["train"].label_counts
        # A class without a train row (all of them were dropped) cannot count at all.
        return [sum(counts.values()) / (len(labels) * counts[label]) if label in counts else 0.0 for label in labels]
    if isinstance(given, dict):
        by_label = {str(label): weight for label, weight in given.items()}
        missing = [label for label in labels if label not in by_label]
        unknown = [label for label in by_label if label not in labels]
        if missing or unknown:
            wrong = f"no weight for {', '.join(missing[:5])}" if missing else f"no such label: {unknown[0]}"
            raise RecipeError(f"{name}: {wrong}; the labels are {', '.join(labels[:5])}{' ...' if labels[5:] else ''}")
        return [float(by_label[label]) for label in labels]
    if len(given) != len(labels):
        raise RecipeError(f"{name}: {len(given)} weights for {len(labels)} labels; give one for each")
    return [float(weight) for weight in given]
