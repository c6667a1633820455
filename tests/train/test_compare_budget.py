"""A comparison of full and LoRA that is held to a budget for forgetting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fulltune import pipeline
from fulltune.compare import run as comparing
from fulltune.compare import timing, trials
from fulltune.compare.rate_search import search_trial
from fulltune.errors import FulltuneError, InterruptedRun
from fulltune.records.comparison import Comparison, Trial, TrialResult
from fulltune.records.data import DataSummary
from fulltune.records.forgetting import Drift
from fulltune.report.comparison.about_forgetting import answers
from fulltune.train.worker import within_budget
from tests.train.runs import in_this_process
from tests.train.small_comparisons import METHODS, job

FEW_POINTS: Any = {"SHARES": {"whole": (1.0, 0.5), "by layer": ()}, "BISECTIONS": 0}
_SEALED = within_budget._of_sealed


def held(folder: Path, budget: str = "1%") -> pipeline.Run:
    probe = folder / "probe.txt"
    probe.write_text("".join(f"text number {n} says nothing new\n" for n in range(130)), encoding="utf-8")
    return job(folder, METHODS, preserve={"budget": budget, "probe": str(probe)})


def compare(one: pipeline.Run) -> Comparison:
    with in_this_process(), mock.patch.multiple(within_budget, **FEW_POINTS):
        return comparing.run(one, "fulltune compare recipe.yaml").comparison


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Comparison, list[str]]]:
    """A comparison that was stopped twice after a trial's sealed texts were opened; and whose were opened."""
    folder, opened = tmp_path_factory.mktemp("held"), list[str]()

    def noted(attempt: Any, *given: Any) -> Drift:
        opened.append(attempt.plan.trial)
        return _SEALED(attempt, *given)

    with mock.patch.object(within_budget, "_of_sealed", noted):
        with (
            mock.patch("fulltune.train.worker.weights.save_model", side_effect=RuntimeError("a fault")),
            pytest.raises(FulltuneError),
        ):
            compare(held(folder))  # before its model was saved
        with (
            mock.patch.object(trials, "keep_rows", side_effect=InterruptedRun("stopped by the test")),
            pytest.raises(InterruptedRun),
        ):
            compare(held(folder))  # before its result was
        yield folder / "run", compare(held(folder)), opened


pytestmark = pytest.mark.long


def test_every_whole_run_is_within_the_budget_and_has_its_record(
    finished: tuple[Path, Comparison, list[str]],
) -> None:
    folder, found, _ = finished
    names = ["full-seed42", "full-seed43", "lora-seed42", "lora-seed43"]
    assert sorted(path.stem for path in (folder / "preserve").iterdir()) == names
    assert sorted(f"{one.arm}-seed{one.seed}" for one in found.held) == names
    for one in found.held:
        sealed, result = (
            one.preserved.certificate,
            TrialResult.load(folder / f"compare/trials/{one.preserved.trial}.json"),
        )
        assert result.metric == one.preserved.chosen.metric
        assert one.preserved.is_feasible is (sealed is not None)
        assert sealed is None or sealed.upper <= one.preserved.limit == 0.01


def test_comparison_that_was_stopped_opens_no_sealed_text_twice(finished: tuple[Path, Comparison, list[str]]) -> None:
    _, found, opened = finished
    feasible = [one.preserved.trial for one in found.held if one.preserved.certificate is not None]
    assert sorted(opened) == sorted(feasible) != []
    assert {len(one.preserved.opened) for one in found.held if one.preserved.certificate is not None} <= {1}


def test_card_has_the_frontiers_and_says_which_one_forgot_less(finished: tuple[Path, Comparison, list[str]]) -> None:
    folder, found, _ = finished
    card = (folder / "card.md").read_text(encoding="utf-8")
    assert "## Forgetting" in card
    assert answers(found)["lora"] in card
    assert "| full   |   42 |" in card
    assert "by drift on generic text</title>" in (folder / "card.html").read_text(encoding="utf-8")


def test_drift_of_the_table_is_read_on_texts_that_are_not_sealed(finished: tuple[Path, Comparison, list[str]]) -> None:
    _, found, _ = finished
    assert found.drift_text.endswith("probe.txt, texts that choose within the budget")
    measured = {one.arm: one.preserved.chosen.measured for one in found.held if one.seed == 42}
    assert {one.texts for one in measured.values()} == {43}


def test_short_trials_are_free_and_a_rate_is_judged_by_what_was_trained(
    finished: tuple[Path, Comparison, list[str]],
) -> None:
    folder, found, _ = finished
    context = comparing.Context(held(folder.parent), DataSummary.load(folder / "data" / "summary.json"), "test")
    free = context.trial_recipe(search_trial("full", 1e-3, 0.1, 42)).preserve
    assert (free.budget, free.drift) == (None, False)
    whole = Trial(name="full-seed42", arm="full", learning_rate=3e-3, seed=42)
    assert context.trial_recipe(whole).preserve.budget == "1%"
    assert context.trial_plan(whole, context.trial_recipe(whole)).preserving is not None
    result = TrialResult.load(context.result_path("full-seed42"))
    one = next(one.preserved for one in found.held if one.preserved.trial == "full-seed42")
    assert context.trained_metric(result) == one.end.metric
    assert context.trained_metric(result.model_copy(update={"problems": ("diverged",), "metric": 0.0})) == 0.0
    assert timing.pace(context).rest < 10


def test_comparison_within_whose_budget_nothing_is_learned_recommends_nothing(tmp_path: Path) -> None:
    found = compare(held(tmp_path, "0.0000001%"))
    assert not any(one.preserved.is_feasible for one in found.held)
    assert (found.decision.verdict, found.decision.recommended) == ("UNDECIDED", "")
    card = (tmp_path / "run" / "card.md").read_text(encoding="utf-8")
    assert "full (seed 42 and 43): nothing within the budget for forgetting was better than the untouched model" in card
    assert "| infeasible  |" in card
