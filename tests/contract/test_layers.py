"""Who may import whom: layer 0 knows nothing, stages never import each other, help and recipe errors need no torch."""

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
VOCABULARY = {
    *("errors", "units", "recipe", "recipe_file", "recipe_rules", "recipe_elsewhere"),
    *("records", "compare_records", "trials"),
}
WORLD = {
    *(
        "hardware",
        "model",
        "checkpoint_head",
        "inference",
        "store",
        "bootstrap",
        "calibration",
        "run_folder",
        "methods",
        "tasks",
        "packing",
        "processors",
        "zero",
        "selective_head",
        "chunked_loss",
        "out_of_memory",
        "meter",
        "footprint",
        "tracing",
        "traced_case",
        "traced_whole",
        "rough_footprint",
        "generic_text",
    ),
}
STAGES = {"plan", "data", "train", "evaluate", "compare", "report", "predict", "init", "samples", "quickstart"}
PIPELINE = {"pipeline", "comparing"}
SURFACE = {
    *("display", "display_plan", "display_measure", "display_compare"),
    *("cli", "cli_plan", "cli_predict", "cli_predict_files", "cli_compare"),
    *("classic", "api", "selfcheck"),
}
ALLOWED = {
    ("init", "data"): "a recipe is written from rows, and only the data stage's readers know files",
    ("quickstart", "samples"): "the example is its data and its recipe",
}
"""Stages that import another, each with its reason."""


def room(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


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
    return {name.split(".")[1] for name in imports(path) if name.startswith("fulltune.")} - {room(path)}


def test_rooms_all_have_a_layer() -> None:
    assert {room(path) for path in modules()} <= VOCABULARY | WORLD | STAGES | PIPELINE | SURFACE


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_of_each_module_go_down_only(path: Path) -> None:
    here, found = room(path), rooms_imported(path)
    if here in VOCABULARY:
        below = VOCABULARY
    elif here in WORLD:
        below = VOCABULARY | WORLD
    elif here in STAGES:
        below = VOCABULARY | WORLD | {other for stage, other in ALLOWED if stage == here}
    elif here in PIPELINE:
        # A comparison is made of the same stages, some of them by way of the line of a single run.
        below = VOCABULARY | WORLD | STAGES | ({"pipeline"} if here == "comparing" else set())
    else:
        below = VOCABULARY | WORLD | STAGES | PIPELINE | SURFACE
    assert found <= below, f"{here} imports {sorted(found - below)}"


@pytest.mark.parametrize("name", sorted(VOCABULARY))
def test_vocabulary_imports_no_framework(name: str) -> None:
    assert not {found.split(".")[0] for found in imports(SOURCE / f"{name}.py")} & HEAVY


@pytest.mark.parametrize("path", sorted((SOURCE / "plan").glob("*.py")), ids=lambda path: path.name)
def test_plan_imports_no_framework(path: Path) -> None:
    assert not {found.split(".")[0] for found in imports(path)} & HEAVY


@pytest.mark.parametrize(("pair", "reason"), ALLOWED.items())
def test_exception_is_still_needed(pair: tuple[str, str], reason: str) -> None:
    stage, other = pair
    files = [path for path in modules() if room(path) == stage]
    assert reason
    assert any(other in rooms_imported(path) for path in files), f"{stage} no longer imports {other}"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], ["run", "bad.yaml"]], ids=" ".join)
def test_command_that_needs_no_model_imports_no_framework(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "bad.yaml").write_text("model: x\ntsk: y\n")
    code = (
        "import sys\nfrom fulltune import cli\n"
        f"sys.argv = ['fulltune', *{arguments!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'datasets', 'accelerate', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"
