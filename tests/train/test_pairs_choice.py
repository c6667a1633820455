"""`model.pairs: auto`: how pairs are read is chosen once, recorded with its figures, and known to every command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fulltune import pipeline
from fulltune.compare import pairs, rate_search
from fulltune.compare.rate_search import run_recipe
from fulltune.compare.run import run_comparison
from fulltune.errors import InterruptedRun
from fulltune.pipeline import Until
from fulltune.records.data import DataSummary
from fulltune.records.events import Event, Message
from fulltune.records.run import PairsChoice
from fulltune.system import run_folder
from fulltune.system.run_folder import RunResult, load_run_recipe
from tests import tiny
from tests.train import runs, small_comparisons
from tests.train.test_pairs import pair_rows
from tests.train.test_resume import ask_to_stop, assert_same

TRAIN: dict[str, Any] = {"max_steps": 6, "logging_steps": 1}


def run(
    folder: Path, model: Path, rows: Any, /, until: Until = "train", listener: Any = None, **blocks: Any
) -> RunResult:
    options = {} if listener is None else {"listener": listener}
    with runs.in_this_process():
        return run_recipe(runs.job(folder, model, rows, options=options, **{"train": TRAIN, **blocks}), until)


def settings_of(reached: RunResult) -> dict[str, tuple[Any, str]]:
    assert reached.plan is not None
    return {setting.name: (setting.value, setting.reason) for setting in reached.plan.settings}


def test_the_probe_of_few_rows_chooses_once_and_all_commands_know(tiny_encoder: Path, tmp_path: Path) -> None:
    texts = list[str]()

    def listener(event: Event) -> None:
        texts.extend([event.text] if isinstance(event, Message) else [])

    rows = pair_rows(90)
    planned = run(tmp_path, tiny_encoder, rows, "plan", listener)
    assert planned.summary.task == "text-classification"
    assert any("this plan reads pairs jointly" in text for text in texts)
    reached = run(tmp_path, tiny_encoder, rows, listener=listener)

    choice = PairsChoice.load(tmp_path / "run" / "pairs.json")
    assert choice.pairs == "apart"
    assert choice.losses["apart"] < choice.losses["joint"]
    assert not choice.metrics
    assert f"pairs: read apart: {choice.reason}" in texts
    assert settings_of(reached)["model.pairs"] == ("apart", choice.reason)
    assert reached.summary.task == "text-pairs"
    assert not (tmp_path / "run" / "pairs").exists()

    run(tmp_path / "explicit", tiny_encoder, rows, model={"pairs": "apart"})
    assert_same(runs.final_weights(tmp_path), runs.final_weights(tmp_path / "explicit"))

    texts.clear()
    again = run(tmp_path, tiny_encoder, rows, listener=listener)
    assert again.outcome == reached.outcome
    assert not any(text.startswith("pairs:") for text in texts)
    recipe = load_run_recipe(tmp_path / "run")
    assert recipe.task == "text-pairs"
    run_folder.raise_if_started_with_functions(tmp_path / "run", recipe)  # a command on the folder resumes it
    job = runs.job(tmp_path, tiny_encoder, rows, train=TRAIN)
    assert pipeline.write_report(job).exists()
    assert choice.reason.partition(";")[0] in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


def test_short_trainings_choose_if_there_are_enough_rows_and_go_on_after_a_stop(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "LEAST_TRAIN", 20)
    monkeypatch.setattr(pairs, "LEAST_EVAL", 5)
    rows = pair_rows(90)
    whole = run(tmp_path / "whole", tiny_encoder, rows)
    choice = PairsChoice.load(tmp_path / "whole" / "run" / "pairs.json")
    assert set(choice.metrics) == {"apart", "joint"}
    assert choice.metrics[choice.pairs] == max(choice.metrics.values())
    assert "accuracy on the eval rows after a third of the steps" in choice.reason

    steps = list[int]()

    def stop(event: Event) -> None:
        if getattr(event, "kind", "") == "train":
            steps.append(event.step)  # type: ignore[attr-defined]  # of this kind
            if len(steps) == 3:
                ask_to_stop()

    with pytest.raises(InterruptedRun):
        run(tmp_path / "two", tiny_encoder, rows, listener=stop)
    assert (tmp_path / "two" / "run" / "pairs").exists()
    resumed = run(tmp_path / "two", tiny_encoder, rows, listener=lambda event: None)
    assert PairsChoice.load(tmp_path / "two" / "run" / "pairs.json") == choice
    assert settings_of(resumed)["model.pairs"] == settings_of(whole)["model.pairs"]


def test_single_texts_and_explicit_settings_need_no_choice(tiny_encoder: Path, tmp_path: Path) -> None:
    run(tmp_path / "single", tiny_encoder, tiny.topic_rows(60))
    reached = run(tmp_path / "joint", tiny_encoder, pair_rows(60), model={"pairs": "joint"})
    assert not list(tmp_path.glob("*/run/pairs.json"))
    assert settings_of(reached)["model.pairs"] == ("joint", "from the recipe")
    assert reached.summary.task == "text-classification"


def test_models_that_cannot_read_apart_read_jointly(tmp_path: Path) -> None:
    job = runs.job(tmp_path, tiny.save_model(tmp_path / "model", "bart"), pair_rows(40))
    reached = pipeline.run(job, "data", choose=pairs.choose_pairs)
    assert reached.summary.task == "text-classification"
    choice = PairsChoice.load(tmp_path / "run" / "pairs.json")
    assert choice.pairs == "joint"
    assert choice.reason.startswith("a 'bart' model cannot read texts apart")


@pytest.mark.long
def test_each_fold_chooses_by_its_own_rows(tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fold 1's train and eval rows are test rows of other folds."""

    def choose(job: pipeline.Run, summary: DataSummary) -> pipeline.Run:
        if job.pairs_choice is None:
            read: Any = "apart" if job.recipe.data.fold == 2 else "joint"
            PairsChoice(pairs=read, reason=f"of fold {job.recipe.data.fold}").save(job.folder / run_folder.PAIRS)
        return replace(job)

    monkeypatch.setattr(rate_search, "choose_pairs", choose)
    with runs.without_tracing():
        reached = run(tmp_path, tiny_encoder, pair_rows(60), "report", data={"folds": 3}, train={"max_steps": 2})
    tasks = [load_run_recipe(tmp_path / "run" / "folds" / str(fold)).task for fold in (1, 2, 3)]
    assert tasks == ["text-classification", "text-pairs", "text-classification"]
    lines = (tmp_path / "run" / "out_of_fold.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    right = sum(answer["label"] == answer["expected"] for answer in answers)
    assert len(answers) == 60
    assert reached.scores[-1].metrics["accuracy"].value == pytest.approx(right / 60)
    assert not (tmp_path / "run" / run_folder.PAIRS).exists()
    again = run(tmp_path, tiny_encoder, pair_rows(60), "report", data={"folds": 3}, train={"max_steps": 2})
    assert again.scores == reached.scores


@pytest.mark.long
def test_a_comparison_chooses_once_for_all_methods(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", "bert")
    tiny.write_jsonl(tmp_path / "rows.jsonl", pair_rows(120))
    job = small_comparisons.job(tmp_path, small_comparisons.METHODS)
    with runs.in_this_process():
        comparison, _ = run_comparison(job, "fulltune compare")
    choice = PairsChoice.load(job.folder / "pairs.json")
    assert choice.pairs == "apart"
    assert comparison.task == "text-pairs"
