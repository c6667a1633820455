"""A budget for forgetting: what steers, what is chosen, what is certified, and whole runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fulltune.errors import DataError, FulltuneError, InterruptedRun, RecipeError
from fulltune.forgetting import budget
from fulltune.forgetting.generic_text import load_budget_texts
from fulltune.inference.run import GenericText
from fulltune.recipe.file import load_recipe
from fulltune.recipe.model import PreserveBlock
from fulltune.records.forgetting import BudgetResult, Drift, InterpolationPoint
from fulltune.records.plan import GenericTexts
from fulltune.report.run.about_forgetting import describe_budget_cost
from fulltune.train.forgetting import within_budget
from fulltune.train.forgetting.generic import Replay, kl_divergence
from tests import plans, tiny
from tests.preserved import preserved_record
from tests.train import runs
from tests.train.test_resume import ask_to_stop, assert_same

ROWS = tiny.topic_rows(64)
TRAIN: dict[str, Any] = {
    "global_batch_size": 8,
    "micro_batch_size": 4,
    "num_train_epochs": 3,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "save_steps": 4,
}
BLOCKS: dict[str, Any] = {"train": TRAIN, "method": {"learning_rate": 3e-3}, "evaluate": {"metric": "loss"}}


def preserved(folder: Path) -> BudgetResult:
    (file,) = (folder / "run" / "preserve").glob("*.json")
    return BudgetResult.load(file)


# ---- pure parts ------------------------------------------------------------------------------------------------


def at(drift: float, error: float = 0.0) -> Drift:
    return Drift(mean=drift, error=error, texts=100)


@pytest.mark.parametrize(
    ("drift", "error", "rate", "expected"),
    [
        (0.01, 0.0, 0.0, 1.0),  # as much as is allowed
        (0.013, 0.0, 0.0, np.exp(0.3)),
        (0.10, 0.0, 0.0, 1.5),  # not by more at once
        (0.00, 0.0, 0.0, 1 / 1.5),
        (0.00, 0.02, 0.0, 1.5),  # the upper bound counts
        (0.02, 0.0, 1.0, 1.0),  # at a high rate more passes again
        (np.nan, 0.0, 0.0, 1.0),
    ],
)
def test_weight_rises_where_the_budget_is_spent(drift: float, error: float, rate: float, expected: float) -> None:
    found = budget.next_replay_weight(20.0, at(drift, error), 0.01, rate, budget.LANGUAGE_WEIGHTS)
    assert found == pytest.approx(20 * expected, rel=1e-6)


def point(share: float, drift: float, metric: float, error: float = 0.0) -> InterpolationPoint:
    return InterpolationPoint(share=share, drift=at(drift, error), metric=metric)


@pytest.mark.parametrize(
    ("points", "better", "expected"),
    [
        ([point(0, 0, 0.5), point(0.5, 0.01, 0.7), point(1, 0.05, 0.9)], True, 0.5),
        ([point(0, 0, 0.5), point(0.5, 0.01, 0.4), point(1, 0.05, 0.9)], True, 0.0),  # nothing better is within it
        ([point(0, 0, 2.0), point(0.5, 0.01, 1.5), point(1, 0.05, 1.0)], False, 0.5),
        ([point(0, 0, 0.5), point(0.4, 0.01, 0.7), point(0.5, 0.015, 0.7)], True, 0.4),  # as good, and moved less
        ([point(0, 0, 0.5), point(0.5, 0.019, 0.7, error=0.001)], True, 0.0),  # the held-out half may say no
    ],
)
def test_best_point_within_the_budget_is_chosen(
    points: list[InterpolationPoint], better: bool, expected: float
) -> None:
    assert budget.best_point_within(points, 0.02, better).share == expected


@pytest.mark.parametrize(("drift", "error", "passed"), [(0.01, 0.005, True), (0.01, 0.007, False), (0.03, 0.0, False)])
def test_certificate_passes_where_the_upper_bound_is_within(drift: float, error: float, passed: bool) -> None:
    start = point(0, 0, 0.5)
    found = preserved_record([start], start, limit=0.02, sealed=at(drift, error))
    assert found.sealed is not None
    assert (found.passed, found.sealed.upper) == (passed, pytest.approx(drift + 1.645 * error))


# ---- texts -----------------------------------------------------------------------------------------------------


def numbered(file: Path, count: int, word: str = "text") -> Path:
    file.write_text("".join(f"{word} number {place} says nothing new\n" for place in range(count)), encoding="utf-8")
    return file


def test_no_text_is_in_two_parts(tmp_path: Path) -> None:
    probe, other = numbered(tmp_path / "probe.txt", 300), numbered(tmp_path / "other.txt", 500, "line")
    shared = load_budget_texts(PreserveBlock(budget="1%", probe=str(probe)))
    apart = load_budget_texts(PreserveBlock(budget="1%", probe=str(probe), replay=str(other)))
    bundled = load_budget_texts(PreserveBlock(budget="1%"))
    sizes = []
    for found in (shared, apart, bundled):
        three = (found.selection, found.held_out, found.replayed)
        sizes.append(tuple(map(len, three)))
        assert len({text for part in three for text in part}) == sum(sizes[-1])
    assert sizes[:2] == [(100, 100, 100), (150, 150, 500)]
    assert sizes[2][0] == sizes[2][1] > 200
    assert sizes[2][2] > 1000
    assert load_budget_texts(PreserveBlock(budget="1%", probe=str(probe))) == shared


def test_replayed_texts_leave_out_what_the_probe_has(tmp_path: Path) -> None:
    probe, more = numbered(tmp_path / "probe.txt", 100), numbered(tmp_path / "more.txt", 120)
    found = load_budget_texts(PreserveBlock(budget="1%", probe=str(probe), replay=str(more)))
    assert len(found.replayed) == 20
    with pytest.raises(DataError, match=r"preserve\.replay: .*all texts are also in preserve.probe"):
        load_budget_texts(PreserveBlock(budget="1%", probe=str(probe), replay=str(probe)))


def test_probe_that_is_too_short_for_a_certificate_says_how_much_it_takes(tmp_path: Path) -> None:
    probe = numbered(tmp_path / "probe.txt", 100)
    with pytest.raises(
        DataError,
        match=r"contains 100 texts; a budget needs at least 120 \(40 for selection, 40 for the final measurement",
    ):
        load_budget_texts(PreserveBlock(budget="1%", probe=str(probe)))
    assert len(load_budget_texts(PreserveBlock(budget="1%", probe=str(probe), replay=None)).held_out) == 50


def test_replayed_texts_come_once_each_before_any_comes_again() -> None:
    def replay_of(count: int, rows: int) -> Replay:
        inputs: Any = SimpleNamespace(plan=plans.plan(seed=3, generic=GenericTexts(replay_rows=rows)))
        monitor: Any = SimpleNamespace(trainer=None)
        return Replay(inputs, monitor, GenericText(tuple([n] for n in range(count)), 0, True, "fp32"), rows, 0.01)

    replay = replay_of(10, 4)
    drawn = [replay.texts_of_step(step) for step in range(1, 11)]
    flat = [place for rows in drawn for place in rows]
    for start in range(0, 40, 10):
        assert sorted(flat[start : start + 10]) == list(range(10))
    assert flat[:10] != flat[10:20]
    assert replay.texts_of_step(7) == drawn[6]
    many = replay_of(3, 8)
    assert sorted(many.texts_of_step(1) + many.texts_of_step(2) + many.texts_of_step(3)) == sorted([0, 1, 2] * 8)


# ---- recipes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ({"preserve": {"budget": "much"}}, "preserve.budget: expected a share such as 1% or 0.01, found 'much'"),
        ({"preserve": {"budget": "100%"}}, "expected a share above 0 and below 100%"),
        ({"preserve": {"budget": 2}}, "found '2'; for 2% write '2%'"),
        ({"preserve": {"replay": "more.txt"}}, "preserve.replay: has no effect without preserve.budget"),
        ({"preserve": {"budget": "1%", "drift": False}}, "preserve.drift: false, but preserve.budget needs it"),
        ({"preserve": {"budget": "1%"}, "method": {"kind": "prompt"}}, "'prompt' does not support preserve.budget"),
        ({"preserve": {"budget": "1%"}, "method": {"learning_rate": "search"}}, "preserve.budget: is not supported"),
        (
            {"preserve": {"budget": "1%"}, "methods": ["full", "lora"]},
            "preserve.budget: cannot be set in a comparison, which measures each method's drift itself; remove it",
        ),
    ],
)
def test_budget_that_cannot_be_is_refused(blocks: Mapping[str, Any], said: str, tmp_path: Path) -> None:
    data = tiny.write_csv(tmp_path / "rows.csv", ROWS)
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", "model", data, **blocks)
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe)
    assert said in str(refused.value)


# ---- runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held")
    runs.run(folder, tiny_encoder, ROWS, until="report", preserve={"budget": "0.3%"}, **BLOCKS)
    return folder


def test_run_with_a_budget_ends_within_it(held: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    free = runs.run(tmp_path, tiny_encoder, ROWS, **BLOCKS)
    drift = [event["metrics"]["drift"] for event in runs.events(tmp_path, "eval")][-1]
    found = preserved(held)
    assert drift > found.limit  # what the budget forbids
    assert found.passed
    assert not found.choice.is_start
    assert free.outcome is not None
    report = (held / "run" / "report.md").read_text(encoding="utf-8")
    assert "Forgetting (budget 0.3%): PASS" in report
    assert re.search(
        r"from the recipe: \d+ texts for selection, \d+ for the final measurement, [\d,]+ for replay", report
    )
    assert [event["result"]["trial"] for event in runs.events(held, "certified")] == [found.trial]


def test_held_out_texts_are_opened_once(held: Path, tiny_encoder: Path) -> None:
    """The finished run, done once more from its last checkpoint, keeps its certificate and its choice."""
    found, weights = preserved(held), runs.final_weights(held)
    with mock.patch.object(within_budget, "_choose_and_certify", side_effect=AssertionError("opened again")):
        runs.run(held, tiny_encoder, ROWS, until="train", preserve={"budget": "0.3%"}, **BLOCKS)
    assert preserved(held) == found
    assert_same(runs.final_weights(held), weights)


def test_weights_of_generic_text_and_replayed_rows_go_on_where_a_run_was_stopped(
    held: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    blocks = {"preserve": {"budget": "0.3%"}, **BLOCKS}
    with pytest.raises(InterruptedRun):
        runs.run(tmp_path, tiny_encoder, ROWS, options={"listener": runs.at_step(11, ask_to_stop)}, **blocks)
    runs.run(tmp_path, tiny_encoder, ROWS, **blocks)
    steered = [[(one["step"], one["weight"]) for one in runs.events(folder, "steered")] for folder in (tmp_path, held)]
    assert steered[0] == steered[1]
    assert len(steered[0]) > 5
    assert len({weight for _, weight in steered[0]}) > 3
    assert preserved(tmp_path).choice == preserved(held).choice
    assert_same(runs.final_weights(tmp_path), runs.final_weights(held))


@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.long), "lora"])
def test_finished_model_of_a_decoder_lies_on_the_line(kind: str, tiny_decoder: Path, tmp_path: Path) -> None:
    """By the pretrained weights and those of a run that has all the same but the last choice."""
    blocks: dict[str, Any] = {"task": "causal-lm", "train": TRAIN, "method": {"kind": kind, "learning_rate": 1e-2}}
    rows = tiny.pair_rows(64)
    few = mock.patch.multiple(within_budget, SHARES=(1.0, 0.4), REFINEMENTS=0)
    with (
        few,
        mock.patch.object(
            within_budget, "best_point_within", lambda points, *_: next(one for one in points if one.share == 0.4)
        ),
    ):
        runs.run(tmp_path / "held", tiny_decoder, rows, preserve={"budget": "2%"}, **blocks)
    found = preserved(tmp_path / "held")
    assert found.is_language_model
    assert "(chance: " in (found.weak_texts_reason or "")  # a model of random weights
    assert found.sealed is not None
    assert found.sealed.texts >= 200
    with mock.patch("fulltune.train.worker.attempt.keep_within_budget", return_value=None):
        runs.run(tmp_path / "whole", tiny_decoder, rows, preserve={"budget": "2%"}, **blocks)
    name = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    ends = [load_file(tmp_path / one / "run" / "models" / kind / name) for one in ("held", "whole")]
    begin = load_file(tiny_decoder / "model.safetensors") if kind == "full" else {}
    for tensor, whole in ends[1].items():
        if kind == "full":
            expected = torch.lerp(begin[tensor], whole, 0.4)
        else:
            expected = whole * 0.4 if "lora_B" in tensor else whole
        assert torch.allclose(ends[0][tensor], expected, atol=1e-7), tensor


def test_budget_that_nothing_can_be_learned_within_is_infeasible(tiny_encoder: Path, tmp_path: Path) -> None:
    preserve = {"budget": "0.0001%", "replay": None}
    few = mock.patch.multiple(within_budget, SHARES=(1.0, 0.9), REFINEMENTS=0)
    with few:
        runs.run(tmp_path, tiny_encoder, ROWS, until="report", preserve=preserve, **BLOCKS)
    found = preserved(tmp_path)
    assert found.choice.is_start
    assert (found.sealed, found.opening_times) == (None, ())
    assert found.choice.share == 0
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "infeasible" in report
    assert "the pretrained model's" in report
    evidence, helps = describe_budget_cost(found)
    assert "limits the weights to the pretrained model" in evidence
    assert "--set preserve.budget=" in helps
    assert runs.events(tmp_path, "steered") == []


def test_divergence_is_that_of_torch_where_all_tokens_are_kept_and_less_where_some_are() -> None:
    logits = torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, after = torch.log_softmax(logits[0], -1), torch.log_softmax(logits[1], -1)
    whole = float(torch.nn.functional.kl_div(after, before, log_target=True, reduction="sum"))
    assert float(kl_divergence(before, after)) == pytest.approx(whole, rel=1e-4)
    some = before.topk(10, -1).indices
    part = float(kl_divergence(before.gather(-1, some), after.gather(-1, some)))
    assert 0 < part < whole
    assert float(kl_divergence(before, before)) == pytest.approx(0.0, abs=1e-9)


def test_run_does_not_go_on_with_other_texts_than_it_was_measured_on(tiny_encoder: Path, tmp_path: Path) -> None:
    numbered(tmp_path / "probe.txt", 300)
    blocks = {"preserve": {"probe": "probe.txt"}, **BLOCKS}
    with pytest.raises(InterruptedRun):
        runs.run(tmp_path, tiny_encoder, ROWS, options={"listener": runs.at_step(11, ask_to_stop)}, **blocks)
    numbered(tmp_path / "probe.txt", 300, "another")
    with pytest.raises(FulltuneError, match=r"the texts of preserve\.probe changed since this run was planned"):
        runs.run(tmp_path, tiny_encoder, ROWS, **blocks)
