"""Plain words stay plain: names that say nothing, prose that grows, and types that hide behind `Any`."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bench.results import BEGIN, END

from tests.contract import house

ROOT = Path(__file__).parents[2]
SAY_NOTHING = {"found", "one", "said", "told", "made", "kept", "held", "seen", "its"}
"""Names that tell how a value came about, or nothing at all. In a comprehension of one line they do no harm."""


def bindings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each variable, field and parameter, without those of comprehensions that fit on one line."""
    short = [node for node in ast.walk(tree) if isinstance(node, COMPREHENSIONS) and node.lineno == node.end_lineno]
    inside = {id(name) for node in short for part in node.generators for name in ast.walk(part.target)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in inside:
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def test_names_say_what_a_value_is() -> None:
    wrong = [
        f"{path.relative_to(house.SOURCE)}:{line} {name}"
        for path in house.modules().values()
        for line, name in bindings(house.tree(path))
        if name in SAY_NOTHING
    ]
    assert not wrong, "name what the value is"


def test_no_two_types_have_one_name() -> None:
    aliases = Counter(name for path in house.modules().values() for name in set(types(house.tree(path))))
    assert {name for name, count in aliases.items() if count > 1} == set()


def types(tree: ast.Module) -> Iterator[str]:
    """Classes, and aliases of types at the top of a module."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            yield from (name for name in names if re.fullmatch(r"[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*", name))


def docstrings(tree: ast.AST) -> Iterator[str]:
    """Yield the docstrings of modules, classes, functions, attributes and constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value


def written(path: Path) -> int:
    """Count the words of a page, without the table that `python -m bench table` writes into it."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    return len((before + rest.partition(END)[2] if begin else text).split())


def test_prose_stays_short() -> None:
    trees = [house.tree(path) for path in house.modules().values()]
    pages = [path for path in (ROOT / "docs").rglob("*.md") if path.name != "recipe.md"]
    statements = sum(isinstance(node, ast.stmt) for tree in trees for node in ast.walk(tree))
    assert sum(len(text.split()) for tree in trees for text in docstrings(tree)) <= 1.62 * statements
    assert sum(isinstance(node, ast.Name) and node.id == "Any" for tree in trees for node in ast.walk(tree)) <= 500
    assert len(pages) <= 15
    assert sum(map(written, pages)) <= 28_100
    assert written(ROOT / "README.md") <= 1_000
