"""Every place in src that touches a GPU, found in its syntax by the rules below, never by a list.

A place is an expression: `torch.cuda.memory_reserved()`, `device == "cuda"`, the value of `pin_memory=`. What only
speaks of a GPU is none: docstrings, annotations, tables from text to text, and arithmetic over records of cards.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CHIPS = ("cuda", "mps", "accelerator", "xpu")
"""Modules of torch: `torch.cuda`, also below `torch.backends` and `torch.version`."""
WORDS = re.compile(
    r"(cuda|mps|rocm|nccl|fp16|OutOfMemoryError|expandable_segments:.*|(CUDA|HIP|NCCL|PYTORCH(_CUDA|_HIP)?)_[A-Z_]+)"
)
"""Texts by which code decides, and what a GPU's libraries read in the environment."""
CALLS = re.compile(
    r"autocast|GradScaler|^(synchronize|record_stream|empty_cache|(?-i:Stream)|pin_memory|is_out_of_memory)$", re.I
)
VALUES = re.compile(r"pin_memory|non_blocking|expandable_segments")
"""Names of arguments and settings whose value a GPU acts upon."""
NAMES = re.compile(r"^_?(on|has|n)_gpus?$|^_?(grad_)?scaler$|^fp16$|^OutOfMemoryError$")
"""Variables and attributes that hold such a decision; `getattr` with such a name as well."""


@dataclass(frozen=True)
class Site:
    """A place; `number` counts those of its module, so that nothing but the code's order decides."""

    module: str
    number: int
    function: str
    """With its class, such as `Meter.begin`; empty at the module's top."""
    line: int
    text: str
    """Its source, for people."""

    @property
    def name(self) -> str:
        """`system/memory.py: Meter.begin`, which a change elsewhere in the file leaves alone."""
        return f"{path_of(self.module)}: {self.function or 'at its top'}"


def root() -> Path:
    """The package's folder, found without importing it."""
    spec = importlib.util.find_spec("fulltune")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def path_of(module: str) -> str:
    """Of a module's dotted name, the file as people write it: `train/loop/trainer.py`."""
    folder = root() / Path(*module.split(".")[1:])
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return file.relative_to(root()).as_posix()


@cache
def all_sites() -> tuple[Site, ...]:
    """Of the whole package, in the order of files and lines."""
    found = []
    for file in sorted(root().rglob("*.py")):
        parts = ("fulltune", *file.relative_to(root()).with_suffix("").parts)
        module = ".".join(parts).removesuffix(".__init__")
        found += [site for site, _ in sites_of(module, ast.parse(file.read_text(encoding="utf-8")))]
    return tuple(found)


def sites_of(module: str, tree: ast.Module) -> list[tuple[Site, ast.expr]]:
    """Those of a module, each with its node."""
    finder = _Finder()
    finder.visit(tree)
    places = sorted(finder.found, key=lambda one: (one[0].lineno, one[0].col_offset, -(one[0].end_col_offset or 0)))
    return [
        (Site(module, number, ".".join(scope), node.lineno, " ".join(ast.unparse(node).split())), node)
        for number, (node, scope) in enumerate(places)
    ]


class _Finder(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: list[tuple[ast.expr, tuple[str, ...]]] = []
        self._above: list[ast.AST] = []
        self._scope: tuple[str, ...] = ()

    def generic_visit(self, node: ast.AST) -> None:
        self._above.append(node)
        super().generic_visit(node)
        self._above.pop()

    def visit(self, node: ast.AST) -> None:
        place = self._place(node) if isinstance(node, ast.expr) else None
        for found in (*_valued(node), *([] if place is None else [place])):
            if all(found is not known for known, _ in self.found):
                self.found.append((found, self._scope))
        super().visit(node)

    def _in_scope(self, node: ast.ClassDef | ast.FunctionDef) -> None:
        before, self._scope = self._scope, (*self._scope, node.name)
        self._above.append(node)
        for field, value in ast.iter_fields(node):
            if field != "returns":
                for one in value if isinstance(value, list) else [value]:
                    if isinstance(one, ast.AST):
                        self.visit(one)
        self._above.pop()
        self._scope = before

    visit_ClassDef = visit_FunctionDef = _in_scope

    def visit_arg(self, node: ast.arg) -> None:
        """Its annotation decides nothing."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._above.append(node)
            self.visit(node.value)
            self._above.pop()

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if not (isinstance(node.value, ast.Name) and node.value.id == "Literal"):
            self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        texts = [value for value in node.values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
        if len(texts) < len(node.values) or not texts:  # a table from text to text is for people
            self.generic_visit(node)

    def _place(self, node: ast.expr) -> ast.expr | None:
        """The expression that a node makes a place of: itself, or the comparison or chain of calls it begins."""
        above = self._above[-1] if self._above else None
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and WORDS.fullmatch(node.value):
            if isinstance(above, ast.Call) and _called(above) == "getattr":
                return above
            return above if isinstance(above, ast.Compare) else node
        if isinstance(node, ast.Attribute) and _is_chip(node):
            return self._whole(node)
        if isinstance(node, ast.Call) and CALLS.search(_called(node)):
            return node
        if isinstance(node, ast.Call) and _called(node) in ("getattr", "hasattr") and len(node.args) > 1:
            asked = node.args[1]
            return node if isinstance(asked, ast.Constant) and NAMES.search(str(asked.value)) else None
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        if name and isinstance(getattr(node, "ctx", None), ast.Load) and NAMES.search(name):
            return None if isinstance(above, ast.keyword) and VALUES.search(above.arg or "") else self._whole(node)
        return None

    def _whole(self, node: ast.expr) -> ast.expr:
        """`torch.cuda` with what follows it: attributes, calls, items."""
        for above in reversed(self._above):
            goes_on = (
                (isinstance(above, ast.Attribute) and above.value is node)
                or (isinstance(above, ast.Call) and above.func is node)
                or (isinstance(above, ast.Subscript) and above.value is node)
            )
            if not goes_on or isinstance(getattr(above, "ctx", None), ast.Store):
                break
            assert isinstance(above, ast.expr)
            node = above
        return node


def _valued(node: ast.AST) -> Iterator[ast.expr]:
    """Values given to an argument, a key or an attribute that a GPU acts upon."""
    if isinstance(node, ast.keyword) and VALUES.search(node.arg or ""):
        yield node.value
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and VALUES.search(str(key.value)) and not _is_text(value):
                yield value
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            name = target.slice if isinstance(target, ast.Subscript) else target
            said = name.value if isinstance(name, ast.Constant) else getattr(name, "attr", "")
            if isinstance(said, str) and VALUES.search(said):
                yield node.value


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_chip(node: ast.Attribute) -> bool:
    return node.attr in (*CHIPS, "hip") and ast.unparse(node.value) in ("torch", "torch.backends", "torch.version")


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


if __name__ == "__main__":
    for one in all_sites():
        print(f"{path_of(one.module)}:{one.line} {one.function}: {one.text}")
    print(len(all_sites()), "sites")
