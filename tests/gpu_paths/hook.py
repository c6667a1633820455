"""Modules of fulltune as they are imported: with a note at each place that touches a GPU, or with a switch that breaks
it.

Only in this process: what a test starts as a process of its own is neither noted nor broken.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.machinery
import re
import sys
from collections.abc import Callable, Sequence
from types import CodeType, ModuleType
from typing import Any

from tests.gpu_paths import sites
from tests.gpu_paths.sites import Site

NOTE, SWITCH = "_note_of_gpu_paths", "_switch_of_gpu_paths"
Rewrite = Callable[[Site, ast.expr], ast.expr]
"""What stands in the place of a site's expression."""
Note = Callable[[Site, bool], None]
"""Told of a site that was executed, and whether it went the GPU's way."""

is_broken: list[tuple[Site, int]] = []
"""The place that is broken now, in which of its ways; empty: none is."""
DECISIONS = re.compile(r"^(is_available|is_initialized|is_out_of_memory|is_autocast_enabled|autocast|getattr)$")
"""What gives nothing, or a context that does nothing, where there is no GPU or the format is fp32."""
OTHERWISE = {"cuda": "cpu", "mps": "cpu", "rocm": "cuda", "nccl": "gloo", "fp16": "fp32"}
"""In the place of a text that chooses."""


class Imports(importlib.machinery.PathFinder):
    """First in `sys.meta_path`: reads modules with sites anew, rewritten."""

    def __init__(self, rewrite: Rewrite, note: Note) -> None:
        self._rewrite, self._note = rewrite, note
        self._modules = {site.module for site in sites.all_sites()}

    def find_spec(  # type: ignore[override]  # theirs is a class method
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._modules:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = _Rewritten(fullname, spec.origin, self._rewrite, self._note)
        return spec

    def install(self) -> None:
        """From now on; nothing of fulltune may be imported yet."""
        assert "fulltune" not in sys.modules, "fulltune was imported before its places could be found in it"
        sys.meta_path.insert(0, self)


class _Rewritten(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, rewrite: Rewrite, note: Note) -> None:
        super().__init__(name, path)
        self._rewrite, self._note, self._sites = rewrite, note, dict[int, Site]()

    def get_code(self, fullname: str) -> CodeType:
        tree = ast.parse(self.get_data(self.path))
        found = sites.sites_of(fullname, tree)
        self._sites = {site.number: site for site, _ in found}
        changed = _Change({id(node): site for site, node in found}, self._rewrite).visit(tree)
        return compile(ast.fix_missing_locations(changed), self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        def note(number: int, value: Any = None) -> Any:
            self._note(self._sites[number], True)
            return value

        def note_if(number: int, value: Any) -> Any:
            self._note(self._sites[number], bool(value) and not isinstance(value, contextlib.nullcontext))
            return value

        def note_read(number: int, value: str) -> str:
            return _Noted(value, lambda: self._note(self._sites[number], True))

        def switch(number: int) -> int | None:
            return is_broken[0][1] if is_broken and is_broken[0][0] == self._sites[number] else None

        vars(module).update({NOTE: note, f"{NOTE}_if": note_if, f"{NOTE}_read": note_read, SWITCH: switch})
        super().exec_module(module)


class _Noted(str):
    """A key of a table at a module's top, which nobody executes: noted when somebody looks it up."""

    def __new__(cls, value: str, note: Callable[[], None]) -> _Noted:
        made = super().__new__(cls, value)
        made.note = note  # type: ignore[attr-defined]  # set on their loader
        return made

    def __eq__(self, other: object) -> bool:
        equal = str.__eq__(self, other) is True
        if equal:
            self.note()  # type: ignore[attr-defined]  # set above
        return equal

    __hash__ = str.__hash__


class _Change(ast.NodeTransformer):
    def __init__(self, places: dict[int, Site], rewrite: Rewrite) -> None:
        self._places, self._rewrite = places, rewrite

    def visit(self, node: ast.AST) -> Any:
        site = self._places.get(id(node))
        changed = super().visit(node)
        if site is None or not isinstance(changed, ast.expr):
            return changed
        return ast.copy_location(self._rewrite(site, changed), node)

    def visit_match_case(self, node: ast.match_case) -> ast.match_case:
        """A pattern cannot call anything: what it decides is noted in its block, and it is broken by a guard."""
        pattern = node.pattern
        value = pattern.value if isinstance(pattern, ast.MatchValue) else None
        self.generic_visit(node)
        if isinstance(pattern, ast.MatchValue) and value is not None and pattern.value is not value:
            changed, pattern.value = pattern.value, value
            if isinstance(changed, ast.IfExp):
                node.guard = _not(changed.test)
            else:
                node.body.insert(0, ast.Expr(changed))
        return node


def noted(site: Site, node: ast.expr) -> ast.expr:
    """The expression, and a note that it was evaluated; a decision's only where it goes the GPU's way."""
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.NotEq):
        return _not(_call(f"{NOTE}_if", site, _not(node)))
    if not site.function and isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _call(f"{NOTE}_read", site, node)
    return _call(f"{NOTE}_if" if _decides(node) else NOTE, site, node)


def switched(site: Site, node: ast.expr) -> ast.expr:
    """The expression, or the wrong one that `is_broken` asks for."""
    for way, wrong in enumerate(broken(node)):
        asked = ast.Compare(ast.Call(ast.Name(SWITCH, ast.Load()), [ast.Constant(site.number)], []), [ast.Eq()], [])
        asked.comparators = [ast.Constant(way)]
        node = ast.IfExp(asked, wrong, node)
    return node


def _call(name: str, site: Site, node: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), [ast.Constant(site.number), node], [])


