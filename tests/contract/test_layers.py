"""Who may import whom: floors without circles, few modules at the top; what must stay light imports no framework."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract import house

HEAVY = {"torch", "transformers", "numpy", "datasets", "accelerate", "scipy", "sklearn", "safetensors", "pyarrow"}
FLOORS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("errors.py",), ("text.py",), ("files.py",)),
    (("recipe", "records"),),
    (("system",),),
    (("models", "stream"),),
    (("tasks",),),
    (("methods",),),
    (("inference",),),
    (("footprint",), ("probe",), ("forgetting",), ("audit/texts",), ("stats",)),
    (("plan",),),
    (
        ("data/readers", "data/remote", "data", "data/__init__", "audit", "audit/__init__"),
        ("train", "train/optim", "train/loop", "train/forgetting", "train/worker", "train/parent", "train/__init__"),
        ("evaluate",),
        ("report/format", "report/run", "report/comparison", "report/__init__"),
        ("predict",),
        ("quickstart",),
        ("launch",),
    ),
    (("pipeline.py",),),
    (("compare", "cleaning.py"), ("export",), ("push",), ("selfcheck",), ("doctor.py",), ("serve",), ("cli/show",)),
    (("cli", "cli/__init__"), ("api.py",), ("classic",), ("lightning",)),
)
"""From the ground up. On a floor stand stacks, and in a stack rooms: one imports from lower floors, and from what is
below it in its own stack, never from a stack beside it."""
LIGHT = (
    *("errors.py", "text.py", "files.py", "recipe", "records", "audit/texts", "plan", "launch"),
    *("report/format", "report/run", "report/comparison", "report/__init__"),
)
"""Rooms that import no framework: help, errors of recipes, plans and reports answer at once."""
ROOMS = [room for floor in FLOORS for stack in floor for room in stack]


def below(room: str) -> set[str]:
    """The rooms from which one may import."""
    allowed: set[str] = set()
    for floor in FLOORS:
        for stack in floor:
            if room in stack:
                return allowed | set(stack[: stack.index(room)])
        allowed |= {name for stack in floor for name in stack}
    raise AssertionError(f"{room} has no floor")


def test_every_room_stands_on_one_floor() -> None:
    assert len(set(ROOMS)) == len(ROOMS)
    assert {house.room(module) for module in house.modules()} == set(ROOMS)


@pytest.mark.parametrize("module", house.modules())
def test_imports_of_each_module_go_down_only(module: str) -> None:
    upward = house.rooms_imported(module) - below(house.room(module))
    assert not upward, f"{house.room(module)} imports {sorted(upward)}"


def test_no_room_and_no_module_is_in_a_circle() -> None:
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert house.circles(house.arrows()) == []
    assert house.circles({module: house.modules_imported(module) for module in house.modules()}) == []


def test_top_level_has_few_modules() -> None:
    assert sum(room.endswith(".py") for room in ROOMS) <= 7


def test_a_class_name_means_one_thing() -> None:
    assert house.classes_of_one_name() == {}


def test_functions_and_files_stay_short() -> None:
    length, name = house.longest_function()
    assert length <= 80, name
    length, name = house.longest_file()
    assert length <= 450, name


def test_architecture_page_has_these_floors_and_no_others() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| *(\d*) *\| `([^|]+?)` *\|", page, flags=re.MULTILINE)
    number, told = "", set()
    for given, names in rows:
        number = given or number
        told.add((int(number), tuple(names.split("`, `"))))
    floors = {
        (number, tuple(dict.fromkeys(room.removesuffix("/__init__") for room in stack)))
        for number, floor in enumerate(FLOORS)
        for stack in floor
    }
    assert told == floors


@pytest.mark.parametrize("room", LIGHT)
def test_light_room_imports_no_framework(room: str) -> None:
    names = [name for module in house.modules() if house.room(module) == room for name in _roots(module)]
    assert names
    assert not set(names) & HEAVY


def _roots(module: str) -> list[str]:
    return [name.split(".")[0] for name in house.imports(house.modules()[module], at_run_time=True)]


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


def test_line_of_a_run_imports_torch_only_when_a_model_is_planned() -> None:
    code = "import sys, fulltune.pipeline\nprint(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
