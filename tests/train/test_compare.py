"""A whole comparison with tiny models: one line from data to the card, its files, and going on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from fulltune import pipeline, predict
from fulltune.compare import budget as budgets
from fulltune.compare import lint, trials
from fulltune.compare import run as comparing
from fulltune.errors import InterruptedRun, RecipeError
from fulltune.files import append_line
from fulltune.records.comparison import Comparison, Trial
from fulltune.records.events import Event, Message
from fulltune.records.run import ACCESSES, Access
from fulltune.report.run.about_scores import warn_of_repeated_scoring
from tests.contract.command import fulltune
from tests.train.runs import in_this_process
from tests.train.small_comparisons import METHODS, job


def compare(job: pipeline.Run, budget: str | None = None) -> Comparison:
    with in_this_process():
        return comparing.run_comparison(job, "fulltune compare recipe.yaml", budget)[0]


def no_time_for_the_last(line: comparing.Context, trials: Sequence[Trial], keep: float = 0.0) -> bool:
    """As `has_time` where the time is up before the second seed of LoRA."""
    return all(one.name != "lora-seed43" for one in trials)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    """A comparison that was interrupted before its last trial, and whose time was then up."""
    folder = tmp_path_factory.mktemp("compare")
    texts: list[str] = []

    def interrupt(event: Event) -> None:
        if isinstance(event, Message):
            texts.append(event.text)
            if event.text.startswith("lora: seed 2"):
                raise InterruptedRun("interrupted by the test")

    with pytest.raises(InterruptedRun):
        compare(job(folder, METHODS, interrupt))
    names = sorted(path.name for path in (folder / "run" / "attempts").iterdir())
    assert names == ["full-seed42-01", "full-seed43-01", "lora-seed42-01"]
    with mock.patch.object(budgets, "has_time", no_time_for_the_last):
        return folder / "run", compare(job(folder, METHODS), "1h")


@pytest.fixture(scope="module")
def finished(ended: tuple[Path, Comparison]) -> tuple[Path, Comparison]:
    """The same after more time was given."""
    folder = ended[0]
    return folder, compare(job(folder.parent, METHODS), "2h")


def test_comparison_whose_time_was_up_says_so_and_blames_no_method(ended: tuple[Path, Comparison]) -> None:
    _, comparison = ended
    assert (comparison.decision.verdict, comparison.time_was_up, comparison.can_resume) == ("UNDECIDED", True, True)
    assert {row.method: len(row.seeds) for row in comparison.rows} == {"base": 0, "full": 2, "lora": 1}
    few = {one.where: one for one in comparison.findings if one.rule == "no-time-for-seeds"}
    assert {one.level for one in few.values()} == {"worth knowing"}
    assert few["lora"].what == "only 1 seed, because the budget is too short for another"
    assert few["full"].what.startswith("only 2 seeds, because the budget is too short for another")


def test_more_time_goes_on_from_the_trials_and_all_verdicts_together_keep_alpha(
    ended: tuple[Path, Comparison], finished: tuple[Path, Comparison]
) -> None:
    _, comparison = finished
    assert (comparison.time_was_up, comparison.expectation.budget_seconds) == (False, 7200.0)
    first, second = comparison.openings
    assert (first.trials, second.trials) == (
        ("full-seed42", "full-seed43", "lora-seed42"),
        ("full-seed42", "full-seed43", "lora-seed42", "lora-seed43"),
    )
    assert first.alpha == pytest.approx(0.025)
    assert second.alpha == comparison.decision.alpha == pytest.approx(0.025)
    assert comparison.seconds > ended[1].seconds


def test_interrupted_comparison_goes_on_and_trains_nothing_twice(finished: tuple[Path, Comparison]) -> None:
    folder, _ = finished
    names = sorted(path.name for path in (folder / "attempts").iterdir())
    assert names == ["full-seed42-01", "full-seed43-01", "lora-seed42-01", "lora-seed43-01"]


def test_finished_comparison_is_not_done_again(finished: tuple[Path, Comparison]) -> None:
    folder, first = finished

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it trains again")

    with mock.patch.object(trials.retry, "train_in_attempts", fail):
        assert compare(job(folder.parent, METHODS)) == first


def test_models_are_calibrated_and_have_a_card_as_those_of_a_run(finished: tuple[Path, Comparison]) -> None:
    folder, comparison = finished
    for row in comparison.rows[1:]:
        model = folder / "models" / row.method
        assert json.loads((model / "fulltune.json").read_text(encoding="utf-8"))["temperature"] > 0
        text = (model / "README.md").read_text(encoding="utf-8")
        assert text.startswith("---\nlibrary_name: transformers")
        shown = {f" {100 * value:.1f}% [" for value in comparison.decision.values[row.method]}
        assert any(one in text for one in shown), text
    assert fulltune("export", folder, "--method", "lora", "--to", "hf", "-o", folder.parent / "merged").code == 0
    text = (folder.parent / "merged" / "README.md").read_text(encoding="utf-8")
    assert 'from_pretrained("merged")' in text
    assert "PeftModel" not in text


def test_record_has_each_method_with_what_it_cost(finished: tuple[Path, Comparison]) -> None:
    folder, comparison = finished
    rows = {row.method: row for row in comparison.rows}
    assert list(rows) == ["base", "full", "lora"]
    assert rows["full"].seeds == rows["lora"].seeds == (42, 43)
    assert rows["full"].num_trainable == rows["full"].num_parameters
    saved = (folder / "models" / "lora" / "adapter_model.safetensors").stat().st_size
    assert rows["lora"].saved_bytes == saved
    assert 0 < rows["lora"].num_trainable < rows["full"].num_trainable
    assert rows["lora"].train_flops > 0
    assert rows["full"].drift is not None
    assert comparison.decision.verdict in ("FULL", "PEFT", "EQUIVALENT", "UNDECIDED")
    assert {one.rule for one in comparison.findings} >= {"rate-not-searched", "few-seeds"}
    assert json.loads((folder / "proof.json").read_text(encoding="utf-8"))["decision"]["verdict"] in (
        folder / "card.md"
    ).read_text(encoding="utf-8")


def test_test_rows_are_opened_once_and_by_somebody(
    ended: tuple[Path, Comparison], finished: tuple[Path, Comparison]
) -> None:
    folder, comparison = ended
    (opening,) = comparison.openings
    assert opening.trials == ("full-seed42", "full-seed43", "lora-seed42")
    sealed = sorted(path.stem for path in (folder / "predictions" / "sealed").iterdir())
    assert sealed == ["full-seed42", "full-seed43", "lora-seed42", "lora-seed43"]
    noted = Access.load_for_same_rows(folder)
    assert [one.trial for one in noted] == ["comparison"] * 2, "two verdicts, and nothing of any trial"
    assert warn_of_repeated_scoring(noted) == "", "it is one look"


def test_other_comparisons_that_opened_the_same_test_rows_are_known(finished: tuple[Path, Comparison]) -> None:
    folder, comparison = finished
    assert not [one for one in comparison.findings if one.where == "test rows" and one.level == "unfair"]
    assert lint.comparisons_on_same_test_rows(folder) == ()
    path = folder.parent / ACCESSES
    text = path.read_text(encoding="utf-8")
    append_line(
        path, Access.load_for_same_rows(folder)[-1].model_copy(update={"run": "before"}).model_dump(mode="json")
    )
    assert lint.comparisons_on_same_test_rows(folder) == ("before",)
    path.write_text(text, encoding="utf-8")


def test_metric_of_the_table_is_that_of_the_kept_model(finished: tuple[Path, Comparison]) -> None:
    """Predicting the test rows with `models/lora` gives the accuracy of one of its seeds."""
    folder, comparison = finished
    rows = [json.loads(line) for line in (folder.parent / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    labels = {row["text"]: row["label"] for row in rows}
    from fulltune.inference.store import read_original_rows

    test = list(read_original_rows(folder / "data" / "test"))
    answers = predict.load_predictor(folder, "lora").predict([{"text": row["text"], "label": ""} for row in test])
    right = np.mean([answer["label"] == labels[row["text"]] for answer, row in zip(answers, test, strict=True)])
    assert any(abs(value - right) < 1e-9 for value in comparison.decision.values["lora"])


def test_page_of_the_run_folder_names_every_file(finished: tuple[Path, Comparison]) -> None:
    folder, _ = finished
    text = (Path(__file__).parents[2] / "docs" / "reference" / "run-folder.md").read_text(encoding="utf-8")
    section = text.partition("## The folder of a comparison")[2].partition("\n## ")[0]
    there = [path for path in folder.iterdir() if path.name not in (".lock", "recipe.yaml", "recipe.json")]
    there += [*(folder / "compare").iterdir(), *(folder / "predictions").iterdir()]
    names = [str(path.relative_to(folder)) for path in there]
    assert not [name for name in names if f"`{name}`" not in section and f"`{name}/" not in section]


# ---- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "problem"),
    [
        (["base", "full"], "methods: nothing to compare full fine-tuning with"),
        (["base", "full", "head"], "methods: nothing to compare full fine-tuning with"),
        (["base", "lora"], "methods: 'full' is missing"),
    ],
)
def test_recipe_without_a_comparison_is_refused(tmp_path: Path, methods: list[Any], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        job(tmp_path, methods)
