"""The command line's shape: verbs, help, JSON on stdout, and `init` that writes recipes which load."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from fulltune.cli.app import app
from fulltune.recipe.file import load_recipe
from tests import tiny
from tests.contract.command import assert_same_facts, fulltune

VERBS = [str(command.name or getattr(command.callback, "__name__", "")) for command in app.registered_commands]


def test_help_lists_every_verb() -> None:
    result = fulltune("--help")
    assert result.code == 0
    listed = re.findall(r"^│ (\w+) ", result.out, re.MULTILINE)
    assert [name for name in listed if name in VERBS] == VERBS
    assert len(VERBS) >= 12


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("run tickets.csv", "'fulltune init tickets.csv'"),
        (
            "init stanfordnlp/imdb",
            "stanfordnlp/imdb: no copy is in the cache, and HF_HUB_OFFLINE forbids to ask the Hub; unset it",
        ),
    ],
)
def test_what_was_meant_is_answered(
    arguments: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tickets.csv").write_text("text,label\na,b\n", encoding="utf-8")
    assert_same_facts(fulltune(*arguments.split()).problems, [problem])


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_verb_is_shown(verb: str) -> None:
    result = fulltune(verb, "--help")
    assert result.code == 0
    assert re.search(rf"Usage: .* {verb} \[OPTIONS\]", result.out)


def test_version_is_the_packages() -> None:
    assert fulltune("--version").out.strip() == metadata.version("fulltune")


@pytest.mark.parametrize("arguments", [["frobnicate"], ["data"], ["data", "x.yaml", "--nope"]], ids=" ".join)
def test_usage_wrong_exits_2(arguments: list[str]) -> None:
    result = fulltune(*arguments)
    assert result.code == 2
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("run x.yaml --learning-rate 1e-4", "--set method.learning_rate=1e-4"),
        ("train x.yaml --lr=1e-4", "--set method.learning_rate=1e-4"),
        ("compare x.yaml --num-epochs 3", "--set train.num_train_epochs=3"),
        ("run x.yaml --batch-size 8", "--set train.global_batch_size=8"),
        ("run x.yaml --max-step 8", "--set train.max_steps=8"),
        ("run x.yaml --ddp-timeout 60", "--set train.extra.ddp_timeout=60"),
        ("plan x.yaml --max-steps", "--set train.max_steps=VALUE"),
        ("train x.yaml --model bert --fresh", "--set model=bert"),
        ("train x.yaml --frobnicate 8", "--set block.name=value"),
    ],
)
def test_setting_given_as_an_option_is_answered_with_set(arguments: str, meant: str) -> None:
    result = fulltune(*arguments.split())
    assert result.code == 2
    assert len(result.problems) == 1
    assert meant in result.problems[0]


@pytest.mark.parametrize("arguments", ["run x.yaml --fres", "predict x --learning-rate 2"])
def test_option_near_another_or_of_a_command_without_settings_is_answered_as_usual(arguments: str) -> None:
    result = fulltune(*arguments.split())
    assert result.code == 2
    assert "No such option" in result.err
    assert "--set" not in result.err


ODD = [{"yes": number, "text": f"text {number}", "label": "ab"[number % 2]} for number in range(20)]


@pytest.mark.parametrize(
    ("name", "rows", "task", "columns"),
    [
        ("train.csv", tiny.topic_rows(20), "text-classification", {"text": "text", "label": "label"}),
        ("train.jsonl", tiny.chat_rows(20), "causal-lm", {"messages": "messages"}),
        ("pairs.jsonl", tiny.pair_rows(20), "causal-lm", {"prompt": "prompt", "completion": "completion"}),
        ("odd: name #1.csv", ODD, "text-classification", {"text": "text", "label": "label"}),
        (
            "scores.csv",
            [{"sentence": f"a {n}", "score": n + 0.5} for n in range(20)],
            "text-classification",
            {"text": "sentence", "label": "score"},
        ),
    ],
)
def test_init_writes_a_recipe_that_loads(
    tmp_path: Path, name: str, rows: list[dict[str, Any]], task: str, columns: Mapping[str, str]
) -> None:
    path = tmp_path / name
    (tiny.write_csv if name.endswith("csv") else tiny.write_jsonl)(path, rows)
    result = fulltune("init", path, "-o", tmp_path / "new" / "recipe.yaml")
    assert result.code == 0, result.err
    recipe = load_recipe(tmp_path / "new" / "recipe.yaml")
    assert recipe.task == task
    assert recipe.data.task_files == (str(path),)
    assert {role: getattr(recipe.data, role) for role in columns} == columns


def test_init_existing_recipe_is_kept_unless_forced(tmp_path: Path) -> None:
    data, recipe = tiny.write_csv(tmp_path / "train.csv", tiny.topic_rows(20)), tmp_path / "recipe.yaml"
    recipe.write_text("mine")
    result = fulltune("init", data, "-o", recipe)
    assert result.code == 2
    assert result.problems == [f"{recipe}: already exists; replace it with --force, or give another name with --output"]
    assert recipe.read_text() == "mine"
    assert fulltune("init", data, "-o", recipe, "--force").code == 0


def test_init_output_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    data = tiny.write_csv(tmp_path / "train.csv", tiny.topic_rows(20))
    result = fulltune("init", data, "-o", tmp_path, "--force")
    assert result.code == 2
    assert result.problems == [f"{tmp_path}: cannot be written (is a directory); choose another folder"]


def test_init_unknown_form_of_data_is_refused(tmp_path: Path) -> None:
    data = tiny.write_csv(tmp_path / "train.csv", [{"a": 1, "b": 2}])
    result = fulltune("init", data, "-o", tmp_path / "recipe.yaml")
    assert result.code == 4
    assert result.problems == [
        f"{data}: its columns fit no task: expected columns text + label (classification), tokens + tags (entities), "
        "prompt + completion or messages (language model), question + context + answers, source + target, choices + "
        "label, image + label, or only text; columns in the file: a, b"
    ]


@pytest.fixture
def recipe(tmp_path: Path, tiny_encoder: Path) -> Path:
    tiny.write_csv(tmp_path / "train.csv", tiny.topic_rows(40))
    return tiny.write_recipe(tmp_path / "recipe.yaml", tiny_encoder, "train.csv")


def test_refused_command_leaves_no_run_folder(recipe: Path, tmp_path: Path) -> None:
    for setting in ("model=/no/such/folder", "data.train=no.csv", "data.text=no_such_column"):
        assert fulltune("data", recipe, "--set", setting).code in (2, 4)
    assert not list((tmp_path / "runs").glob("[!.]*"))


def test_data_json_is_the_summary_and_alone_on_stdout(recipe: Path) -> None:
    summary = json.loads(fulltune("data", recipe, "--json").out)
    assert summary["labels"] == ["food", "weather"]
    assert {name: split["rows"] for name, split in summary["splits"].items()} == {"train": 32, "eval": 4, "test": 4}


def test_command_repeated_continues_its_run_and_fresh_starts_another(recipe: Path) -> None:
    for expected, arguments in ((1, []), (1, []), (2, ["--fresh"])):
        assert fulltune("data", recipe, *arguments).code == 0
        assert len(list(recipe.parent.glob("runs/[!.]*"))) == expected


def test_run_folder_as_target_with_overrides_is_refused(recipe: Path) -> None:
    run = recipe.parent / "mine"
    assert fulltune("data", recipe, "--run-folder", run).code == 0
    result = fulltune("data", run, "--set", "train.seed=1")
    assert result.code == 2
    assert result.problems == [
        f"{run}: is a run folder, so its settings cannot be changed; for other settings, pass the recipe instead"
    ]


def test_override_changes_the_setting(recipe: Path) -> None:
    plan = json.loads(fulltune("plan", recipe, "--json", "--set", "method.learning_rate=3e-4").out)
    assert plan["learning_rate"] == 3e-4


def test_quickstart_starts_anew_when_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[bool] = []
    monkeypatch.setattr("fulltune.quickstart.write_example", lambda folder, chat: folder / "topics.yaml")
    monkeypatch.setattr("fulltune.cli.app.run", lambda recipe, set_, fresh: started.append(fresh))
    for given in ((), ("--fresh",)):
        assert fulltune("quickstart", "--output", tmp_path, *given).code == 0
    assert started == [False, True]
