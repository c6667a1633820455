from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune.errors import SetupError
from fulltune.files import write_json
from fulltune.models.encoders import TokenPooling, is_decoder

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MODES: dict[TokenPooling, str] = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
_TYPE = "sentence_transformers.models"
FILES = (MODULES, POOLING, SETTINGS) = ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json")
_PROMPTS = ("prompts", "default_prompt_name")


def pop_settings(config: PretrainedConfig) -> dict[str, object]:
    """Remove from a config what a training of vectors left there, which other tasks must not copy; return it."""
    names = ("pooling", "normalize", *_PROMPTS) if vars(config).get("pooling") in _MODES else ()
    return {name: vars(config).pop(name) for name in names if name in vars(config)}


def read_pooling(folder: Path, config: PretrainedConfig, saved: Mapping[str, object]) -> tuple[TokenPooling, str]:
    """Return how a model pools the tokens of a text, and where that is said; by default as such models usually do."""
    if "pooling" in saved:
        return next(mode for mode in _MODES if mode == saved["pooling"]), "config.json"
    if place := next((module["path"] for module in _read(folder / MODULES) if _kind(module) == "Pooling"), None):
        values = _read(file := folder / place / "config.json")
        flags = [name for name, value in values.items() if value is True and name.startswith("pooling_mode_")]
        names = [values["pooling_mode"]] if "pooling_mode" in values else [flag[13:] for flag in flags]
        known = [mode for mode, name in _MODES.items() if [mode] == names or [name] == names]
        if not known:
            raise SetupError(
                f"model: {file}: pools by {', '.join(map(str, names)) or 'nothing'}, expected one of "
                f"{', '.join(_MODES.values())}; set model.pooling"
            )
        return known[0], f"{place}/config.json"
    if is_decoder(config):
        return "last", "no file at hand names a pooling; decoders are usually pooled at the last token"
    return "mean", "no file at hand names a pooling; encoders are usually pooled by the mean over tokens"


def read_sentence_settings(folder: Path, saved: Mapping[str, object]) -> dict[str, object]:
    """Return values for the config: the prompts, and whether vectors are normalised. If no files say so, they are as
    `saved` in the config, or else normalised. Raise `SetupError` for what would be lost in training."""
    modules, pooling, values = (_read(folder / name) for name in FILES)
    kinds = [*map(_kind, modules)]
    others = [f"a module '{kind}'" for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    others += [] if pooling.get("include_prompt", True) else ["include_prompt: false"]
    if others:
        raise SetupError(f"model: {folder}: has {others[0]}, which is not supported; use another model")
    normalize = "Normalize" in kinds if kinds else saved.get("normalize", True)
    return {"normalize": normalize, **{name: (values or saved).get(name) for name in _PROMPTS}}


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError:
        raise SetupError(f"model: {file}: is not valid JSON; copy it again") from None


def _kind(module: dict[str, str]) -> str:
    return module["type"].rpartition(".")[2]


def prompts_by_role(config: PretrainedConfig) -> dict[str, str]:
    """Return the texts that belong before a `query`, a `document` and, as "", any other text."""
    prompts = getattr(config, "prompts", None) or {}
    default = prompts.get(getattr(config, "default_prompt_name", None), "")
    document = next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), default)
    return {"query": prompts.get("query", default), "document": document, "": default}


def write_sentence_files(folder: Path, config: PretrainedConfig, max_length: int) -> None:
    """Write the files with which sentence-transformers (all versions) reads a saved encoder as one that pools,
    normalises and prompts as `config` says."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules += [("2_Normalize", "Normalize")] * getattr(config, "normalize", False)
    entries = [
        {"idx": number, "name": str(number), "path": path, "type": f"{_TYPE}.{name}"}
        for number, (path, name) in enumerate(modules)
    ]
    write_json(folder / MODULES, entries)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    pooling = {f"pooling_mode_{name}": mode == config.pooling for mode, name in _MODES.items()}
    size = config.get_text_config().hidden_size
    write_json(folder / POOLING, {"word_embedding_dimension": size, **pooling})
    prompts = {name: value for name in _PROMPTS if (value := getattr(config, name, None)) is not None}
    write_json(folder / SETTINGS, {**prompts, "similarity_fn_name": "cosine"})
