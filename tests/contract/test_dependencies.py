"""Every package that the source imports is one that an installation brings, or that an extra names."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import fulltune

SOURCE = Path(fulltune.__file__).parent
PYPROJECT = SOURCE.parents[1] / "pyproject.toml"


NAMES = {"PIL": "pillow"}
"""Of packages of extras, whose distribution has another name and may not be installed here."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> set[str]:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = [text for name, texts in project["optional-dependencies"].items() if name != "dev" for text in texts]
    return {canonical(re.split(r"[<>=!~\[; ]", text)[0]) for text in (*project["dependencies"], *extras)}


def imported() -> dict[str, set[str]]:
    """Top-level package to the files that import it, the standard library and fulltune itself left out."""
    found: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(path.relative_to(SOURCE).as_posix())
    return {name: files for name, files in found.items() if name not in {*sys.stdlib_module_names, "fulltune"}}


def test_every_imported_package_is_declared() -> None:
    distributions, known = packages_distributions(), declared()
    undeclared = {
        name: sorted(files)
        for name, files in imported().items()
        # A package of an extra that is not installed here has no distribution to look up: its name must do.
        if not known & {canonical(one) for one in distributions.get(name, [NAMES.get(name, name)])}
    }
    assert not undeclared
