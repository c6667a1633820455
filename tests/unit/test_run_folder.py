"""What a run folder keeps of the command itself; one that was refused before it did anything leaves none."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from fulltune import pipeline
from fulltune.errors import DataError, DoesNotFitError, FulltuneError, InterruptedRun, SetupError
from fulltune.recipe.fields import Recipe
from fulltune.records.run import Environment
from fulltune.system import hardware, run_folder
from fulltune.system.run_folder import find_or_make_folder, lock_folder, remove_new_run_on_error
from tests import plans


def test_seconds_of_a_command_are_kept_where_it_did_everything(tmp_path: Path) -> None:
    began = time.time() - 5
    recipe = Recipe.model_validate({"model": "m", "task": "causal-lm", "data": {"train": "a"}})
    run_folder.describe_environment(hardware.measure_machine(), recipe).save(tmp_path / run_folder.ENVIRONMENT)
    for place in ("attempts/full-seed42-01/request.json", "scores/full-seed42.json"):
        run_folder.record_duration(tmp_path, began)
        assert Environment.load(tmp_path / run_folder.ENVIRONMENT).seconds is None, "no trained model is scored"
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text("{}", encoding="utf-8")
    run_folder.record_duration(tmp_path, began)
    seconds = Environment.load(tmp_path / run_folder.ENVIRONMENT).seconds
    assert seconds is not None
    assert seconds >= 5
    # A later one found the training done.
    run_folder.record_duration(tmp_path, time.time() + 60)
    assert Environment.load(tmp_path / run_folder.ENVIRONMENT).seconds == seconds


def test_stages_that_are_called_one_by_one_are_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python there may be hours between them."""
    recipe = Recipe.model_validate({"model": "m", "task": "causal-lm", "data": {"train": "a"}})
    job = pipeline.Run(recipe, tmp_path)
    for place in ("attempts/full-seed42-01/request.json", "scores/full-seed42.json"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text("{}", encoding="utf-8")
    monkeypatch.setattr(pipeline.report, "write_run_report", lambda folder: folder / "report.html")
    pipeline.write_report(job)
    assert not (tmp_path / run_folder.ENVIRONMENT).exists()


def _made(folder: Path) -> Path:
    values = {"model": "m", "task": "causal-lm", "data": {"train": "a.txt"}, "output": str(folder / "runs")}
    return find_or_make_folder(Recipe.model_validate(values), "model: m\n", "run", None, False)[0]


def _prepare(folder: Path, refusal: FulltuneError) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "summary.json").write_text("{}")
    raise refusal


@pytest.mark.parametrize(
    ("error", "kept_for", "stays"),
    [
        (SetupError, (), False),
        (DataError, (), False),
        (DoesNotFitError, (), False),
        (DoesNotFitError, (DoesNotFitError,), True),
        (InterruptedRun, (), True),
    ],
)
def test_refused_command_leaves_no_folder(
    tmp_path: Path, error: type[FulltuneError], kept_for: tuple[type[FulltuneError], ...], stays: bool
) -> None:
    folder = _made(tmp_path)
    with pytest.raises(error), lock_folder(folder), remove_new_run_on_error(folder, *kept_for):
        _prepare(folder, error("no"))
    assert folder.exists() is stays


def test_folder_with_prepared_rows_or_other_files_stays(tmp_path: Path) -> None:
    folder = _made(tmp_path)
    (folder / "data").mkdir()
    (folder / "data" / "summary.json").write_text("{}")
    with pytest.raises(SetupError), remove_new_run_on_error(folder):
        raise SetupError("no")
    assert (folder / "recipe.json").exists()
    other = _made(tmp_path / "other")
    (other / "notes.txt").write_text("mine")
    with pytest.raises(SetupError), remove_new_run_on_error(other):
        raise SetupError("no")
    assert [file.name for file in other.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({"extra": {"tf32": True}}, {}, "train.extra.tf32"),
        ({}, {"extra": {"tf32": True}}, "train.extra.tf32"),
        ({"lr_scheduler_kwargs": {"a": {}}}, {"lr_scheduler_kwargs": {"a": None}}, "train.lr_scheduler_kwargs.a"),
        ({"lr_scheduler_kwargs": {"a": None}}, {"lr_scheduler_kwargs": {}}, "train.lr_scheduler_kwargs.a"),
    ],
)
def test_setting_that_another_recipe_lacks_is_named(
    tmp_path: Path, before: dict[str, Any], now: dict[str, Any], named: str
) -> None:
    small = {"model": "m", "task": "causal-lm", "data": {"train": "a"}}
    find_or_make_folder(Recipe.model_validate({**small, "train": before}), "", "x", tmp_path / "run", fresh=False)
    with pytest.raises(SetupError, match=rf"belongs to a run with other settings \({named}\); choose another"):
        find_or_make_folder(Recipe.model_validate({**small, "train": now}), "", "x", tmp_path / "run", fresh=False)


@pytest.mark.parametrize("content", [b"", b'{"fingerprint": "12", "rec', b"\xff\xfe", b"[1]"])
def test_folder_whose_recipe_is_damaged_is_not_taken_for_another_run_s(tmp_path: Path, content: bytes) -> None:
    recipe = Recipe.model_validate({"model": "m", "task": "causal-lm", "data": {"train": "a"}})
    find_or_make_folder(recipe, "", "x", tmp_path / "run", fresh=False)
    (tmp_path / "run" / "recipe.json").write_bytes(content)
    with pytest.raises(SetupError, match=f"^{tmp_path}/run/recipe.json: is damaged"):
        find_or_make_folder(recipe, "", "x", tmp_path / "run", fresh=False)


@pytest.mark.parametrize(
    ("busy", "hours", "beside", "is_kept"),
    [
        ("", 1, "", True),
        ("this machine is busy", 1, "", False),
        ("", 25, "", False),
        ("this machine is busy", 25, "attempts", True),
        ("this machine is busy", 25, "search", True),
        ("this machine is busy", 25, "plan/measured.json", True),
    ],
)
def test_plan_of_a_busy_machine_or_of_another_day_is_made_again_before_anything_has_begun_with_it(
    tmp_path: Path, busy: str, hours: int, beside: str, is_kept: bool
) -> None:
    path = tmp_path / "plan" / "full.json"
    path.parent.mkdir()
    plans.plan(busy=busy).save(path)
    os.utime(path, (time.time() - 3600 * hours,) * 2)
    if beside:
        (tmp_path / beside).mkdir()
    pipeline.delete_outdated_plan(tmp_path, path)
    assert path.exists() == is_kept
