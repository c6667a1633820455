"""What most tasks do alike: a task's module takes these in the place of functions of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fulltune.recipe.data import DataBlock
from fulltune.records.data import Preview, Segment
from fulltune.tasks import Row, Target
from fulltune.tasks.columns import required

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def find_columns(
    roles: Sequence[str], columns: Sequence[str], sample: Sequence[Row], data: DataBlock, where: str
) -> dict[str, str]:
    """A column of its own for each role, where the task can do without none of them."""
    found: dict[str, str] = {}
    for role in roles:
        found[role] = required(role, getattr(data, role), columns, where, found.values())
    return found


def row_labels(row: Row, target: Target) -> list[str]:
    """None: the task has no classes."""
    return []


def preview(text: str, label: str) -> Preview:
    """A text of which nothing is trained itself, and its label."""
    return Preview(segments=(Segment(text=text, trained=False),), label=label)


def check_model(heads: str, advice: str, config: PretrainedConfig) -> str | None:
    """Why a model cannot do the task: transformers has no such head for its type. None: it has one."""
    from transformers.models.auto import modeling_auto

    known = config.model_type in getattr(modeling_auto, f"MODEL_FOR_{heads}_MAPPING_NAMES")
    return None if known else f"a '{config.model_type}' model {advice}"


def config_changes(target: Target, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """None: the head has one size only."""
    return {}
