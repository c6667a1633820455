"""The rates of a comparison: short trials, whole runs, and rates at which they diverge, with results that are given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from fulltune import pipeline
from fulltune.compare import budget, conclude, trials
from fulltune.compare import run as comparing
from fulltune.compare import seeds as whole_runs
from fulltune.compare.seeds import SeedRuns
from fulltune.errors import Diverged, GuardStop
from fulltune.inference import store
from fulltune.recipe.tasks import FORMS
from fulltune.records.comparison import Search, Trial, TrialResult
from tests.train.runs import in_this_process
from tests.train.small_comparisons import METHODS, job


def result_of(trial: Trial, metric: float) -> tuple[Any, Any, TrialResult]:
    result = TrialResult(trial=trial, metric=metric, train_seconds=1.0, tokens_per_second=1.0)
    return None, mock.Mock(model_folder="models/none"), result


def searched(folder: Path, metric: Callable[[Trial], float]) -> tuple[list[Trial], Any]:
    """The trials of a search for LoRA's rate whose metric is this function, and its result."""
    run = job(folder, [METHODS[1], "lora"])
    line = comparing.Context(run, pipeline.prepare(run), "test")
    ran: list[Trial] = []

    def trained(_: Any, trial: Trial) -> tuple[Any, Any, TrialResult]:
        ran.append(trial)
        value = metric(trial)
        if np.isnan(value):
            raise Diverged("the loss is not finite")
        return result_of(trial, value)

    with mock.patch.object(trials, "train_trial", trained):
        search = whole_runs.search_rate(line, line.trained_methods[1], budget.load_or_plan_design(line).search_share)
    return ran, search


def test_search_best_in_the_middle_ends_it(tmp_path: Path) -> None:
    ran, search = searched(tmp_path, lambda trial: 1 - abs(np.log10(trial.learning_rate / 8e-4)))
    # 24 steps: ten of them is what a trial needs.
    assert [trial.learning_rate for trial in ran] == [2.5e-4, 8e-4, 2.5e-3]
    assert (search.chosen, search.on_edge) == (8e-4, False)
    assert all(trial.searches and round(trial.share, 2) == 0.42 for trial in ran)


def test_search_best_at_the_edge_goes_beyond_it_and_survives_divergence(tmp_path: Path) -> None:
    ran, search = searched(
        tmp_path, lambda trial: float("nan") if trial.learning_rate > 5e-3 else 100 * trial.learning_rate
    )
    assert [trial.learning_rate for trial in ran] == [2.5e-4, 8e-4, 2.5e-3, 7.9e-3]
    assert (search.chosen, search.on_edge) == (2.5e-3, False)


def test_scale_counts_questions_and_not_windows_of_their_passages(tmp_path: Path) -> None:
    places = ["a:1", "a:1", "a:1", "a:2"]
    stored = [store.row_as_json(place, {"q": "x"}) for place in places]
    store.write_rows(tmp_path / "data" / "eval", [store.make_record_batch([{"labels": 0}] * 4, stored)])
    job = mock.Mock(folder=tmp_path)
    job.recipe.preserve.budget = None
    for form, rows in (("span", 2), ("single_label", 4)):
        line = comparing.Context(job, mock.Mock(splits={"eval": mock.Mock(rows=4)}, form=FORMS[form]), "test")
        line.resamplable_metric = mock.Mock(greater_is_better=True)
        line.resamplable_metric.configure_mock(name="accuracy")
        assert line.metric_scale.eval_rows == rows


@contextlib.contextmanager
def whole_runs_given(trained: Callable[[comparing.Context, Trial], Any]) -> Iterator[None]:
    """Whole runs give what this says, and are kept as those that were trained."""
    with (
        mock.patch.object(trials, "train_trial", trained),
        mock.patch.object(trials, "save_outputs_by_split"),
        mock.patch.object(trials.evaluate, "make_scoring"),
        mock.patch.object(trials.evaluate, "fit_and_save_temperature"),
        mock.patch.object(trials, "compute_outputs", return_value=(mock.MagicMock(), 0.1)),
    ):
        yield


def with_first(line: comparing.Context, searches: dict[str, Search], trial: Trial) -> SeedRuns:
    """Whole runs of which a method has had its first one."""
    ran = SeedRuns(line, searches, mock.Mock())
    ran.results = {trial.method: [whole_runs.run_trial(line, trial)]}
    return ran


