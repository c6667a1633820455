"""The pretrained model that a run starts from, without its weights: its config and its processor."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune.errors import SetupError
from fulltune.models.files import ModelFiles, locate, reading
from fulltune.recipe.model import ModelBlock
from fulltune.recipe.tasks import FACTS, TaskName

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from fulltune.models.pixels import ImageReader


def load_tokenizer(
    block: ModelBlock, files: ModelFiles, config: PretrainedConfig, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer; one without a padding token pads with its end token (masked by the attention mask)."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = reading(
        block, "tokenizer", lambda: AutoTokenizer.from_pretrained(files.name_or_path, **files.keywords(block))
    )
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        # transformers makes an empty tokenizer, which reads every word as unknown, when the files are missing.
        raise SetupError(
            f"model: {block.name}: its tokenizer has no vocabulary; is tokenizer.json (or vocab.txt, tokenizer.model) "
            "missing?"
        )
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise SetupError(
            f"model: {block.name}: its tokenizer has {len(tokenizer)} tokens, but the model knows only {vocabulary}; "
            "they do not belong together"
        )
    if tokenizer.pad_token_id is None:
        replacement = tokenizer.eos_token or tokenizer.unk_token
        if replacement is None:
            raise SetupError(f"model: {block.name}: its tokenizer has no padding, end or unknown token to pad with")
        tokenizer.pad_token = replacement
    tokenizer.padding_side = "right"
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise SetupError(f"data.chat_template: {chat_template}: cannot be read: {reason}") from None
    return tokenizer


def load_image_reader(block: ModelBlock, files: ModelFiles, config: PretrainedConfig) -> ImageReader:
    """Load the model's image processor."""
    from fulltune.models.pixels import ImageReader, num_patches

    if importlib.util.find_spec("PIL") is None:
        raise SetupError("task: image-classification needs the package 'pillow'; pip install 'fulltune[images]'")
    from transformers import AutoImageProcessor

    # Pillow's arithmetic, wherever the run goes on: torchvision resizes to slightly other pixels.
    processor = reading(
        block,
        "image processor",
        lambda: AutoImageProcessor.from_pretrained(files.name_or_path, backend="pil", **files.keywords(block)),
    )
    return ImageReader(processor, num_patches(config))


USUAL_SIDE = 224
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def opened(rows: Any, processor: Any) -> Any:
    """Prepared rows as the task's `collate` takes them: images are decoded when a row is asked for."""
    from fulltune.models.pixels import ImageReader, ImageRows

    return ImageRows(rows, processor) if isinstance(processor, ImageReader) else rows


def processor_identity(processor: Any) -> str:
    """What tells apart two tokenizers, or image processors, that would make other rows."""
    if not hasattr(processor, "get_vocab"):
        return str(processor.to_json_string())
    parts = [processor.get_vocab(), str(processor.chat_template), list(processor.model_input_names)]
    parts.append({name: str(token) for name, token in processor.special_tokens_map.items()})
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is not None:  # normaliser, merges, special tokens around a text
        whole = json.loads(backend.to_str())
        # Truncation and padding are left by whoever called it last.
        parts.append({key: value for key, value in whole.items() if key not in _CHANGED_BY_CALLS})
    else:
        parts.append({name: str(value) for name, value in processor.init_kwargs.items()})
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


_CHANGED_BY_CALLS = ("truncation", "padding")


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
        """Find a model, or a finished model's folder, and read its config; `load` reads its weights."""
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
            return load_image_reader(self.block, self.files, self.config)
        return load_tokenizer(self.block, self.files, self.config, self.chat_template)

    @cached_property
    def image_shape(self) -> tuple[tuple[int, int, int] | None, str]:
        """Channels, height and width of the images that the model is given, None for texts; and what is assumed."""
        if FACTS[self.task].reads == "text":
            return None, ""
        folder, part = Path(self.files.name_or_path), getattr(self.config, "vision_config", self.config)
        if not self.files.is_local or any((folder / name).exists() for name in _PROCESSOR_FILES):
            return self.processor.shape(), ""
        size = getattr(part, "image_size", None)
        where = "by its config" if size else "as most models take them"
        size = size or USUAL_SIDE
        height, width = (size, size) if isinstance(size, int) else size
        assumed = f"images of {height} x {width} pixels, {where}: {self.block.name} has no preprocessor_config.json"
        return (getattr(part, "num_channels", 3), height, width), assumed

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
