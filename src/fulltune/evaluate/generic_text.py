"""Texts that have nothing to do with the task, to see how much of what a model could do is left.

Without a file of the user's own they are paragraphs of the standard library's documentation, which every installation
has: plain technical English.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from fulltune.errors import DataError

NUM_TEXTS = 200
_WORDS = (20, 120)
_LEFT_OUT = ("test", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "__pycache__")


def generic_texts(file: str | None = None, count: int = NUM_TEXTS) -> tuple[list[str], str]:
    """The texts, always the same ones, and where they come from.

    Args:
        file: One text a line, or paragraphs with empty lines between; None: the standard library's documentation.
        count: At most so many.

    Raises:
        DataError: When the file cannot be read or holds no text.
    """
    if file is None:
        return _chosen(_documentation(), count), "docstrings of Python's standard library"
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"compare.generic_text: {file}: cannot be read ({error}); expected a text file") from None
    parts = text.split("\n\n") if "\n\n" in text else text.splitlines()
    found = _chosen((" ".join(part.split()) for part in parts), count)
    if len(found) < 2:
        raise DataError(
            f"compare.generic_text: {file}: holds {len(found)} texts; expected at least 2 lines or paragraphs"
        )
    return found, file


def _chosen(texts: Iterable[str], count: int) -> list[str]:
    """Different texts, in an order that says nothing about them."""
    different = {text for text in texts if text}
    return sorted(different, key=lambda text: hashlib.sha256(text.encode()).digest())[:count]


@cache
def _documentation() -> tuple[str, ...]:
    """All paragraphs; reading them takes seconds."""
    return tuple(_paragraphs())


def _paragraphs() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.glob("*.py")) + sorted(root.glob("*/*.py")):
        if any(part in _LEFT_OUT for part in file.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8", errors="ignore"))
        except (SyntaxError, ValueError, RecursionError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                    text = " ".join(paragraph.split())
                    letters = sum(character.isalpha() or character == " " for character in text)
                    if _WORDS[0] <= len(text.split(" ")) <= _WORDS[1] and letters > 0.9 * len(text):
                        yield text
