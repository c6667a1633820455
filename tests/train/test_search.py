"""A run whose learning rate is searched: the best run of several goes on as if it had been the only one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fulltune import pipeline, predict, report
from fulltune.compare.rate_search import run_recipe
from fulltune.errors import FulltuneError, RecipeError
from fulltune.pipeline import Run
from fulltune.records.comparison import Searched
from fulltune.records.events import Event, Message, StepLogged
from fulltune.records.plan import Plan
from fulltune.records.run import Access
from fulltune.report.run.read import read_run
from fulltune.system.run_folder import RunResult, load_run_recipe
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


def search(folder: Path, model: Path, /, options: Mapping[str, Any] | None = None, **blocks: Any) -> RunResult:
    with in_this_process():
        return run_recipe(search_job(folder, model, options, **blocks))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, model: Path) -> RunResult:
    return search(tmp_path_factory.mktemp("searched"), model)


def test_run_at_the_best_rate_goes_on_as_if_it_had_been_trained_alone(
    searched: RunResult, tmp_path: Path, model: Path
) -> None:
    record = Searched.load(searched.folder / "search.json")
    assert record.rate.chosen == GOOD
    assert list(record.rate.tried) == [GOOD, BAD]
    assert len(record.rate.whole) == 2, "the usual rate, here the higher one, gets a whole run as well"
    assert not list(searched.folder.rglob("sealed/*")), "the test rows are nobody's business but the kept run's"
    with in_this_process():
        alone = pipeline.run(search_job(tmp_path, model, method={"kind": "full", "learning_rate": GOOD}))
    mine, other = final_weights(searched.folder.parent), final_weights(tmp_path)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert searched.scores[-1].metrics == alone.scores[-1].metrics
    report = (searched.folder / "report.md").read_text(encoding="utf-8")
    assert "## Search" in report
    assert read_run(searched.folder).missing == ()
    assert [one.trial for one in Access.load_for_same_rows(searched.folder)] == ["full-seed42"]
    settings = {one.name: one for one in Plan.load(searched.folder / "plan" / "full.json").settings}
    assert settings["method.learning_rate"].reason.startswith("searched: ")
    before = {one.name for one in Plan.load(tmp_path / "run" / "plan" / "full.json").settings if not one.is_automatic}
    given = {one.name for one in settings.values() if not one.is_automatic}
    assert given <= before | {"method.learning_rates"}, "what only makes it a trial is nobody's setting"


def test_folder_of_a_searched_run_is_a_run_folder(searched: RunResult) -> None:
    before = (searched.folder / "report.md").read_text(encoding="utf-8")
    report.write_run_report(searched.folder)
    assert (searched.folder / "report.md").read_text(encoding="utf-8") == before
    assert predict.load_predictor(searched.folder).predict([{"text": ROWS[0]["text"]}])
    for until in ("train", "evaluate"):
        with in_this_process():
            again = run_recipe(Run(load_run_recipe(searched.folder), searched.folder), until)
        assert again.outcome is not None
        assert again.outcome.model_folder == "models/full"


def test_killed_while_the_winner_is_moved_it_is_moved_by_the_next_command(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.parent.name == "models" and "search" in self.parts and self.name == "full":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        # keep_best_model renames to this name, and does not rename it again.
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path, model)
    assert (tmp_path / "run" / "search.json").exists()
    steps: list[Event] = []
    found = search(tmp_path, model, {"listener": steps.append})
    assert not any(isinstance(event, StepLogged) for event in steps)
    assert found.outcome is not None
    assert (found.folder / "models" / "full" / "model.safetensors").exists()


def test_search_that_is_interrupted_goes_on_with_what_it_has(tmp_path: Path, model: Path) -> None:
    seen: list[str] = []

    def stop(event: Event) -> None:
        if isinstance(event, Message) and "in a whole run" in event.text and seen:
            raise FulltuneError("stopped by a test")
        if isinstance(event, StepLogged):
            seen.append("step")

    with pytest.raises(FulltuneError, match="stopped by a test"):
        search(tmp_path, model, {"listener": stop})
    steps: list[Event] = []
    found = search(tmp_path, model, {"listener": lambda event: steps.append(event)})
    assert Searched.load(found.folder / "search.json").rate.chosen == GOOD
    # The short trials and the first whole run are not made again.
    began = [event for event in steps if isinstance(event, StepLogged) and event.step == 1]
    assert len(began) == 1
    with in_this_process():
        again = run_recipe(search_job(tmp_path, model))
    assert again.scores == found.scores


def test_budget_that_buys_no_search_is_refused_with_what_it_buys(tmp_path: Path, model: Path) -> None:
    with pytest.raises(
        RecipeError,
        match=r"compare.budget: 1s is too short.*two short trials and a whole run.* set --b",
    ):
        search(tmp_path, model, compare={"budget": "1s"})


def test_single_stages_do_not_pass_a_search_over(tmp_path: Path, model: Path) -> None:
    one = search_job(tmp_path, model)
    summary = pipeline.prepare(one)
    made = pipeline.make_plan(one, summary)
    with pytest.raises(RecipeError, match=r"method\.learning_rate: the search needs several runs"):
        pipeline.train_trial(one, made, summary)


def test_loss_from_python_cannot_be_searched_with(tmp_path: Path, model: Path) -> None:
    with pytest.raises(RecipeError, match="where a loss from Python is not available"):
        search(tmp_path, model, {"compute_loss": lambda outputs, labels, num_items_in_batch: outputs.loss})
