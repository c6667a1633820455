"""Every package that the source imports is one that an installation brings, or that an extra names."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import fulltune
from fulltune.report.run import model_card
from fulltune.system import run_folder

SOURCE = Path(fulltune.__file__).parent
PYPROJECT = SOURCE.parents[1] / "pyproject.toml"


NAMES = {"PIL": "pillow"}
"""Of packages of extras, whose distribution has another name and may not be installed here."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names_of(requirements: Iterable[str]) -> set[str]:
    return {canonical(re.split(r"[<>=!~\[; (]", text)[0]) for text in requirements}


def declared(of_extras: bool = True) -> set[str]:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = [text for name, texts in project["optional-dependencies"].items() if name != "dev" for text in texts]
    return names_of([*project["dependencies"], *(extras if of_extras else [])])


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


def test_packages_whose_versions_are_noted_come_with_the_core() -> None:
    core = declared(of_extras=False)
    brought = core.union(*(names_of(text for text in requires(name) or () if "extra ==" not in text) for name in core))
    assert {*run_folder.PACKAGES, *model_card._PACKAGES} <= brought
