"""A comparison of full and LoRA that is held to a budget for forgetting."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fulltune import pipeline
from fulltune.compare import run as comparing
from fulltune.compare import trials
from fulltune.errors import FulltuneError, InterruptedRun
from fulltune.evaluate import outputs
from fulltune.forgetting.generic_text import NUM_TEXTS, parts
from fulltune.inference.generic import GenericText
from fulltune.records.comparison import Comparison, TrialResult
from fulltune.records.held import Drift, HeldRun, Point
from fulltune.train.forgetting import within_budget
from fulltune.train.loop.inputs import AttemptInputs
from tests.train.runs import in_this_process
from tests.train.small_comparisons import METHODS, job

# Where the head starts best only long runs are better than the untouched model.
LEARNS = [{**one, "head_init": "random"} for one in METHODS if isinstance(one, dict)]
FEW_POINTS: Any = {"SHARES": (1.0, 0.5), "REFINEMENTS": 0}


def held(folder: Path, budget: str = "1%", methods: list[Any] = METHODS, **blocks: Any) -> pipeline.Run:
    probe = folder / "probe.txt"
    probe.write_text("".join(f"text number {n} says nothing new\n" for n in range(130)), encoding="utf-8")
    return job(folder, methods, preserve={"budget": budget, "probe": str(probe)}, **blocks)


def feasible(folder: Path) -> pipeline.Run:
    """Something is learned within the budget."""
    return held(folder, "20%", LEARNS, evaluate={"metric": "loss"})


def compare(one: pipeline.Run) -> Comparison:
    with in_this_process(), mock.patch.multiple(within_budget, **FEW_POINTS):
        return comparing.run(one, "fulltune compare recipe.yaml")[0]


def runs_of(found: Comparison) -> dict[str, HeldRun]:
    """The held runs, by arm and seed."""
    return {f"{arm}-seed{seed}": one for arm, runs in found.held.items() for seed, one in runs.items()}


@dataclass
class Seen:
    """What a comparison opened and read."""

    opened: list[str] = field(default_factory=list)
    """Trials, each time that its sealed texts were opened."""
    texts: list[list[str]] = field(default_factory=list)
    """Generic texts that finished models were compared on, model by model."""


@contextlib.contextmanager
def watched() -> Iterator[Seen]:
    seen, sealed, read = Seen(), within_budget._of_sealed, outputs.outputs

    def opening(inputs: AttemptInputs, read: Any, text: GenericText, chosen: Point) -> Drift:
        seen.opened.append(inputs.plan.trial)
        return sealed(inputs, read, text, chosen)

    def reading(scoring: Any, model: Any, texts: list[str], *given: Any) -> Any:
        seen.texts.append(texts)
        return read(scoring, model, texts, *given)

    with mock.patch.object(within_budget, "_of_sealed", opening), mock.patch.object(outputs, "outputs", reading):
        yield seen


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Comparison, Seen]]:
    """A comparison that was stopped twice after a trial's sealed texts were opened."""
    folder = tmp_path_factory.mktemp("held")
    with watched() as seen:
        with (
            mock.patch("fulltune.train.worker.weights.save_model", side_effect=RuntimeError("a fault")),
            pytest.raises(FulltuneError, match="a fault"),
        ):
            compare(feasible(folder))  # before its model was saved
        with (
            mock.patch.object(trials, "keep_rows", side_effect=InterruptedRun("stopped by the test")),
            pytest.raises(InterruptedRun),
        ):
            compare(feasible(folder))  # before its result was
        yield folder / "run", compare(feasible(folder)), seen


@pytest.mark.slow
def test_comparison_of_one_seed_each_is_held_and_reads_sealed_texts_for_its_certificates_alone(tmp_path: Path) -> None:
    with watched() as seen:
        blocks = {"train": {"max_steps": 6}, "compare": {"seeds": 1}, "evaluate": {"metric": "loss"}}
        one = held(tmp_path, "20%", LEARNS, **blocks)
        found = compare(one)
    held_runs = runs_of(found)
    assert list(held_runs) == ["full-seed42", "lora-seed42"]
    assert seen.opened == [run.trial for run in held_runs.values() if run.is_feasible] != []
    assert all(run.is_feasible is (run.certificate is not None) for run in held_runs.values())
    # The untouched model, and two that were trained.
    shared = parts(one.recipe.preserve)
    assert seen.texts == [shared.choosing[:NUM_TEXTS]] * 3
    assert not {text for texts in seen.texts for text in texts} & set(shared.sealed)
    assert found.generic_text.endswith("probe.txt, selection texts of the budget")


@pytest.mark.long
def test_every_whole_run_is_within_the_budget_and_has_its_record(
    finished: tuple[Path, Comparison, Seen],
) -> None:
    folder, found, _ = finished
    names = ["full-seed42", "full-seed43", "lora-seed42", "lora-seed43"]
    assert sorted(path.stem for path in (folder / "preserve").iterdir()) == names
    assert sorted(runs_of(found)) == names
    for one in runs_of(found).values():
        sealed, result = one.certificate, TrialResult.load(folder / f"compare/trials/{one.trial}.json")
        assert result.metric == one.chosen.metric
        assert one.is_feasible is (sealed is not None)
        assert sealed is None or sealed.upper <= one.limit == 0.2


@pytest.mark.long
def test_comparison_that_was_stopped_opens_no_sealed_text_twice(finished: tuple[Path, Comparison, Seen]) -> None:
    _, found, seen = finished
    certified = [one for one in runs_of(found).values() if one.certificate is not None]
    assert sorted(seen.opened) == sorted(one.trial for one in certified) != []
    assert {len(one.opened) for one in certified} <= {1}


@pytest.mark.long
def test_comparison_within_whose_budget_nothing_is_learned_recommends_nothing(tmp_path: Path) -> None:
    found = compare(held(tmp_path, "0.0000001%"))
    assert not any(one.is_feasible for one in runs_of(found).values())
    assert (found.decision.verdict, found.decision.recommended) == ("UNDECIDED", "")
    card = (tmp_path / "run" / "card.md").read_text(encoding="utf-8")
    assert "full (seeds 42 and 43): nothing within the budget for forgetting was better than the untouched" in card
    assert "| infeasible  |" in card
