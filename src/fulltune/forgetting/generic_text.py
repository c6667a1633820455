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
DOCUMENTATION = "docstrings of Python's standard library"
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
        return _in_drawn_order(_documentation(count))[:count], DOCUMENTATION
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"preserve.probe: {file}: cannot be read ({error}); expected a text file") from None
    parts = text.split("\n\n") if "\n\n" in text else text.splitlines()
    found = _in_drawn_order(" ".join(part.split()) for part in parts)[:count]
    if len(found) < 2:
        raise DataError(f"preserve.probe: {file}: holds {len(found)} texts; expected at least 2 lines or paragraphs")
    return found, file


def _in_drawn_order(texts: Iterable[str]) -> list[str]:
    """Different texts, in an order that says nothing about them."""
    different = {text for text in texts if text}
    return sorted(different, key=lambda text: hashlib.sha256(text.encode()).digest())


@cache
def _documentation(count: int) -> tuple[str, ...]:
    """Paragraphs of so many modules, in an order that says nothing about them, that there are enough: reading all of
    them takes seconds."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = (path.relative_to(root) for path in (*root.glob("*.py"), *root.glob("*/*.py")))
    wanted = [path for path in modules if not any(part in _LEFT_OUT for part in path.parts)]
    found: dict[str, None] = {}
    for path in sorted(wanted, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest()):
        if len(found) >= count:
            break
        found.update(dict.fromkeys(_paragraphs(root / path)))
    return tuple(found)


def _paragraphs(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8", errors="ignore"))
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                text = " ".join(paragraph.split())
                letters = sum(character.isalpha() or character == " " for character in text)
                if _WORDS[0] <= len(text.split(" ")) <= _WORDS[1] and letters > 0.9 * len(text):
                    yield text
