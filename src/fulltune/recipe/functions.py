"""The user's own functions that a recipe names as `module:function`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeGuard

from pydantic import AfterValidator

from fulltune.errors import SetupError
from fulltune.text import did_you_mean, first_few

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_own(name: str | None) -> TypeGuard[str]:
    """Return whether a setting names the user's function, not one of fulltune's metrics."""
    return name is not None and ":" in name


def _check_form(name: str) -> str:
    if not _NAME.fullmatch(name) or ".py:" in name:
        raise ValueError(
            f"expected module:function, such as my_functions:exact for exact() in my_functions.py, found '{name}'"
        )
    return name


FunctionName = Annotated[str, AfterValidator(_check_form)]
MetricName = Annotated[str, AfterValidator(lambda name: _check_form(name) if is_own(name) else name)]


def import_functions(functions: Mapping[str, str], folder: str) -> None:
    """Import the modules of `functions` (name to setting), which lie in `folder` or are installed. Raise `SetupError`
    for all that are not found."""
    problems, folder = list[str](), os.path.realpath(folder)
    if not functions:
        return
    importlib.invalidate_caches()
    sys.path.insert(0, folder)  # as for a script; afterwards last, so that no later import finds these files first
    try:
        for name, setting in functions.items():
            try:
                load_function(name)
            except SetupError as error:
                problems += [f"{setting}: {problem}" for problem in error.problems]
    finally:
        sys.path.remove(folder)
    if folder not in sys.path:
        sys.path.append(folder)
    if problems:
        raise SetupError(problems)


def load_function(name: str) -> Callable[..., Any]:
    """Return the function called `module:function`, or raise `SetupError`. `import_functions` must have been called."""
    module_name, _, function = name.partition(":")
    file = _file_of(name)
    try:
        module = _import(module_name, str(file), digest_of(name))
    except Exception as error:
        raise SetupError(f"'{name}': importing {file} failed with {describe_error(error)}; correct the file") from error
    value = getattr(module, function, None)
    if not callable(value):
        names = sorted(key for key, other in vars(module).items() if callable(other) and not key.startswith("_"))
        hint = did_you_mean(function, names) or f"it has {first_few(names) or 'no functions'}"
        raise SetupError(f"'{name}': {file} has no function '{function}'; {hint}")
    return value  # type: ignore[no-any-return]  # callable


@cache
def _import(module_name: str, file: str, digest: str) -> ModuleType:
    """Import a module again if its file has changed since."""
    before = sys.modules.get(module_name)
    return importlib.import_module(module_name) if before is None else importlib.reload(before)


def _file_of(name: str) -> Path:
    """Return a function's file, or raise `SetupError`."""
    module_name = name.partition(":")[0]
    try:
        spec = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.has_location:
        folder = Path(sys.path[0])
        near = did_you_mean(module_name, [path.stem for path in folder.glob("*.py")])
        raise SetupError(
            f"'{name}': there is no module {module_name} in {folder}, and none is installed"
            f"; {near or f'write {folder / module_name}.py, or set functions to the folder of your modules'}"
        )
    return Path(spec.origin)


def digest_of(name: str) -> str:
    """Return a hash of the file that holds a function."""
    return hashlib.sha256(_file_of(name).read_bytes()).hexdigest()[:16]


def describe_error(error: Exception) -> str:
    """Return an error's type, text and line in the user's file, on one line."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    place = f" ({last.tb_frame.f_code.co_filename}:{last.tb_lineno})" if last is not None else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{place}"