def _not(node: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), node)


def _decides(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return DECISIONS.search(called(node)) is not None
    return isinstance(node, (ast.Compare, ast.Name, ast.Attribute)) and not _is_function(node)


def _is_function(node: ast.expr) -> bool:
    """`torch.cuda.f`, handed on."""
    return isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.cuda.")


def called(node: ast.Call) -> str:
    """A call's last name."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def broken(node: ast.expr) -> list[ast.expr]:
    """In how many ways an expression can be wrong without a syntax error: first as if there were no GPU, then, for a
    decision, as if there always were one."""
    if isinstance(node, ast.Compare):
        never = isinstance(node.ops[0], (ast.NotEq, ast.NotIn))
        return [ast.Constant(never), ast.Constant(not never)]
    if isinstance(node, ast.Constant):
        text = isinstance(node.value, str)
        return [ast.Constant(OTHERWISE.get(node.value, f"not {node.value}") if text else not node.value)]
    if isinstance(node, ast.Call):
        return _broken_call(node)
    if _is_function(node):
        return [ast.parse("(lambda *given, **named: None)", mode="eval").body]
    text = ast.unparse(node)
    if re.search(r"scaler$|version\.|OutOfMemoryError$", text):
        return [ast.Constant(None)]
    if re.search(r"pin_memory|non_blocking", text):
        return [_not(node)]
    return [ast.Constant(False), ast.Constant(True)] if _decides(node) else [ast.Constant(None)]


def _broken_call(node: ast.Call) -> list[ast.expr]:
    name = called(node)
    if name == "getattr":
        return [ast.Constant(None)]
    if name == "scale":
        return [node.args[0]]
    if name == "GradScaler":
        return [ast.parse("__import__('torch').amp.GradScaler('cpu', enabled=False)", mode="eval").body]
    if name == "autocast":
        return [ast.parse("__import__('contextlib').nullcontext()", mode="eval").body]
    if DECISIONS.search(name):
        return [ast.Constant(False), ast.Constant(True)]
    return [ast.Constant(None if name in ("AutocastKwargs", "get_autocast_dtype") else 0)]
