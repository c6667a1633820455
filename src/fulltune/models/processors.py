"""What turns rows into a model's inputs: its tokenizer, or for images its image processor."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune.errors import SetupError
from fulltune.models.files import ModelFiles, reading
from fulltune.recipe.model import ModelBlock

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from fulltune.models.pixels import ImageReader


def load_tokenizer(
    block: ModelBlock, files: ModelFiles, config: PretrainedConfig, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer; one without a padding token pads with its end token (masked by the attention mask).

    Args:
        block: The recipe's model block.
        files: Where the model's files are.
        config: The model's.
        chat_template: Path of a Jinja file that replaces the tokenizer's own template.

    Raises:
        SetupError: When it cannot be read or is not this model's.
    """
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


def has_image_processor(files: ModelFiles) -> bool:
    """Whether a model comes with its image processor, as far as a folder tells."""
    folder = Path(files.name_or_path)
    return not files.is_local or any((folder / name).exists() for name in _PROCESSOR_FILES)


def assumed_image_shape(config: PretrainedConfig, name: str) -> tuple[tuple[int, int, int], str]:
    """Channels, height and width of a model's images by its config, and that in words."""
    part = getattr(config, "vision_config", config)
    size = getattr(part, "image_size", None) or USUAL_SIDE
    height, width = (size, size) if isinstance(size, int) else size
    where = "by its config" if getattr(part, "image_size", None) else "as most models take them"
    assumed = f"images of {height} x {width} pixels, {where}: {name} has no preprocessor_config.json"
    return (getattr(part, "num_channels", 3), height, width), assumed


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