def made_up(line: comparing.Context, chosen: float = 1e-2) -> dict[str, Search]:
    return {"lora": Search(method="lora", tried={1e-3: 0.9, 1e-2: 0.9}, share=0.15, chosen=chosen)}


@pytest.mark.parametrize("diverges", [42, 43])
def test_rate_at_which_a_seed_diverges_is_replaced_for_all_seeds(diverges: int, tmp_path: Path) -> None:
    run = job(tmp_path, [METHODS[1], "lora"], compare={"sequential": False})
    line = comparing.Context(run, pipeline.prepare(run), "test")
    expectation = budget.load_or_plan_design(line)
    searches = {"full": Search(method="full", chosen=3e-3)} | made_up(line)
    rates: list[tuple[str, float]] = []

    def trained(_: Any, trial: Trial) -> Any:
        rates.append((trial.name, trial.learning_rate))
        if (trial.learning_rate, trial.seed) == (1e-2, diverges):
            raise Diverged("the loss diverged")
        return result_of(trial, 0.95)

    with whole_runs_given(trained), mock.patch.object(SeedRuns, "try_other_rates", return_value=False):
        results = SeedRuns(line, searches, expectation).train_until_clear().results
    assert [(run.trial.seed, run.trial.learning_rate) for run in results["lora"]] == [(42, 1e-3), (43, 1e-3)]
    assert searches["lora"].reason == f"0.01 diverged in a whole run (seed {diverges})"
    assert len([name for name, _ in rates if name.startswith("full")]) == 2


def time_for(*names: str) -> Any:
    """As `has_time` where there is time for these trials, and for those that are done."""

    def has_time(line: comparing.Context, asked: Sequence[Trial], keep: float = 0.0) -> bool:
        return all(trial.name in names or trials.is_done(line, trial) for trial in asked)

    return mock.patch.object(budget, "has_time", has_time)


def test_time_is_up_after_a_whole_run_at_another_rate_which_counts(tmp_path: Path) -> None:
    compare_job = job(tmp_path, [METHODS[1], "lora"], compare={"sequential": False})
    line = comparing.Context(compare_job, pipeline.prepare(compare_job), "test")
    methods = ("full", "lora")
    tried = {1e-3: 0.9, 1e-2: 0.5}
    expectation = budget.load_or_plan_design(line)
    begun: list[str] = []

    def trained(_: Any, trial: Trial) -> Any:
        begun.append(trial.name)
        return result_of(trial, 0.95 if trial.learning_rate == 1e-2 else 0.9)

    for _ in range(2):  # the second time as when it goes on later
        searches = {method: Search(method=method, tried=tried, share=0.15, chosen=1e-3) for method in methods}
        with whole_runs_given(trained), time_for("full-rate0.01-seed42"):
            ran = SeedRuns(line, searches, expectation).train_until_clear()
        assert begun == ["full-seed42", "lora-seed42", "full-rate0.01-seed42"]
        assert ran.time_was_up
        assert {method: [run.trial.learning_rate for run in found] for method, found in ran.results.items()} == {
            "full": [1e-2],
            "lora": [1e-3],
        }


def test_without_time_to_search_full_and_one_rival_get_their_usual_rates_and_are_searched_later(tmp_path: Path) -> None:
    run = job(tmp_path, ["full", "lora", "adapter"])
    line = comparing.Context(run, pipeline.prepare(run), "test")
    expectation = budget.load_or_plan_design(line)
    with time_for():
        searches = whole_runs.search_all_rates(line, expectation)
    assert {method: (search.tried, search.time_was_up) for method, search in searches.items()} == {
        "full": ({}, True),
        "lora": ({}, True),
    }
    assert searches["full"].chosen == line.method_setup("full").plan.learning_rate
    with mock.patch.object(
        whole_runs,
        "run_trial",
        lambda _, run: mock.Mock(metric=0.9 if run.learning_rate == searches["full"].chosen else 0.5),
    ):
        later = whole_runs.search_all_rates(line, expectation)
    assert {method: (len(search.tried), search.time_was_up) for method, search in later.items()} == dict.fromkeys(
        ("full", "lora", "adapter"), (3, False)
    )


