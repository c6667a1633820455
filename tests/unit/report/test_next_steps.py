"""What to try next: each proposal follows from what the run shows, and names a setting that exists."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fulltune.records.forgetting import BudgetResult, Drift, InterpolationPoint
from fulltune.records.plan import Setting
from fulltune.records.scores import Confusion, Estimate
from fulltune.report.run.about_forgetting import describe_budget_cost
from fulltune.report.run.content import build_run_headline_and_advice
from fulltune.report.run.read import read_run
from fulltune.report.run.verdict import RunFacts, suggest_next_steps
from fulltune.stats.curves import Curves, Fit
from tests.plans import outcome as ended
from tests.plans import plan
from tests.preserved import preserved_record

FLAT = tuple((step, 1.0) for step in range(10, 410, 10))
FALLING = tuple((step, 4.0 * 0.97 ** (step / 10)) for step in range(10, 410, 10))
GROWING = tuple((step, 1.0 + step / 10) for step in range(10, 410, 10))
KNOWN = tuple((step, 0.5 * 0.98**step) for step in range(1, 401, 10))
"""Halved and halved again to the end, but of train rows that are known long since."""
ROSE_AND_FELL = tuple(zip(range(1, 9), (0.1, 0.1, 0.3, 0.3, 0.4, 0.4, 0.2, 0.2), strict=True))
"""Its last quarter lies below the one before, and above its begin."""
RISING = ((200, 0.3), (400, 0.5))
STILL = ((200, 0.5), (400, 0.5))
LONGER, LOWER = "--set train.num_train_epochs=4", "--set method.learning_rate=0.0001"
OF_METHOD = ("method.kind", "full")


def but(*given: tuple[str, Any], steps: int = 400, **changes: Any) -> RunFacts:
    """A run of two epochs that was worse, with these settings of the recipe and other facts, of it or its curves."""
    settings = tuple(
        Setting(name=name, value=value, reason="", is_automatic=False) for name, value in (OF_METHOD, *given)
    )
    planned = plan(
        learning_rate=3e-4, num_train_epochs=2.0, total_steps=changes.pop("planned", steps), settings=settings
    )
    outcome = ended("done", steps=steps, weights_reason=changes.pop("weights_reason", ""))
    of_curves = {name: changes.pop(name) for name in Curves.__dataclass_fields__ if name in changes}
    curves = Curves(**{"train_loss": FLAT, "metric": STILL, **of_curves})
    return RunFacts(**{"verdict": "worse", "train_rows": 3000, **changes}, plan=planned, outcome=outcome, curves=curves)


def kept(chosen: float, *drifts: float) -> BudgetResult:
    """Of points at a third, two thirds and the whole way, whose accuracy rises alike."""
    shares = (0.0, 1 / 3, 2 / 3, 1.0)
    points = [
        InterpolationPoint(share=share, drift=Drift(mean=drift, error=0.001, texts=200), metric=0.2 + 0.6 * share)
        for share, drift in zip(shares, (0.0, *drifts), strict=True)
    ]
    chosen_one = next(one for one in points if one.share == chosen)
    return preserved_record(points, chosen_one, budget=0.01, limit=0.01)


@pytest.mark.parametrize(
    ("found", "evidence", "helps"),
    [
        (None, "", ""),
        (kept(1.0, 0.001, 0.002, 0.003), "", ""),
        (kept(0.0, 0.1, 0.2, 0.3), "limits the weights to the pretrained model", "--set preserve.budget=32%"),
        (kept(1 / 3, 0.002, 0.02, 0.03), "limits the weights to 33.3% of the way", "--set preserve.budget=3.6%"),
        (kept(0.0, 0.0001, 0.0002, 0.0003), "limits the weights to the pretrained model", "--set preserve.budget=0.4%"),
    ],
)
def test_budget_that_holds_a_model_back_says_what_would_not(
    found: BudgetResult | None, evidence: str, helps: str
) -> None:
    said = describe_budget_cost(found)
    assert (evidence in said[0], helps in said[1]) == (True, True)
    assert (said == ("", "")) == (evidence == "")
    if evidence:
        (step,) = suggest_next_steps(but(budget_advice=said, train_loss=GROWING))
        assert helps in step
        assert "rate" not in step


FEW = {"verdict": "unresolved", "steps": 12}
MAX_STEPS, MAX_ROWS = ("train.max_steps", 400), ("data.max_rows", 200)


@pytest.mark.parametrize(
    ("run", "wanted", "unwanted"),
    [
        (but(train_loss=FALLING), ["still falling at the end (3.88 to", LONGER], ["learning_rate", "few"]),
        (but(train_loss=KNOWN), ["The curves do not show why"], ["still falling"]),
        (but(train_loss=ROSE_AND_FELL), [], ["still falling"]),
        (but(metric=RISING), ["Accuracy on the eval rows was still rising", LONGER], ["learning_rate"]),
        (but(metric_name="loss", greater_is_better=False, metric=RISING), [], ["still"]),
        (but(MAX_STEPS, train_loss=FALLING), ["--set train.max_steps=800"], ["num_train_epochs"]),
        (but(steps=12), ["run had only 12 steps", "num_train_epochs=18"], []),  # as long as it takes
        (but(MAX_STEPS, steps=2), ["run had only 2 steps", "max_steps=20."], []),  # ten times
        (but(steps=12, planned=400), [], ["are few"]),  # stopped early: a longer run would stop there too
        (but(train_loss=GROWING), ["The loss diverged", LOWER], [LONGER]),
        (but(train_loss=GROWING, metric=RISING), [LOWER], [LONGER]),
        (but(train_loss=FALLING, metric=((200, 0.5), (400, 0.4))), ["do not show why"], [LONGER]),
        (but(train_loss=FALLING, metric=((200, 0.5), (400, 0.4)), weights_reason="as good"), [LONGER], [LOWER]),
        (but(train_loss=GROWING, rate_searched=True), ["more than the"], [LOWER]),
        (but(fit=Fit("over-fitted", "", 100)), ["from step 100 on", "num_train_epochs=0.5"], [LONGER, LOWER]),
        (but(MAX_STEPS, fit=Fit("over-fitted", "", 100)), ["train.max_steps=100"], ["num_train_epochs"]),
        (but(fit=Fit("got worse", "it fell", 0)), ["best before step 1. Try a lower", "rate=3e-05"], [LONGER]),
        (but(fit=Fit("got worse", "it fell", 200)), ["It fell. Try a lower", LOWER], [LONGER]),
        # Nothing is left to gain: few steps, a falling loss and even over-confidence are no reason to go on.
        (
            but(**FEW, metric=((6, 1.0), (12, 1.0)), train_loss=FALLING, fit=Fit("over-confident", "", 6)),
            [
                "Accuracy on the eval rows is 100.0%, so there is nothing left to gain",
                "Keep the baseline",
                "more test rows",
            ],
            ["--set"],
        ),
        (
            but(metric=((6, 0.99), (12, 0.996)), best_untrained_name="centroid"),
            ["99.6%", "Keep centroid, which"],
            ["--set", "unless"],
        ),
        (
            but(**FEW, metric=((6, 0.99), (12, 0.99))),
            ["run had only 12 steps", "num_train_epochs=18"],
            ["nothing left"],
        ),
        (but(blind="All is b"), ["All is b. Try a lower", LOWER, "learning_rate=0.0009"], [LONGER]),
        (but(blind="All is b", train_loss=FALLING), ["All is b. The train loss", LONGER], [LOWER]),
        (but(blind="All is b", predicts_majority=True), ["class_weights=balanced"], ["learning_rate", LONGER]),
        (but(MAX_ROWS), ["remove data.max_rows"], ["labels"]),
        (but(labels=400, train_rows=800), ["are about 2 for each of 400 labels", "Use more if there"], ["reason"]),
        (but(MAX_ROWS, labels=400, train_rows=800), ["about 2 for", "remove data.max_rows"], ["Only"]),
        (but(), ["The curves do not show why", LOWER, "learning_rate=0.0009", "3,000"], [LONGER]),
        (but(verdict="unresolved"), ["More test rows"], []),
        (but(train_loss=((10, float("nan")), (20, float("nan"))) * 3), ["The curves do not show why"], ["nan"]),
    ],
)
def test_proposals_follow_from_what_was_seen(run: RunFacts, wanted: list[str], unwanted: list[str]) -> None:
    said = "\n".join(suggest_next_steps(run))
    assert said
    assert [part for part in wanted if part not in said] == []
    assert [part for part in unwanted if part in said] == []


@pytest.mark.parametrize("verdict", ["better", "alone", "none", "unpaired"])
def test_nothing_is_proposed_where_nothing_is_known_to_be_wrong(verdict: str) -> None:
    assert suggest_next_steps(but(verdict=verdict, train_loss=FALLING)) == ()


@pytest.mark.parametrize(
    ("counts", "given", "is_proposed"),
    [
        (((0, 10), (0, 90)), None, True),
        (((0, 10), (0, 90)), "balanced", False),  # they are weighed already
        (((0, 40), (0, 60)), None, False),  # weights would change little
        (((90, 0), (10, 0)), None, True),
        (((0, 90), (0, 10)), None, False),  # it is the rare label that it gives
        (((0, 0, 20), (0, 0, 20), (0, 0, 60)), None, True),
        (((0, 0), (0, 60)), None, None),  # they are really all the same
    ],
)
def test_weights_are_proposed_where_all_rows_get_the_label_that_most_have(
    counts: tuple[tuple[int, ...], ...],
    given: str | None,
    is_proposed: bool | None,
    classification: Path,
    kit: SimpleNamespace,
) -> None:
    plan = classification / "plan" / "full.json"
    if given is not None:
        values = json.loads(plan.read_text(encoding="utf-8"))
        values["settings"].append({"name": "train.class_weights", "value": given, "reason": "", "is_automatic": False})
        plan.write_text(json.dumps(values), encoding="utf-8")
    worse = {"nearest centroid (frozen)": Estimate(value=-0.2, low=-0.3, high=-0.1)}
    confusion = Confusion(labels=("a", "b", "c")[: len(counts)], counts=counts)
    kit.save_scores(classification, kit.scores("full-seed42", "trained", 0.6, confusion=confusion, differences=worse))
    verdict, steps = build_run_headline_and_advice(read_run(classification))
    assert verdict.label == "Worse than the best baseline"
    assert ("Nearly every test row gets the same label" in " ".join(steps)) == (is_proposed is not None)
    assert ("--set train.class_weights=balanced" in " ".join(steps)) == bool(is_proposed)


def test_tagger_that_finds_nothing_is_told(classification: Path, kit: SimpleNamespace) -> None:
    found = {"nearest centroid (frozen)": Estimate(value=-0.8, low=-0.9, high=-0.7)}
    row = kit.scores("full-seed42", "trained", 0.0, differences=found)
    nothing = Estimate(value=0.0, low=0.0, high=0.0)
    metrics = {**row.metrics, "precision": nothing, "recall": nothing}
    kit.save_scores(classification, row.model_copy(update={"metrics": metrics}))
    assert build_run_headline_and_advice(read_run(classification))[1][0].startswith(
        "The model finds no entity in the test rows."
    )


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_the_batches_on_a_falling_curve_is_no_sign_of_a_high_rate(seed: int) -> None:
    draw = np.random.default_rng(seed)
    falling = np.geomspace(1.0, 0.6, 24) * draw.normal(1.0, 0.2, 24)
    loss = tuple((10 * place, float(value)) for place, value in enumerate(falling, start=1))
    said = " ".join(suggest_next_steps(but(steps=80, train_loss=loss)))
    assert "higher than it began" not in said
    assert LONGER in said
