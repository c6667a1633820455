"""A run is the same wherever its state lies: in one process, copied to several, shared out by FSDP2, and on the way
from one to the other. Processes are forks of one: how they are started is not what is compared."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fulltune.records.forgetting import BudgetResult
from fulltune.system.hardware import num_cores
from tests.invariant import placed
from tests.invariant.placed import FAMILIES, MODELS, Curve, Place
from tests.invariant.test_same_curve import losses
from tests.near import assert_same_changes
from tests.train import runs

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(num_cores() < 2, reason="needs a CPU core per process"),
    pytest.mark.usefixtures("forked_ranks"),
]

SINGLE, SHARED = Place("single"), Place("fsdp2:2")
FEW: dict[str, Any] = {"max_steps": 16, "eval_steps": 8}
STOP = 6


def in_one_process(folder: Path, family: placed.Family, **changes: Any) -> Curve:
    """A run without a process of its own; the same one when asked again."""
    if not (folder / "run").exists():
        with runs.in_this_process():
            placed.train(folder, family, SINGLE, **changes)
    return placed.read(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("placements")


@pytest.fixture(scope="module")
def one(folder: Path) -> Curve:
    return in_one_process(folder / "one", FAMILIES["encoder"], **FEW)


@pytest.fixture(scope="module")
def shared(folder: Path) -> Curve:
    placed.train(folder / "shared", FAMILIES["encoder"], SHARED, **FEW)
    return placed.read(folder / "shared")


@pytest.fixture(scope="module")
def stopped(folder: Path) -> int:
    """The step at which a run in `folder / "run"` was stopped, which `folder / "stopped"` keeps."""
    step = placed.stop_at(folder / "run", FAMILIES["encoder"], SHARED, STOP, **FEW)
    (folder / "run").rename(folder / "stopped")
    return step


def continued(folder: Path, stopped: int, place: Place) -> Curve:
    """The stopped run, which goes on where it was begun."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    shutil.copytree(folder / "stopped", folder / "run")
    assert placed.continued_from(folder / "run", FAMILIES["encoder"], place, **FEW) == stopped
    return placed.read(folder / "run")


def assert_near(reference: Curve, found: Curve) -> None:
    differences = placed.differences(reference, found)
    print(differences)
    assert differences.loss <= 1e-5
    assert differences.score <= 1e-4
    assert differences.norm <= 1e-3


def test_shared_out_run_is_that_of_one_process(one: Curve, shared: Curve, folder: Path) -> None:
    assert_near(one, shared)
    assert_same_changes(shared.outcome.parameter_changes, one.outcome.parameter_changes)
    assert shared.outcome.best_step == one.outcome.best_step
    assert list((folder / "shared" / "run" / "checkpoints").glob("*/*")) == []
    left = {path.name for path in (folder / "shared" / "run").glob("attempts/*/*")}
    assert left == {"journal.jsonl", "log.txt", "metrics.jsonl", "outcome.json", "phase", "request.json"}


def test_its_model_is_a_plain_one(one: Curve, shared: Curve, folder: Path) -> None:
    paths = [folder / name / "run" / "models" / "full" for name in ("one", "shared")]
    assert sorted(path.name for path in paths[0].iterdir()) == sorted(path.name for path in paths[1].iterdir())
    assert (paths[0] / "config.json").read_text() == (paths[1] / "config.json").read_text()
    tokens = torch.tensor([[2, 7, 30, 41, 3]])
    logits = [AutoModelForSequenceClassification.from_pretrained(path)(tokens).logits for path in paths]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)


def test_stopped_and_continued_it_is_the_same_bit_by_bit(shared: Curve, stopped: int, folder: Path) -> None:
    assert STOP <= stopped < 16

    found = continued(folder, stopped, SHARED)

    assert found.steps == list(range(1, 17))
    assert placed.differences(shared, found).none
    assert found.outcome.parameter_changes == shared.outcome.parameter_changes


