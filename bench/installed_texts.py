"""Real texts that every installation has: docstrings, descriptions of packages, and messages of programs.

What is found depends on the versions that are installed; figures made of these texts hold for one machine's.
"""

from __future__ import annotations

import ast
import gettext
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

CATALOGUES = Path("/usr/share/locale")


def texts() -> dict[str, list[str]]:
    """Every different text of each kind, in the order of the files."""
    found = {"docstrings": _docstrings(), "descriptions": _descriptions(), "messages": _messages()}
    return {name: list(dict.fromkeys(group)) for name, group in found.items()}


def _docstrings() -> Iterator[str]:
    """Of the standard library and the installed packages, whole, but for those of tests."""
    for root in sorted({Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}):
        for file in sorted(root.rglob("*.py")):
            parts = file.relative_to(root).parts
            if {"tests", "test"} & set(parts) or parts[0] in ("site-packages", "dist-packages"):
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tree = ast.parse(file.read_text("utf-8"))
            except (SyntaxError, ValueError, RecursionError) as error:
                print(f"left out: {file}: {error}", file=sys.stderr)
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield from filter(None, [ast.get_docstring(node)])


def _descriptions() -> Iterator[str]:
    """Of the packages, as they were published: most of them are their README."""
    for package in sorted(metadata.distributions(), key=lambda one: one.metadata["Name"]):
        said = package.metadata.get_payload()
        yield from filter(str.strip, [str(said), str(package.metadata["Description"] or "")])


def _messages() -> Iterator[str]:
    """Of the programs' catalogues, in English and translated; what is not translated is not there."""
    for file in sorted(CATALOGUES.rglob("*.mo")):
        with file.open("rb") as catalogue:
            said = gettext.GNUTranslations(catalogue)._catalog  # no public way to list them
        for asked, answer in said.items():
            if asked:
                yield from (asked if isinstance(asked, str) else asked[0], answer)
