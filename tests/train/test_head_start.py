"""With few rows and few steps a head that starts from a linear probe is there, and one that starts at random is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fulltune import probe
from fulltune.evaluate import LINEAR_PROBE
from fulltune.records.probe import Probe
from fulltune.records.scores import Scores
from fulltune.system.run_folder import RunResult
from tests import tiny
from tests.train import runs

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FEW_STEPS: dict[str, Any] = {"max_steps": 4, "group_by_length": False}
STANDING: dict[str, Any] = {"max_steps": 1, "warmup_steps": 0, "weight_decay": 0.0}
"""With a rate of 1e-9: what is saved is what training began with."""
RATE, ALMOST_NONE = 1e-5, 1e-9


def words_and(signal: str, number: int) -> str:
    """The signal somewhere among words that say nothing."""
    words = [tiny.PLACES[(number * step + step) % 10] for step in (1, 3, 7)]
    words.insert(number % 4, signal)
    return " ".join([*words, str(number)])


def single_label(number: int) -> dict[str, Any]:
    kind = number % 3
    return {"text": words_and(("rain", "apple", "cheese")[kind], number // 3), "label": ("wet", "sweet", "salty")[kind]}


def regression(number: int) -> dict[str, Any]:
    kind = number % 3
    return {
        "text": words_and(("rain", "apple", "cheese")[kind], number // 3),
        "score": (1.5, -0.5, 0.25)[kind] + number % 7 / 100,
    }


def tags(number: int) -> dict[str, Any]:
    """A word's type follows from its first sub-word."""
    random = np.random.default_rng(number)
    words = random.choice(["soup", "snow", "bread", "bean", "rain", "town", "apple", "cheese"], 6).tolist()
    kinds = {"soup": "B-X", "snow": "B-X", "bread": "B-Y", "bean": "B-Y"}
    return {"tokens": [*words, str(number)], "tags": [*(kinds.get(word, "O") for word in words), "O"]}


TASKS: dict[str, tuple[Callable[[int], dict[str, Any]], str, dict[str, Any]]] = {
    "regression": (regression, "pearson", {"data": {"label": "score", "problem_type": "regression"}}),
    "tags": (tags, "f1", {"task": "token-classification"}),
}
ROWS = [single_label(number) for number in range(64)]


def row(reached: RunResult, name: str) -> Scores:
    [found] = [scores for scores in reached.scores if name in (scores.name, scores.kind)]
    return found


def started(folder: Path) -> dict[str, str]:
    """Name to result of the first attempt's checks."""
    return {check["name"]: check["result"] for check in runs.events(folder, "checks")[0]["checks"]}


def probe_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "run" / "probe").iterdir())}


# ---- what it is good for ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_few_steps_are_enough_from_a_probe_and_not_from_random(name: str, tmp_path: Path) -> None:
    make, metric, blocks = TASKS[name]
    model = tiny.save_model(tmp_path / "model", "bert", **NO_DROPOUT)
    rows = [make(number) for number in range(200)]
    found = {}
    for start in ("probe", "random"):
        found[start] = runs.run(
            tmp_path / start,
            model,
            rows,
            until="evaluate",
            method={"head_init": start, "learning_rate": RATE},
            train=FEW_STEPS,
            **{**blocks, "data": {**blocks.get("data", {}), "test_fraction": 0.4}},
        )
    values = {start: row(reached, "trained").metrics for start, reached in found.items()}
    floor = found["random"].scores[0].metrics
    if name == "regression":
        # A head that starts at random has hardly begun to move.
        assert values["probe"]["rmse"].value < 0.9 * floor["rmse"].value
        assert values["random"]["rmse"].value > 0.97 * floor["rmse"].value
        return
    assert values["probe"][metric].value > 0.6
    assert values["probe"][metric].value > values["random"][metric].value + 0.25
    assert values["probe"][metric].value > row(found["probe"], LINEAR_PROBE).metrics[metric].value - 0.2
    assert LINEAR_PROBE in [scores.name for scores in found["random"].scores]


# ---- every method ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_each_method_begins_with_the_heads_start(kind: str, tiny_encoder: Path, tmp_path: Path) -> None:
    reached = runs.run(
        tmp_path,
        tiny_encoder,
        ROWS,
        until="evaluate",
        method={"kind": kind, "learning_rate": ALMOST_NONE},
        train=STANDING,
    )
    assert reached.plan is not None
    assert reached.plan.head_init == "probe"
    wanted = load_file(tmp_path / "run" / "probe" / "head.safetensors")
    wanted |= load_file(tmp_path / "run" / "probe" / "start.safetensors")
    assert set(wanted) == {
        f"{layer}.{part}" for layer in ("classifier", "bert.pooler.dense") for part in ("weight", "bias")
    }
    saved: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "run" / reached.plan.model_folder).glob("*.safetensors"):
        saved |= load_file(path)
    for name, values in wanted.items():
        [found] = [key for key in saved if key.endswith(name)]
        torch.testing.assert_close(saved[found], values, atol=1e-6, rtol=1e-6)
    assert started(tmp_path)["head"].startswith(
        "new, starts from a linear probe of the pretrained model (52 train rows"
    )


def test_same_files_whichever_seed_fits_first(tiny_encoder: Path, tmp_path: Path) -> None:
    """Also where the pooler that was drawn is kept: trials side by side ask in any order."""
    files, bare = [], tmp_path / "bare"
    shutil.copytree(tiny_encoder, bare)
    values = load_file(bare / "model.safetensors")
    kept = {name: one for name, one in values.items() if "pooler" not in name}
    assert len(kept) < len(values)
    save_file(kept, bare / "model.safetensors", {"format": "pt"})
    for seed in (1, 2):
        with mock.patch.object(probe, "recognise_activation", return_value=None):
            runs.run(tmp_path / str(seed), bare, ROWS, train={**STANDING, "seed": seed})
        head = Probe.load(tmp_path / str(seed) / "run" / "probe" / "probe.json").head
        assert head is not None
        assert head.dense == "loaded"
        found = probe_files(tmp_path / str(seed))
        files.append([found[name] for name in ("head.safetensors", "start.safetensors", "frozen.safetensors")])
    assert files[0] == files[1]


# ---- where there is none ---------------------------------------------------------------------------------------


def test_head_that_a_config_promises_and_the_weights_lack_starts_from_a_probe(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    first = runs.run(tmp_path / "first", tiny_encoder, ROWS, train=FEW_STEPS)
    assert first.outcome is not None
    assert first.outcome.model_folder is not None
    model = first.folder / first.outcome.model_folder
    values = load_file(model / "model.safetensors")
    bare = {name: one for name, one in values.items() if not name.startswith("classifier")}
    save_file(bare, model / "model.safetensors", {"format": "pt"})
    reached = runs.run(tmp_path / "second", model, ROWS, until="evaluate", train=FEW_STEPS)
    assert reached.plan is not None
    assert reached.plan.head_init is None
    assert started(tmp_path / "second")["head"].startswith("new, starts from a linear probe of the pretrained model")