OTHERS = {"encoder-decoder": (FAMILIES["encoder-decoder"], 16), **{name: (one, 2) for name, one in MODELS.items()}}
"""Models with other blocks, and their steps. A decoder is trained below, within a budget."""


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_those_of_one_process(name: str, tmp_path: Path) -> None:
    family, steps = OTHERS[name]
    changes: dict[str, Any] = {"max_steps": steps, "eval_steps": steps // 2}
    expected = in_one_process(tmp_path / "one", family, **changes)
    placed.train(tmp_path / "shared", family, SHARED, **changes)
    found = placed.read(tmp_path / "shared")
    assert_near(expected, found)
    assert_same_changes(found.outcome.parameter_changes, expected.outcome.parameter_changes)


def test_method_that_trains_little_is_that_of_one_process(tmp_path: Path) -> None:
    """The weights that stay as they were are shared out."""
    family = FAMILIES["encoder"]
    values = {**family.blocks["method"], "kind": "lora", "learning_rate": 3e-2}
    family = replace(family, blocks={**family.blocks, "method": values})
    with runs.in_this_process():
        placed.train(tmp_path / "one", family, SINGLE, **FEW)
    placed.train(tmp_path / "shared", family, SHARED, **FEW)
    one, shared = (losses(tmp_path / name) for name in ("one", "shared"))
    assert len(set(one)) == 16
    assert shared == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("place", ["single", "fsdp2:4"])
def test_run_goes_on_elsewhere(place: str, one: Curve, stopped: int, folder: Path) -> None:
    """Also with more processes than there are cores."""
    assert_near(one, continued(folder, stopped, Place(place)))


def test_budget_for_forgetting_chooses_the_same_point(tmp_path: Path) -> None:
    """Generic text is read and replayed, and the weights are scaled back, by all processes together."""
    family = FAMILIES["decoder"]
    family = replace(family, blocks={**family.blocks, "preserve": {"budget": "2%"}})
    expected = in_one_process(tmp_path / "one", family, **FEW)
    placed.train(tmp_path / "shared", family, SHARED, **FEW)
    found = placed.read(tmp_path / "shared")
    assert_near(expected, found)
    assert_same_changes(found.outcome.parameter_changes, expected.outcome.parameter_changes)
    one, shared = (
        BudgetResult.load(next((tmp_path / where / "run" / "preserve").glob("*.json"))) for where in ("one", "shared")
    )
    assert shared.choice.share == one.choice.share
    assert len(shared.points) == len(one.points)
    for point, wanted in zip(shared.points, one.points, strict=True):
        assert point.drift.mean == pytest.approx(wanted.drift.mean, abs=1e-5)
        assert point.metric == pytest.approx(wanted.metric, abs=1e-4)
    assert list((tmp_path / "shared" / "run").glob("attempts/*/*.safetensors")) == []


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_example_runs_from_rows_to_report(name: str, tmp_path: Path) -> None:
    placed.run_example(name, tmp_path)


@pytest.mark.parametrize("place", ["ddp:2", "fsdp2:2"])
def test_frozen_parts_are_the_same_in_several_processes(place: str, folder: Path) -> None:
    encoder = FAMILIES["encoder"]
    method = {**encoder.blocks["method"], "name": "full", "freeze": ["embeddings", "layer.0"]}
    family = replace(encoder, blocks={**encoder.blocks, "method": method})
    one = in_one_process(folder / "frozen-one", family, **FEW)
    placed.train(folder / place, family, Place(place), **FEW)
    several = placed.read(folder / place)
    assert_near(one, several)
    assert_same_changes(several.outcome.parameter_changes, one.outcome.parameter_changes)


@pytest.mark.parametrize(("place", "gather_once"), [("ddp:2", False), ("fsdp2:2", True), ("fsdp2:2", False)])
def test_answers_and_the_choice_are_those_of_one_process(place: str, gather_once: bool, folder: Path) -> None:
    placed.assert_same_answers(folder / "answers", place, gather_once)
