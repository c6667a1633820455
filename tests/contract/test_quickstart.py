"""The quickstart's rows come from installed packages: their versions are locked, and with these the rows are known."""

from __future__ import annotations

import hashlib
import re
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

from fulltune.quickstart import CHAT_SOURCES, TOPIC_SOURCES, write_docstring_chat, write_docstring_topics

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "locks" / "tested.txt").read_text(encoding="utf-8")
LOCKED = dict(re.findall(r"^([\w-]+)==([^ \n]+)", LOCK, re.MULTILINE)[::-1])
"""The first of several versions is that of the oldest Python."""
PYTHON = (3, 11, 7)
"""Whose own docstrings are among the rows below."""
ROWS = {
    "topics/train.csv": "6498fe24aa8cfa5b70bf188a14bb04bcc49291614c18d15ee28e793fc059facd",
    "topics/test.csv": "f4e2777312d632fa76f28ea12ece15e239c30d0f7486ed3746fc53b228439635",
    "chat/train.jsonl": "cb09d8285def4b4e36a9edb01bd66cac0295f7eb09bb21b7efd9621735697874",
    "chat/test.jsonl": "876f2f75c6e68eece0dfe5fe6be73c952a89b3e71e4aadd0aaf0a63394e3d269",
}


def packages_that_are_read() -> set[str]:
    entries = " ".join([*TOPIC_SOURCES.values(), *CHAT_SOURCES.values()]).split()
    names = {entry.partition("/")[0] for entry in entries} - set(sys.stdlib_module_names)
    packages = packages_distributions()
    return {packages[name][0] for name in names}


def test_every_package_that_is_read_is_locked() -> None:
    assert packages_that_are_read() <= set(LOCKED)


@pytest.mark.slow
def test_rows_of_the_locked_versions_are_known(tmp_path: Path) -> None:
    other = [name for name in packages_that_are_read() if version(name).partition("+")[0] != LOCKED[name]]
    if other or sys.version_info[:3] != PYTHON:
        pytest.skip(f"other versions than those of the rows: {', '.join(other) or sys.version}")
    files = (*write_docstring_topics(tmp_path / "topics"), *write_docstring_chat(tmp_path / "chat"))
    found = {file.relative_to(tmp_path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert found == ROWS
