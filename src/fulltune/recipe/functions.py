"""The user's own functions that a recipe names as `module:function`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
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
            module = name.partition(":")[0]
            file = Path(folder, *module.split(".")).with_suffix(".py")
            if file.exists() and _VERSIONS.get(module) != (version := (file, file.read_bytes())):
                sys.modules.pop(module, None)  # an earlier version, or the module of another recipe's folder
                _VERSIONS[module] = version
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


_VERSIONS: dict[str, tuple[Path, bytes]] = {}
"""File and content of each module that was imported from a recipe's folder."""


def load_function(name: str) -> Callable[..., Any]:
    """Return the function called `module:function`, or raise `SetupError`. `import_functions` must have been called."""
    (module_name, _, function), file = name.partition(":"), _file_of(name)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise SetupError(f"'{name}': importing {file} failed with {describe_error(error)}; correct the file") from error
    if callable(value := getattr(module, function, None)):
        return value  # type: ignore[no-any-return]  # callable
    names = sorted(key for key, other in vars(module).items() if callable(other) and key[0] != "_")
    hint = did_you_mean(function, names) or f"it has {first_few(names) or 'no functions'}"
    raise SetupError(f"'{name}': {file} has no function '{function}'; {hint}")


def _file_of(name: str) -> Path:
    """Return a function's file, or raise `SetupError`."""
    module_name = name.partition(":")[0]
    try:
        spec = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        spec = None
    if spec is not None and spec.origin is not None and spec.has_location:
        return Path(spec.origin)
    folder = Path(sys.path[0])
    near = did_you_mean(module_name, [path.stem for path in folder.glob("*.py")])
    advice = near or f"write {folder / module_name}.py, or set functions to the folder of your modules"
    raise SetupError(f"'{name}': no module {module_name} is in {folder} or installed; {advice}")


def digest_of(name: str) -> str:
    """Return a hash of the file that holds a function."""
    return hashlib.sha256(_file_of(name).read_bytes()).hexdigest()[:16]


def describe_error(error: Exception) -> str:
    """Return an error's type, text and line outside of packages, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    *_, last = frames[:1] + [one for one in frames if "site-packages" not in one.filename]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({last.filename}:{last.lineno})"
