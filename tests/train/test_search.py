"""A run whose settings are searched: the best run of several goes on as if it had been the only one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fulltune import api, pipeline
from fulltune.errors import FulltuneError, RecipeError
from fulltune.records.events import Event, Said, StepLogged
from fulltune.records.search import Searched
from fulltune.report.run.read import read_run
from fulltune.run_context import Run
from fulltune.search import run as searching
from fulltune.system.run_folder import Reached
from tests import tiny
from tests.train.runs import final_weights, in_this_process, job

ROWS = tiny.topic_rows(240)
GOOD, BAD = 1e-6, 3e-2
"""A rate that keeps what the probe of the tiny model knows, and one that destroys it, which is nearer to the usual."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"), "bert")


def search_job(folder: Path, model: Path, /, options: Mapping[str, Any] | None = None, **blocks: Any) -> Run:
    usual = {"method": {"kind": "full", "learning_rate": "search", "learning_rates": [GOOD, BAD]}}
    train = {"num_train_epochs": 3, **blocks.pop("train", {})}
    data = {"eval_fraction": 0.3, "test_fraction": 0.3}
    return job(folder, model, ROWS, options=options, train=train, data=data, **{**usual, **blocks})


def search(folder: Path, model: Path, /, options: Mapping[str, Any] | None = None, **blocks: Any) -> Reached:
    with in_this_process():
        return searching.run(search_job(folder, model, options, **blocks))


def test_run_at_the_best_rate_goes_on_as_if_it_had_been_trained_alone(tmp_path: Path, model: Path) -> None:
    found = search(tmp_path / "a", model)
    record = Searched.load(found.folder / "search.json")
    assert record.settings == {"method.learning_rate": GOOD}
    assert record.rate is not None
    assert [one.learning_rate for one in record.rate.tried] == [GOOD, BAD]
    assert record.rate.whole, "the usual rate, here the higher one, gets a whole run as well"
    assert record.bought is not None
    assert record.bought.value > 0.1
    with in_this_process():
        alone = pipeline.run(search_job(tmp_path / "b", model, method={"kind": "full", "learning_rate": GOOD}))
    mine, other = final_weights(tmp_path / "a"), final_weights(tmp_path / "b")
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert found.scores[-1].metrics == alone.scores[-1].metrics
    report = (found.folder / "report.md").read_text(encoding="utf-8")
    assert "## Search" in report
    assert "than with the usual rate" in report
    assert read_run(found.folder).missing == ()


def test_search_that_is_interrupted_goes_on_with_what_it_has(tmp_path: Path, model: Path) -> None:
    seen: list[str] = []

    def stop(event: Event) -> None:
        if isinstance(event, Said) and "whole run" in event.text and "trying" not in event.text and seen:
            raise FulltuneError("stopped by a test")
        if isinstance(event, StepLogged):
            seen.append("step")

    with pytest.raises(FulltuneError, match="stopped by a test"):
        search(tmp_path, model, {"listener": stop})
    steps: list[Event] = []
    found = search(tmp_path, model, {"listener": lambda event: steps.append(event)})
    assert Searched.load(found.folder / "search.json").settings == {"method.learning_rate": GOOD}
    # The short trials and the first whole run are not made again.
    began = [event for event in steps if isinstance(event, StepLogged) and event.step == 1]
    assert len(began) == 1
    with in_this_process():
        again = searching.run(search_job(tmp_path, model))
    assert again.scores == found.scores


def test_other_settings_are_tried_in_whole_runs_and_only_the_best_weights_stay(tmp_path: Path, model: Path) -> None:
    found = search(
        tmp_path,
        model,
        method={"kind": "full", "learning_rate": BAD},
        search={"method.layerwise_lr_decay": [0.1, 0.001], "train.label_smoothing_factor": [0.0, 0.1]},
    )
    record = Searched.load(found.folder / "search.json")
    assert len(record.tried) == 5
    assert record.tried[0].metric >= record.tried[-1].metric
    assert record.settings == record.tried[0].settings != {}
    left = sorted(path.relative_to(found.folder).as_posix() for path in found.folder.rglob("model.safetensors"))
    assert left == ["models/full/model.safetensors"]
    assert found.plan is not None
    assert found.plan.layerwise_lr_decay == record.settings["method.layerwise_lr_decay"]
    assert "than with the recipe's own settings" in (found.folder / "report.md").read_text(encoding="utf-8")


def test_optuna_draws_where_there_are_more_combinations_than_trials(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("optuna")
    found = search(
        tmp_path,
        model,
        method={"kind": "full"},
        train={"num_train_epochs": 1},
        search={"train.weight_decay": [0.0, 0.1], "train.warmup_ratio": [0.0, 0.1, 0.2, 0.3], "trials": 3},
    )
    record = Searched.load(found.folder / "search.json")
    assert len(record.tried) == 4, "three, and the recipe's own settings"
    assert record.num_combinations == 8
    assert len({str(one.settings) for one in record.tried}) == 4


def test_budget_that_buys_no_search_is_refused_with_what_it_buys(tmp_path: Path, model: Path) -> None:
    with pytest.raises(RecipeError, match=r"search.budget: is too short.*it buys .* short trial.* give --budget"):
        search(tmp_path, model, search={"budget": "1s"})


def test_single_stages_do_not_pass_a_search_over(tmp_path: Path, model: Path) -> None:
    one = search_job(tmp_path, model)
    summary = pipeline.prepare(one)
    made = pipeline.make_plan(one, summary)
    with pytest.raises(RecipeError, match="search: is a line of its own"):
        pipeline.train_trial(one, made, summary)


def test_loss_from_python_cannot_be_searched_with(tmp_path: Path, model: Path) -> None:
    with pytest.raises(RecipeError, match="which a loss from Python cannot reach"):
        search(tmp_path, model, {"compute_loss": lambda outputs, labels, num_items_in_batch: outputs.loss})


def test_search_from_python(tmp_path: Path, model: Path) -> None:
    made = search_job(tmp_path, model)
    assert made.recipe.is_searched
    with in_this_process():
        found = api.run(tmp_path / "recipe.yaml", run_folder=tmp_path / "run", listener=lambda event: None)
    assert found.scores[-1].kind == "trained"
