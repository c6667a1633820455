"""The structure of the source in numbers: `python -m tests.contract.house` prints them.

Rooms are folders; a package with folders in it is a room of its own modules, and its `__init__.py` one more, on top.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import fulltune

SOURCE = Path(fulltune.__file__).parent
ModuleName = str
Room = str


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def modules() -> Mapping[ModuleName, Path]:
    """Every module but the package's own face, by its dotted name without `fulltune.`."""
    paths = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")
    return {".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def room(module: ModuleName) -> Room:
    """Where a module lies: `train/worker`, `train` for what its folders share, `train/__init__`, a file at the top."""
    path = modules()[module]
    folder = path.parent
    if folder == SOURCE:
        return path.name
    name = folder.relative_to(SOURCE).as_posix()
    has_rooms = any((inner / "__init__.py").exists() for inner in folder.iterdir())
    return f"{name}/__init__" if path.stem == "__init__" and has_rooms else name


def imports(path: Path, at_run_time: bool = False) -> Iterator[str]:
    """Dotted names that a file imports, inside functions too, and those that only type checkers see."""
    waiting: list[ast.AST] = [tree(path)]
    while waiting:
        node = waiting.pop()
        if at_run_time and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_imported(module: ModuleName) -> set[ModuleName]:
    """Other modules of the project that a module imports."""
    own = (name.removeprefix("fulltune.") for name in imports(modules()[module]) if name.startswith("fulltune."))
    known = modules()
    # `fulltune.data.prepare` is a module, and in `from fulltune.data import Limits` the last part is not.
    found = (name if name in known else name.rpartition(".")[0] for name in own)
    return {name for name in found if name} - {module}


def rooms_imported(module: ModuleName) -> set[Room]:
    """Other rooms that a module imports from."""
    return {room(name) for name in modules_imported(module)} - {room(module)}


def arrows() -> dict[Room, set[Room]]:
    """Who imports whom."""
    found: dict[Room, set[Room]] = defaultdict(set)
    for module in modules():
        found[room(module)] |= rooms_imported(module)
    return found


def circles(graph: Mapping[Room, Iterable[Room]]) -> list[Room]:
    """Rooms that reach themselves: empty when there are floors."""

    def reached(start: Room) -> set[Room]:
        seen: set[Room] = set()
        waiting = list(graph.get(start, ()))
        while waiting:
            if (here := waiting.pop()) not in seen:
                seen.add(here)
                waiting += graph.get(here, ())
        return seen

    return sorted(name for name in graph if name in reached(name))


def classes_of_one_name() -> dict[str, list[str]]:
    """Names that two classes of different modules have."""
    where = defaultdict(list)
    for module, path in modules().items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                where[node.name].append(module)
    return {name: places for name, places in where.items() if len(places) > 1}


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for module, path in modules().items():
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{module}.{node.name}", node


def longest_function() -> tuple[int, str]:
    return max(((node.end_lineno or node.lineno) - node.lineno + 1, name) for name, node in functions())


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def longest_file() -> tuple[int, str]:
    return max((lines(path), name) for name, path in modules().items())


def numbers() -> dict[str, object]:
    """What the house comes to."""
    paths = [*modules().values(), SOURCE / "__init__.py"]
    public = [node for _, node in functions() if not node.name.startswith("_")]
    per_room = Counter(room(module) for module in modules())
    return {
        "files": len(paths),
        "lines": sum(lines(path) for path in paths),
        "statements": sum(isinstance(node, ast.stmt) for path in paths for node in ast.walk(tree(path))),
        "public functions": len(public),
        "of them with a docstring": sum(ast.get_docstring(node) is not None for node in public),
        "modules beside the folders": sum(name.endswith(".py") for name in per_room),
        "rooms": len(per_room),
        "rooms in a circle": circles(arrows()),
        "modules in a circle": circles({module: modules_imported(module) for module in modules()}),
        "class names that mean two things": classes_of_one_name(),
        "longest function": longest_function(),
        "longest file": longest_file(),
    }


if __name__ == "__main__":
    for what, value in numbers().items():
        print(f"{what}: {value}")
