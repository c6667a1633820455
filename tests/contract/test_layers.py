"""Who may import whom: floors without circles, and what must stay light imports no framework."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fulltune

SOURCE = Path(fulltune.__file__).parent
HEAVY = {"torch", "transformers", "numpy", "datasets", "accelerate", "scipy", "sklearn", "safetensors", "pyarrow"}
FLOORS = (
    ("errors", "text", "files"),
    ("recipe",),
    ("records",),
    ("system",),
    ("models",),
    ("tasks",),
    ("methods",),
    ("inference",),
    ("footprint",),
    ("stats",),
    ("plan",),
    ("data/readers",),
    ("data", "evaluate", "train", "report", "predict", "quickstart"),
    ("context",),
    ("pipeline",),
    ("compare", "selfcheck"),
    ("cli/show", "classic"),
    ("api",),
    ("cli",),
)
"""From the ground up: a room imports rooms of lower floors only, never one beside it."""
LIGHT = ("errors", "text", "files", "recipe", "records", "plan", "report")
"""Rooms that import no framework: help, errors of recipes, plans and reports answer at once."""


def room(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return "/".join(parts[:2]) if "/".join(parts[:2]) in sum(FLOORS, ()) else parts[0]


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def imports(path: Path, *, inside_functions: bool = True) -> Iterator[str]:
    """Dotted names that a file imports; what is imported for type checkers only does not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not inside_functions:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting += ast.iter_child_nodes(node)


def rooms_imported(path: Path) -> set[str]:
    names = (name.split(".")[1:] for name in imports(path) if name.startswith("fulltune."))
    return {room(SOURCE.joinpath(*parts)) for parts in names} - {room(path)}


def test_every_room_has_its_floor() -> None:
    assert {room(path) for path in modules()} == set(sum(FLOORS, ()))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_of_each_module_go_down_only(path: Path) -> None:
    floor = next(number for number, floor in enumerate(FLOORS) if room(path) in floor)
    below = set(sum(FLOORS[:floor], ()))
    assert rooms_imported(path) <= below, f"{room(path)} imports {sorted(rooms_imported(path) - below)}"


@pytest.mark.parametrize("name", LIGHT)
def test_light_room_imports_no_framework(name: str) -> None:
    files = [path for path in modules() if room(path) == name]
    assert files
    found = {f"{path.name}: {name}" for path in files for name in imports(path) if name.split(".")[0] in HEAVY}
    assert not found


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], ["run", "bad.yaml"]], ids=" ".join)
def test_command_that_needs_no_model_imports_no_framework(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "bad.yaml").write_text("model: x\ntsk: y\n")
    code = (
        "import sys\nfrom fulltune.cli import app as cli\n"
        f"sys.argv = ['fulltune', *{arguments!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'datasets', 'accelerate', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"