def test_only_methods_that_waited_are_tested_at_a_part_of_alpha(tmp_path: Path) -> None:
    run = job(tmp_path, METHODS)
    line = comparing.Context(run, pipeline.prepare(run), "test")
    results = {
        method: [result_of(Trial(name=method, method=method, learning_rate=1, seed=1), 0.9)[2]]
        for method in ("full", "lora")
    }
    results["full"] *= 3  # the time was up before lora had as many
    with mock.patch.object(whole_runs, "load_outputs"):
        shares = [
            [run.alpha_share for run in whole_runs.load_method_outputs(line, results, "eval", waited)]
            for waited in ((), ("lora",))
        ]
    assert shares == [[1.0, 1.0], [1.0, whole_runs.WAITING_SHARE]]


def test_going_on_keeps_the_design_and_with_another_budget_it_is_made_anew(tmp_path: Path) -> None:
    run = job(tmp_path, METHODS)
    summary = pipeline.prepare(run)
    with mock.patch.object(budget, "run_trial"):
        first = budget.load_or_plan_design(comparing.Context(run, summary, "test", budget_seconds=6e4))
        assert budget.load_or_plan_design(comparing.Context(run, summary, "test", budget_seconds=6e4)) == first
        assert (
            budget.load_or_plan_design(comparing.Context(run, summary, "test", budget_seconds=7e4)).budget_seconds
            == 7e4
        )


def test_after_the_test_rows_were_opened_nothing_more_is_trained(tmp_path: Path) -> None:
    run = job(tmp_path, METHODS)

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with in_this_process():
        with (
            mock.patch.object(conclude, "score_baselines", stop),
            mock.patch.object(budget, "run_trial"),
            time_for(),
            pytest.raises(KeyboardInterrupt),
        ):
            comparing.run_comparison(run, "test", budget="9h")
        comparison = comparing.run_comparison(run, "test")[0]
    assert [len(row.seeds) for row in comparison.rows if row.kind != "base"] == [1, 1]
    assert len({opening.trials for opening in comparison.openings}) == 1


def test_given_rate_that_diverges_is_the_users_to_change(tmp_path: Path) -> None:
    run = job(tmp_path, METHODS)
    line = comparing.Context(run, pipeline.prepare(run), "test")
    searches = {method: Search(method=method, chosen=1e-2) for method in ("full", "lora")}
    with (
        mock.patch.object(trials, "train_trial", mock.Mock(side_effect=Diverged("the loss diverged"))),
        pytest.raises(Diverged, match="the loss diverged"),
    ):
        SeedRuns(line, searches, budget.load_or_plan_design(line)).train_until_clear()


def test_other_guards_are_no_matter_of_the_rate(tmp_path: Path) -> None:
    run = job(tmp_path, [METHODS[1], "lora"])
    line = comparing.Context(run, pipeline.prepare(run), "test")
    with (
        mock.patch.object(trials, "train_trial", mock.Mock(side_effect=GuardStop("the process crashed"))),
        pytest.raises(GuardStop, match="the process crashed"),
    ):
        whole_runs.search_rate(line, line.trained_methods[1], budget.load_or_plan_design(line).search_share)


def test_whole_runs_climb_while_they_get_better_and_one_that_diverged_is_kept(tmp_path: Path) -> None:
    run = job(tmp_path, [METHODS[1], "lora"])
    line = comparing.Context(run, pipeline.prepare(run), "test")
    tried = {1e-4: 0.3, 3e-4: 0.2, 1e-3: 0.2}
    metrics = {1e-4: 0.05, 3e-4: 0.5, 1e-3: 0.99}
    begun: list[str] = []

    def trained(_: Any, trial: Trial) -> Any:
        begun.append(trial.name)
        if trial.learning_rate not in metrics:
            raise Diverged("the loss diverged")
        return result_of(trial, metrics[trial.learning_rate])

    results = []
    with whole_runs_given(trained):
        for _ in range(2):  # the second time as when it goes on later
            searches = {"lora": Search(method="lora", tried=tried, share=0.12, chosen=1e-4)}
            ran = with_first(line, searches, Trial(name="lora-seed42", method="lora", learning_rate=1e-4, seed=42))
            ran.try_other_rates("lora")
            results += ran.results["lora"]
    assert begun == ["lora-seed42", "lora-rate0.0003-seed42", "lora-rate0.001-seed42", "lora-rate0.0032-seed42"]
    assert [run.trial.learning_rate for run in results] == [1e-3, 1e-3]
    search = searches["lora"]
    assert list(search.whole) == [1e-4, 3e-4, 1e-3, 3.2e-3]
    assert (search.chosen, search.on_edge, search.reason) == (1e-3, False, "the best of 4 whole runs")
