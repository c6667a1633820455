"""Names that other tools and transformers know, read from files only when a recipe has a name that is not its own.

transformers is not imported: its names are read from its source, which takes a tenth of the time.
"""

from __future__ import annotations

import ast
import importlib.util
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any


@cache
def _table() -> Mapping[str, Any]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def pinned() -> Mapping[str, str]:
    """Fields of `transformers.TrainingArguments` that `train.extra` may not set, and what to do instead."""
    return dict(_table()["pinned"])


@cache
def answers() -> Mapping[str, str]:
    """Names of settings in other tools, and what to write here."""
    by_name = {name: answer for answer, names in _table()["answers"].items() for name in names.split()}
    return by_name | _table()["pinned"]


def answer(name: object) -> str | None:
    """What to write in place of another tool's setting, or None where it is not known."""
    return answers().get(str(name).lower().replace("-", "_"))


@cache
def training_arguments() -> Mapping[str, str]:
    """Fields of `transformers.TrainingArguments`, and their types as they are written there."""
    body = _class("training_args.py", "TrainingArguments").body
    fields = [line for line in body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)]
    return {line.target.id: ast.unparse(line.annotation) for line in fields if isinstance(line.target, ast.Name)}


@cache
def optimizers() -> list[str]:
    """Names of the optimizers of transformers."""
    body = _class("training_args.py", "OptimizerNames").body
    values = [line.value for line in body if isinstance(line, ast.Assign)]
    return sorted(value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str))


@cache
def trackers() -> list[str]:
    """Names of the trackers of transformers."""
    for line in _parsed("integrations/integration_utils.py").body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "INTEGRATION_TO_CALLBACK":
            keys = line.value.keys if isinstance(line.value, ast.Dict) else []
            return sorted(key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))
    raise LookupError("transformers has no INTEGRATION_TO_CALLBACK any more")


@cache
def _parsed(file: str) -> ast.Module:
    spec = importlib.util.find_spec("transformers")
    assert spec is not None, "it is installed with fulltune"
    assert spec.submodule_search_locations is not None, "it is a package"
    return ast.parse((Path(next(iter(spec.submodule_search_locations))) / file).read_text(encoding="utf-8"))


def _class(file: str, name: str) -> ast.ClassDef:
    return next(line for line in _parsed(file).body if isinstance(line, ast.ClassDef) and line.name == name)
