"""Cross-validation: a whole run for each fold, every row answered once by a model that was not trained on it."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fulltune import pipeline, predict, report
from fulltune.compare.rate_search import run_recipe
from fulltune.errors import DataError, FulltuneError, RecipeError, SetupError
from fulltune.recipe.file import load_recipe
from fulltune.records.data import DataSummary
from fulltune.records.events import Event, Message, StepLogged
from fulltune.system.run_folder import RunResult, is_complete
from tests import tiny
from tests.cases import others_long
from tests.train.runs import in_this_process, job, without_tracing

ROWS = [{**row, "who": f"p{number // 3}"} for number, row in enumerate(tiny.topic_rows(60))]
FOLDS: dict[str, Any] = {
    "data": {"folds": 3, "group": "who"},
    "train": {"max_steps": 3},
    "method": {"learning_rate": 1e-4},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"), "bert")


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> RunResult:
    """Stopped before fold 2, then resumed."""
    folder = tmp_path_factory.mktemp("crossed")

    def stop(event: Event) -> None:
        if isinstance(event, Message) and event.text == "fold 2 of 3":
            raise FulltuneError("stopped by a test")

    with in_this_process(), without_tracing():
        with pytest.raises(FulltuneError, match="stopped by a test"):
            run_recipe(job(folder, model, ROWS, options={"listener": stop}, **FOLDS))
        first = weights(folder / "run", 1)
        seen: list[Event] = []
        assert not is_complete(folder / "run")
        reached = run_recipe(job(folder, model, ROWS, options={"listener": seen.append}, **FOLDS))
    assert [event.text for event in seen if isinstance(event, Message) and event.text in ("fold 1 of 3", "fold 3 of 3")]
    assert sum(isinstance(event, StepLogged) and event.step == 1 for event in seen) == 2, "fold 1 is not trained again"
    assert all(torch.equal(first[name], tensor) for name, tensor in weights(folder / "run", 1).items())
    return reached


def weights(run: Path, fold: int) -> dict[str, torch.Tensor]:
    return load_file(run / "folds" / str(fold) / "models" / "full" / "model.safetensors")


def answers(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "out_of_fold.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_row_is_answered_once_by_a_model_that_never_saw_its_group(crossed: RunResult) -> None:
    found = answers(crossed.folder)
    assert sorted(int(row["place"].split(":")[1]) for row in found) == list(range(2, 62))
    folds_of, parts = defaultdict(set), defaultdict(list)
    for row in found:
        original = ROWS[int(row["place"].split(":")[1]) - 2]
        assert row["expected"] == original["label"]
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
        folds_of[original["who"]].add(row["fold"])
        parts[row["fold"]].append({"text": original["text"]})
    assert all(len(folds) == 1 for folds in folds_of.values())
    for fold in (1, 2, 3):
        summary = DataSummary.of_run(crossed.folder / "folds" / str(fold))
        assert sum(part.rows for part in summary.splits.values()) == 60
        assert summary.splits["test"].rows == len(parts[fold])
        assert summary.sources["test"] == f"fold {fold} of 3 of rows.csv by 'who' (seed 42)"
        predicted = predict.load_predictor(crossed.folder / "folds" / str(fold)).predict(parts[fold])
        mine = [row for row in found if row["fold"] == fold]
        assert [one["label"] for one in predicted] == [row["label"] for row in mine]
        assert [one["probability"] for one in predicted] == pytest.approx(
            [row["probability"] for row in mine], abs=1e-5
        )


def test_scores_are_those_of_all_answers_together(crossed: RunResult) -> None:
    found, pooled = answers(crossed.folder), crossed.scores[-1]
    right = sum(row["label"] == row["expected"] for row in found)
    assert pooled.metrics["accuracy"].value == pytest.approx(right / 60)
    assert pooled.metrics["accuracy"].low <= right / 60 <= pooled.metrics["accuracy"].high
    assert pooled.metrics["accuracy"].clusters == 20
    of_folds = crossed.scores[:3]
    assert sum(scores.metrics["accuracy"].value * scores.rows for scores in of_folds) == pytest.approx(right)
    first, second = weights(crossed.folder, 1), weights(crossed.folder, 2)
    assert not all(torch.equal(first[name], second[name]) for name in first)


def test_report_names_each_fold_and_the_next_command_changes_nothing(crossed: RunResult) -> None:
    page = (crossed.folder / "report.html").read_text(encoding="utf-8")
    assert all(f'href="folds/{fold}/report.html"' in page for fold in (1, 2, 3))
    assert all((crossed.folder / "folds" / str(fold) / "report.html").exists() for fold in (1, 2, 3))
    assert report.write_run_report(crossed.folder).read_text(encoding="utf-8") == page
    assert is_complete(crossed.folder)
    seen: list[Event] = []
    again = run_recipe(
        pipeline.Run(load_recipe(crossed.folder.parent / "recipe.yaml"), crossed.folder, listener=seen.append)
    )
    assert not any(isinstance(event, StepLogged) for event in seen)
    assert again.scores == crossed.scores
    with pytest.raises(SetupError, match=r"has a model for each fold \(3\); name a fold, such as .*/folds/1"):
        predict.load_predictor(crossed.folder)


@pytest.mark.long
def test_fold_alone_is_the_same_run(crossed: RunResult, tmp_path: Path, model: Path) -> None:
    with in_this_process(), without_tracing():
        alone = run_recipe(job(tmp_path, model, ROWS, **{**FOLDS, "data": {**FOLDS["data"], "fold": 2}}), "train")
    single = load_file(alone.folder / "models" / "full" / "model.safetensors")
    assert all(torch.equal(single[name], tensor) for name, tensor in weights(crossed.folder, 2).items())


def test_stages_before_training_are_those_of_fold_1(tmp_path: Path, model: Path) -> None:
    seen: list[Event] = []
    asked = job(tmp_path, model, ROWS, options={"listener": seen.append}, **FOLDS)
    with without_tracing():
        planned = run_recipe(asked, "plan")
    assert planned.summary.sources["test"].startswith("fold 1 of 3")
    assert any(isinstance(one, Message) and "'fulltune run' trains a model for each fold" in one.text for one in seen)
    with pytest.raises(RecipeError, match="each fold needs a run of its own"):
        run_recipe(asked, "train")
    with pytest.raises(SetupError, match="measures a single run"):
        run_recipe(asked, "plan", measure=True)


TASKS = {
    "causal-lm": ("gpt2", tiny.chat_rows(24), {}),
    "seq2seq": ("t5", [{"source": f"row {n}", "target": f"word {n}"} for n in range(24)], {}),
    "question-answering": (
        "bert",
        [
            {"question": f"who is {n}?", "context": f"number {n} is Ada. " + "more words " * 20, "answers": "Ada"}
            for n in range(24)
        ],
        {"max_length": 64},
    ),
    "token-classification": ("bert", [{"tokens": ["Ada", f"met{n}"], "tags": ["B-PER", "O"]} for n in range(24)], {}),
    "multiple-choice": (
        "bert",
        [{"question": f"what {n}?", "choice0": "yes", "choice1": f"no {n}", "label": n % 2} for n in range(24)],
        {},
    ),
    "text-classification": ("bert", [{"text": f"row {n}", "label": n / 7} for n in range(24)], {}),
}


@pytest.mark.parametrize("task", others_long(TASKS))
def test_every_task_answers_each_row_once(task: str, tmp_path: Path) -> None:
    kind, rows, data = TASKS[task]
    made = tiny.save_model(tmp_path / "model", kind)
    blocks: dict[str, Any] = {"data": {"folds": 2, **data}, "train": {"max_steps": 1}, "evaluate": {"baselines": False}}
    with in_this_process(), without_tracing():
        reached = run_recipe(job(tmp_path, made, rows, task=task, **blocks))
    found = answers(reached.folder)
    assert len({row["place"] for row in found}) == len(found) == 24
    assert {row["fold"] for row in found} == {1, 2}
    assert reached.scores[-1].rows == 24
    if task in ("causal-lm", "seq2seq"):
        sums = [sum(row["loss"] * row["tokens"] for row in found), sum(row["tokens"] for row in found)]
        assert reached.scores[-1].metrics["loss"].value == pytest.approx(sums[0] / sums[1])
    else:
        assert {"label", "value", "answer", "tags", "index"} & found[0].keys()


def test_too_few_groups_for_the_folds_are_refused_and_rare_classes_said(tmp_path: Path, model: Path) -> None:
    few = [{**row, "who": f"p{number % 4}"} for number, row in enumerate(ROWS)]
    asked = job(tmp_path / "few", model, few, data={"folds": 5, "group": "who"})
    with pytest.raises(
        DataError, match=r"rows.csv: 4 groups .* for each of the 5 folds; add rows, or lower data.folds"
    ):
        run_recipe(asked, "data")
    assert not asked.folder.exists(), "nothing is left of a run that never began"
    rare = [*ROWS, {"text": "an odd one", "label": "odd", "who": "odd"}]
    for fold in range(1, 4):
        data = {"folds": 3, "fold": fold, "group": "who"}
        summary = pipeline.run(job(tmp_path / f"rare{fold}", model, rare, data=data), "data").summary
        assert any("1 class has fewer rows than the 3 folds" in note and "'odd' (1)" in note for note in summary.notes)


def test_fold_without_the_positive_label_is_refused_before_any_fold_is_trained(tmp_path: Path, model: Path) -> None:
    rare = [*ROWS, *({"text": f"an odd one {number}", "label": "odd", "who": "odd"} for number in range(2))]
    evaluate = {"positive_label": "odd", "metric": "f1"}
    asked = job(tmp_path / "rare", model, rare, data={"folds": 3, "group": "who"}, evaluate=evaluate)
    with pytest.raises(RecipeError, match=r"0 of \d+ \w+ rows have the class 'odd'; lower data.folds"):
        run_recipe(asked)
    assert not list(asked.folder.glob("folds/*/attempts"))


@pytest.mark.long
def test_class_that_one_fold_cannot_train_is_answered_all_the_same(tmp_path: Path, model: Path) -> None:
    rare = [*ROWS, {"text": "an odd one", "label": "odd", "who": "odd"}]
    train = {"max_steps": 1, "class_weights": "balanced"}
    with in_this_process(), without_tracing():
        reached = run_recipe(job(tmp_path / "rare", model, rare, data={"folds": 2, "group": "who"}, train=train))
    assert [row["expected"] for row in answers(reached.folder)].count("odd") == 1


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"data": {"fold": 2}}, "data.fold: needs data.folds"),
        ({"data": {"folds": 3, "fold": 4}}, "fold: expected at most 3, the number of folds, found 4"),
        ({"data": {"folds": 3, "test": "test.csv"}}, "data.test: each fold's test rows are a part of train"),
        ({"data": {"folds": 3, "time": "when"}}, "data.time: a fold's test rows may be older"),
        ({"data": {"folds": 3, "test_fraction": 0.3}}, "data.test_fraction: has no effect with data.folds"),
        ({"data": {"folds": 3}, "method": {"learning_rate": "search"}}, "method.learning_rate: is not supported with"),
        ({"data": {"folds": 3}, "methods": ["full", "lora"]}, "data.folds: is not supported in a comparison yet"),
        ({"data": {"folds": 3}, "train": {"num_machines": 2, "num_processes": 2}}, "runs on one machine, found 2"),
        ({"folds": 3}, "write data.folds: 5"),
    ],
)
def test_settings_that_do_not_go_with_folds_are_named(tmp_path: Path, blocks: dict[str, Any], message: str) -> None:
    rows = tiny.write_csv(tmp_path / "rows.csv", ROWS)
    with pytest.raises(RecipeError) as refused:
        load_recipe(tiny.write_recipe(tmp_path / "recipe.yaml", "model", rows, **blocks))
    assert any(message in problem for problem in refused.value.problems), refused.value.problems
