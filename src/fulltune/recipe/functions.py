"""The user's own functions that a recipe names as `module:function`."""

from __future__ import annotations

import hashlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple, TypeGuard

from pydantic import AfterValidator

from fulltune.errors import SetupError
from fulltune.text import did_you_mean, first_few

_NAME = re.compile(r"(?!.*\.py:)[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_own(name: str | None) -> TypeGuard[str]:
    """Return whether a setting names the user's function, not one of fulltune's metrics."""
    return name is not None and ":" in name


def _check_form(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"expected module:function, such as my_metrics:f1 for f1() in my_metrics.py, found '{name}'")
    return name


FunctionName = Annotated[str, AfterValidator(_check_form)]
MetricName = Annotated[str, AfterValidator(lambda name: _check_form(name) if is_own(name) else name)]


class OwnFunction(NamedTuple):
    """A function of the user's, and a hash of its file."""

    call: Callable[..., Any]
    digest: str


IMPORTED: dict[str, OwnFunction] = {}
"""This process's functions by name, filled by `import_functions`."""


def import_functions(functions: Mapping[str, str], folder: str) -> None:
    """Import `functions` (name to setting) from files in `folder` or installed modules. Raise `SetupError` for all that
    are not found."""
    problems = list[str]()
    if functions and folder not in sys.path:
        sys.path.append(folder)  # for what the files import; last, so that no other import finds these files first
    for name, setting in functions.items():
        try:
            IMPORTED[name] = _import_function(name, folder)
        except SetupError as error:
            problems.append(f"{setting}: {error}")
    if problems:
        raise SetupError(problems)


def _import_function(name: str, folder: str) -> OwnFunction:
    module_name, _, function = name.partition(":")
    file = Path(folder, *module_name.split(".")).with_suffix(".py")
    if file.exists() and module_name.partition(".")[0] in sys.stdlib_module_names:
        raise SetupError(f"'{name}': Python has a module '{module_name}' of its own; rename {file}")
    try:
        module = _run_file(module_name, file, file.read_bytes()) if file.exists() else import_module(module_name)
    except Exception as error:
        if file.exists():
            raise SetupError(f"'{name}': importing {file} failed with {describe_error(error)}; correct it") from error
        near = did_you_mean(module_name, [path.stem for path in Path(folder).glob("*.py")]) or f"write {file}"
        raise SetupError(f"'{name}': no module in {folder} or installed ({error}); {near}") from error
    file = Path(getattr(module, "__file__", None) or sys.executable)
    if callable(value := getattr(module, function, None)):
        return OwnFunction(value, hashlib.sha256(file.read_bytes()).hexdigest()[:16])
    names = sorted(key for key, other in vars(module).items() if callable(other) and key[0] != "_")
    hint = did_you_mean(function, names) or f"it has {first_few(names) or 'no functions'}"
    raise SetupError(f"'{name}': {file} has no function '{function}'; {hint}")


@cache
def _run_file(module_name: str, file: Path, source: bytes) -> ModuleType:
    """Run a Python file as a module, once for each version of it."""
    module = sys.modules[module_name] = ModuleType(module_name)
    module.__file__ = str(file)
    exec(compile(source, file, "exec"), vars(module))
    return module


def describe_error(error: Exception) -> str:
    """Return an error's type, text and line in the user's files, on one line."""
    packages = ("site-packages", str(Path(__file__).parents[1]), "<frozen ")
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not any(x in one.filename for x in packages)]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{place}"
