"""Training that begins with a model which was fine-tuned before."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fulltune.errors import InterruptedRun, SetupError
from tests import tiny
from tests.train import runs

ROWS = tiny.topic_rows(120)
DATA: dict[str, Any] = {"eval_fraction": 0.2}
"""24 eval rows."""


def _checks(folder: Path) -> dict[str, str]:
    return {check["name"]: check["result"] for check in runs.events(folder, "checks")[0]["checks"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> tuple[Path, float]:
    """The folder of a classifier that was trained here, and its accuracy on the eval rows."""
    folder = tmp_path_factory.mktemp("first")
    reached = runs.run(
        folder, tiny_encoder, ROWS, method={"learning_rate": 3e-3}, train={"num_train_epochs": 12}, data=DATA
    )
    assert _checks(folder)["head"].startswith("new, starts from a linear probe of the pretrained model")
    assert _checks(folder)["head"].endswith("; the checkpoint has no head for this task")
    assert reached.outcome is not None
    assert reached.outcome.model_folder is not None
    assert reached.outcome.best_metric is not None
    return reached.folder / reached.outcome.model_folder, reached.outcome.best_metric


_AS_IT_IS: dict[str, dict[str, Any]] = {
    "method": {"kind": "full", "learning_rate": 1e-9},
    "train": {"max_steps": 1, "warmup_steps": 0},
    "data": DATA,
}


def test_run_is_not_continued_with_other_pretrained_weights(tiny_encoder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_encoder, tmp_path / "model")
    blocks: dict[str, Any] = {"data": DATA, "train": {"max_steps": 12, "save_steps": 4}, "method": {"kind": "lora"}}
    stop = runs.at_step(8, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(InterruptedRun):
        runs.run(tmp_path, model, ROWS, options={"listener": stop}, **blocks)
    weights = load_file(model / "model.safetensors")
    other = {name: one * 1.01 if "encoder" in name else one for name, one in weights.items()}
    save_file(other, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SetupError, match="its weights changed since this run began"):
        runs.run(tmp_path, model, ROWS, **blocks)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert runs.run(tmp_path, model, ROWS, **blocks).outcome is not None


def test_checkpoint_with_its_labels_in_another_order_begins_with_what_it_learned(
    tmp_path: Path, trained: tuple[Path, float]
) -> None:
    model, accuracy = trained
    assert accuracy > 0.7
    turned = tmp_path / "turned"
    before = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    before.classifier.weight.data = before.classifier.weight.data.flip(0)
    before.classifier.bias.data = before.classifier.bias.data.flip(0)
    before.config.id2label, before.config.label2id = {0: "weather", 1: "food"}, {"weather": 0, "food": 1}
    before.save_pretrained(turned)
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(turned)
    reached = runs.run(tmp_path, turned, ROWS, **_AS_IT_IS)
    assert reached.outcome is not None
    assert reached.outcome.best_metric == accuracy
    expected = "kept from the checkpoint for 2 of 2 labels"
    assert _checks(tmp_path)["head"] == expected
    config = json.loads((reached.folder / "models/full/config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "food", "1": "weather"}


def test_checkpoint_that_can_do_the_task_is_a_row_to_beat(tmp_path: Path, trained: tuple[Path, float]) -> None:
    reached = runs.run(tmp_path, trained[0], ROWS, until="report", **_AS_IT_IS)
    before = next(row for row in reached.scores if row.kind == "untouched")
    after = reached.scores[-1]
    assert before.metrics["accuracy"].value == after.metrics["accuracy"].value  # a step of 1e-9
    assert after.differences[before.name].value == 0
    assert "before training" in (reached.folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("start", ["probe", "random"])
def test_checkpoint_with_two_of_four_labels_begins_better_than_a_new_head(
    tmp_path: Path, trained: tuple[Path, float], start: str
) -> None:
    """A third of the rows have new labels."""
    new = [
        {"text": f"a {word} of music number {number}", "label": word} for number in range(30) for word in ("jig", "air")
    ]
    blocks = {**_AS_IT_IS, "method": {**_AS_IT_IS["method"], "head_init": start}}
    reached = runs.run(tmp_path, trained[0], [*ROWS, *new], until="report" if start == "probe" else "train", **blocks)
    assert reached.plan is not None
    assert reached.outcome is not None
    kept = "kept from the checkpoint for 2 of 4 labels; new: air, jig"
    assert {one.name: one.reason for one in reached.plan.settings}["head"] == kept
    assert _checks(tmp_path)["head"].startswith(kept)
    assert ("; each new row starts from a linear probe" in _checks(tmp_path)["head"]) == (start == "probe")
    before, after = load_file(trained[0] / "model.safetensors"), runs.final_weights(tmp_path)
    torch.testing.assert_close(after["classifier.weight"][[1, 3]], before["classifier.weight"], atol=1e-6, rtol=0)
    torch.testing.assert_close(after["bert.pooler.dense.weight"], before["bert.pooler.dense.weight"], atol=1e-6, rtol=0)
    if start == "probe":
        runs.assert_report_is_whole(reached)
        return
    other = [{**row, "label": f"other {row['label']}"} for row in (*ROWS, *new)]
    (tmp_path / "new").mkdir()
    alone = runs.run(tmp_path / "new", trained[0], other, **blocks)
    assert alone.outcome is not None
    assert alone.outcome.best_metric is not None
    assert reached.outcome.best_metric is not None
    assert reached.outcome.best_metric > alone.outcome.best_metric + 0.2
