"""`fulltune schema` accepts what fulltune accepts and refuses its typos; shells complete commands at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fulltune.errors import RecipeError
from fulltune.recipe.file import check_recipe
from fulltune.recipe.schema import recipe_schema
from tests.contract.command import fulltune

ROOT = Path(__file__).parents[2]
BASE: dict[str, Any] = {"model": "m", "task": "text-classification", "data": {"train": "t.csv"}}


class EditorLoader(yaml.SafeLoader):
    """Reads 2e-4 as a number, as YAML 1.2 and so editors do."""


EditorLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def shown_recipes() -> list[tuple[str, dict[str, Any]]]:
    """Recipes of the examples, the package and the documentation, whose parts are completed."""
    files = sorted([*(ROOT / "examples").glob("*.yaml"), *(ROOT / "src" / "fulltune" / "quickstart").glob("*.yaml")])
    texts = [(path.name, path.read_text(encoding="utf-8")) for path in files]
    for page in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]):
        blocks = re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        texts += [(f"{page.name} {number}", block) for number, block in enumerate(blocks)]
    recipes = [(name, yaml.load(text, EditorLoader)) for name, text in texts]  # a SafeLoader
    whole = [(name, BASE | recipe) for name, recipe in recipes]
    return [(name, recipe | {"data": BASE["data"] | recipe["data"]}) for name, recipe in whole]


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="the extra dev is not installed")
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def accepted(recipe: dict[str, Any]) -> bool:
    try:
        check_recipe(recipe, Path("recipe.yaml"))
    except RecipeError:
        return False
    return True


@pytest.mark.parametrize(("name", "recipe"), shown_recipes(), ids=[name for name, _ in shown_recipes()])
def test_recipes_that_are_shown_are_valid(name: str, recipe: dict[str, Any], validator: Any) -> None:
    assert [error.message for error in validator.iter_errors(recipe)] == []


def test_there_are_recipes_to_check() -> None:
    assert len(shown_recipes()) > 40


@pytest.mark.parametrize(
    "changed",
    [
        {"model": {"name": "m", "dropout": 0.1}},
        {"method": "lora"},
        {"method": {"learning_rate": 0.001}},
        {"method": {"learning_rate": "search"}},
        {"method": {"kind": "lora", "target_modules": ["q_proj"]}},
        {"methods": ["full", "lora", {"kind": "prompt", "num_virtual_tokens": 5}, "base"]},
        {"methods": ["lora", "full", {"kind": "full", "name": "smooth", "train": {"label_smoothing_factor": 0.1}}]},
        {"data": {"train": ["a.csv", {"path": "b.csv", "weight": 0.05}]}},
        {"data": {"train": ["a.csv", {"path": "b.csv"}]}},
        {"data": {"train": {"path": "a.csv"}}},
        {"data": {"train": "a.csv", "eval": None}},
        {"train": {"report_to": "wandb"}},
        {"train": {"report_to": ["wandb", "mlflow"], "hang_timeout": None, "extra": {"deepspeed": {"a": 1}}}},
        {"train": {"class_weights": {"rare": 5}}},
        {"preserve": {"budget": "1%"}},
        {"preserve": {"budget": 0.01}},
    ],
    ids=json.dumps,
)
def test_forms_that_may_be_written_are_valid(changed: dict[str, Any], validator: Any) -> None:
    assert accepted(BASE | changed)
    assert validator.is_valid(BASE | changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"modell": "m"},
        {"model": {"nam": "m"}},
        {"model": ["m"]},
        {"task": "classification"},
        {"data": {}},
        {"data": "t.csv"},
        {"data": {"train": "t.csv", "lable": "y"}},
        {"data": {"train": [{"file": "b.csv"}]}},
        {"data": {"train": "t.csv", "eval_fraction": 0.7}},
        {"method": "laro"},
        {"method": "base"},
        {"method": {"kind": "full", "rank": 8}},
        {"method": {"kind": "lora", "rank": 0}},
        {"method": {"learning_rate": "fast"}},
        {"methods": ["full", "laro"]},
        {"methods": ["full", {"rank": 8}]},
        {"methods": "full"},
        {"methods": ["lora", {"kind": "full", "train": {"weight_decoy": 0.1}}]},
        {"train": {"num_train_epoch": 3}},
        {"train": {"num_train_epochs": "three"}},
        {"train": {"max_steps": 1.5}},
        {"train": {"precision": "bf8"}},
        {"train": {"report_to": {"wandb": True}}},
        {"train": None},
        {"evaluate": {"confidence": 95}},
        {"name": "my run"},
    ],
    ids=json.dumps,
)
def test_typos_and_wrong_types_are_refused(changed: dict[str, Any], validator: Any) -> None:
    assert not accepted(BASE | changed)
    assert not validator.is_valid(BASE | changed)


@pytest.mark.parametrize("missing", BASE)
def test_what_is_required_is_missed(missing: str, validator: Any) -> None:
    assert not validator.is_valid({name: value for name, value in BASE.items() if name != missing})


def test_editors_can_explain_every_setting() -> None:
    schema = recipe_schema()
    assert schema["additionalProperties"] is False
    blocks = schema["$defs"]
    for name, block in blocks.items():
        assert block["additionalProperties"] is False, name
        assert all("description" in setting for setting in block["properties"].values()), name
    for name, setting in schema["properties"].items():
        referenced = blocks.get(setting.get("$ref", "").rpartition("/")[2], {})
        assert {**referenced, **setting}.get("description"), name


def test_schema_is_printed_or_written(tmp_path: Path) -> None:
    expected = json.loads(json.dumps(recipe_schema()))
    assert json.loads(fulltune("schema").out) == expected
    file = tmp_path / "recipe.schema.json"
    assert fulltune("schema", "-o", file).out == ""
    assert json.loads(file.read_text(encoding="utf-8")) == expected
    assert fulltune("schema", "-o", tmp_path).code == 2


COMPLETING = """
import atexit, sys
atexit.register(lambda: print("torch" in sys.modules, file=sys.stderr))
sys.argv[:] = ["fulltune"]
from fulltune.cli.app import main
main()
"""


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("fulltune pre", ["predict"]),
        ("fulltune s", ["schema", "selfcheck"]),
        ("fulltune predict --me", ["--method"]),
        ("fulltune run rec", []),  # the shell's own: files
    ],
)
def test_shell_completes_commands_without_importing_torch(typed: str, completed: list[str]) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), "_FULLTUNE_COMPLETE": "complete_bash"}
    result = subprocess.run(
        [sys.executable, "-c", COMPLETING], env={**os.environ, **words}, capture_output=True, text=True, check=False
    )
    assert (result.returncode, set(completed) <= set(result.stdout.split())) == (0, True)
    assert bool(result.stdout.split()) == bool(completed)
    assert result.stderr.strip() == "False"


def test_help_that_offers_completion_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    lines = fulltune("--help").out.splitlines()
    assert any("--install-completion" in line for line in lines)
    assert max(map(len, lines)) <= 80
