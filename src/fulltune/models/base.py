"""The pretrained model that a run starts from: found, its config and its processor read, once."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fulltune.models import processors
from fulltune.models.files import ModelFiles, locate, reading
from fulltune.recipe.model import ModelBlock
from fulltune.recipe.tasks import FACTS, TaskName

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Base:
    """A pretrained model without its weights, handed down to all who need to know it."""

    block: ModelBlock
    task: TaskName
    """What the model is for: says what its processor reads, and its class."""
    files: ModelFiles
    config: PretrainedConfig
    """As it came: what is changed is a copy."""
    chat_template: str | None = None
    has_processor: bool = True
    """False: only the config has to be there."""

    @classmethod
    def of(
        cls,
        block: ModelBlock,
        task: TaskName = "text-classification",
        chat_template: str | None = None,
        has_processor: bool = True,
    ) -> Base:
        """Find a model and read its config; its weights are asked for by who loads them.

        Args:
            block: The recipe's model block, or one that names a finished model's folder.
            task: What the model is for.
            chat_template: Path of a Jinja file that replaces the tokenizer's own template.
            has_processor: False when the config is enough: a folder may then hold nothing else.

        Raises:
            SetupError: When there is no such model, or it cannot be read.
        """
        from transformers import AutoConfig

        files = locate(block)
        config = reading(
            block, "config", lambda: AutoConfig.from_pretrained(files.name_or_path, **files.keywords(block))
        )
        return cls(block, task, files, config, chat_template, has_processor)

    @cached_property
    def processor(self) -> Any:
        """What turns rows into what the model reads: a tokenizer, or for images an `ImageReader`."""
        if FACTS[self.task].reads == "image":
            return processors.load_image_reader(self.block, self.files, self.config)
        return processors.load_tokenizer(self.block, self.files, self.config, self.chat_template)

    @cached_property
    def image_shape(self) -> tuple[tuple[int, int, int] | None, str]:
        """Channels, height and width of the images that the model is given, None for texts; and what is assumed."""
        if FACTS[self.task].reads == "text":
            return None, ""
        if processors.has_image_processor(self.files):
            return self.processor.shape(), ""
        return processors.assumed_image_shape(self.config, self.block.name)

    def configured(self, changes: Mapping[str, Any], dropout: float | None = None) -> PretrainedConfig:
        """A copy of the config with the task's changes and the recipe's dropout."""
        config = copy.deepcopy(self.config)
        dropouts = {} if dropout is None else dict.fromkeys(dropout_names(config), dropout)
        for key, value in {**changes, **dropouts}.items():
            setattr(config, key, value)
        return config

    @property
    def model_class(self) -> Any:
        """The task's class in transformers, for example `AutoModelForSequenceClassification`."""
        import transformers

        return getattr(transformers, FACTS[self.task].auto_class)

    def identity(self, attn_implementation: str | None) -> str:
        """What the model's config says, and with what it is read."""
        import transformers

        parts = [self.config.to_dict(), attn_implementation, transformers.__version__]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def dropout_names(config: PretrainedConfig) -> list[str]:
    """Names of the config's dropout probabilities, for example `hidden_dropout_prob`, `attn_pdrop`."""
    values = config.to_dict()
    numbers = [key for key, value in values.items() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    return [key for key in numbers if "dropout" in key or key.endswith("pdrop")] + [
        key for key in ("classifier_dropout", "summary_first_dropout") if key in values and key not in numbers
    ]
