"""A whole run on images with a planted signal, from a folder per class to `predict`; broken images on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.special import softmax
from transformers import AutoImageProcessor, AutoModelForImageClassification

from fulltune import api, pipeline, predict
from fulltune.errors import DataError
from fulltune.evaluate import LINEAR_PROBE
from fulltune.system.run_folder import RunResult
from tests import tiny
from tests.contract.command import fulltune
from tests.train import runs

TRAIN: dict[str, Any] = {"num_train_epochs": 10}


def go(folder: Path, rows: Path, /, until: pipeline.Until = "report", **blocks: Any) -> RunResult:
    model = folder / "model"
    if not model.exists():
        tiny.save_image_model(model)
    blocks = {"task": "image-classification", "method": {"learning_rate": 5e-3}, "train": TRAIN, **blocks}
    recipe = tiny.write_recipe(folder / "recipe.yaml", model, rows, **blocks)
    with runs.in_this_process():
        return pipeline.run(api.job(recipe, run_folder=folder / "run", listener=lambda event: None), until)


def test_image_run_beats_the_baselines_and_answers_as_transformers_does(tmp_path: Path) -> None:
    folder = tiny.write_images(tmp_path / "images", 240)
    reached = go(tmp_path, folder)

    majority, frozen, as_head, trained = reached.scores
    assert (majority.name, as_head.name) == ("majority class", LINEAR_PROBE)
    assert frozen.name == "logistic regression (frozen embeddings)"
    assert trained.metrics["accuracy"].value >= max(majority.metrics["accuracy"].value, 0.5) + 0.3
    for untrained in (frozen, as_head):
        assert trained.metrics["accuracy"].value > untrained.metrics["accuracy"].value + 0.2
    assert trained.confusion is not None
    assert trained.calibration is not None
    assert reached.summary.labels == ("different", "same")
    assert reached.summary.max_length == 4

    made = reached.folder / "models" / "full"
    assert {path.name for path in made.iterdir()} >= {"preprocessor_config.json", "fulltune.json", "README.md"}
    assert "AutoImageProcessor" in (made / "README.md").read_text(encoding="utf-8")
    paths = [str(path) for path in sorted(folder.glob("*/*.png"))[::40]]
    predictor = predict.load_predictor(made)
    answers = predictor.predict([predict.row_from_text(path, predictor.notes) for path in paths])
    model = AutoModelForImageClassification.from_pretrained(made).eval()
    reader = AutoImageProcessor.from_pretrained(made, backend="pil")
    with torch.no_grad():
        logits = model(**reader([Image.open(path) for path in paths], return_tensors="pt")).logits
    expected = softmax(logits.numpy() / predictor.notes["temperature"], axis=-1)
    np.testing.assert_allclose([list(answer["probabilities"].values()) for answer in answers], expected, atol=1e-5)
    assert {answer["label"] for answer in answers} <= {"different", "same"}
    as_bytes = [{"image": Path(path).read_bytes()} for path in paths]
    assert predictor.predict(as_bytes) == answers
    table = folder / "asked.csv"
    table.write_text("\n".join(["image", *(str(Path(path).relative_to(folder)) for path in paths)]), encoding="utf-8")
    printed = fulltune("predict", made, "--file", table, "--json")
    assert printed.code == 0, printed.err
    said = [json.loads(line) for line in printed.out.splitlines()]
    assert [row.pop("place") for row in said] == [f"{table.name}:{line}" for line in range(2, len(paths) + 2)]
    assert said == answers
    with pytest.raises(DataError, match=r"missing\.png: no such file"):
        predictor.predict([{"image": str(tmp_path / "missing.png")}])


@pytest.mark.long
def test_resumed_image_run_gives_the_unbroken_weights(tmp_path: Path) -> None:
    """transformers saves ViT's tensors under other names than it trains them; a plain load would leave them out."""
    images = tiny.write_images(tmp_path / "images", 60)
    train = {"num_train_epochs": 2, "save_steps": 4, "eval_strategy": "epoch", "logging_steps": 1}
    go(tmp_path / "whole", images, "train", train=train)

    broken = tmp_path / "broken"
    tiny.save_image_model(broken / "model")
    blocks: dict[str, Any] = {"task": "image-classification", "method": {"learning_rate": 5e-3}, "train": train}
    recipe = tiny.write_recipe(broken / "recipe.yaml", broken / "model", images, **blocks)
    listener = runs.at_step(9, runs.fail)
    with runs.in_this_process(), pytest.raises(Exception, match="a fault, injected by a test"):
        pipeline.run(api.job(recipe, run_folder=broken / "run", listener=listener), "train")
    with runs.in_this_process():
        pipeline.run(api.job(recipe, run_folder=broken / "run", listener=lambda event: None), "train")
    journal = next((broken / "run").glob("attempts/*-02/journal.jsonl")).read_text(encoding="utf-8")
    assert '"resume"' in journal

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        return load_file(folder / "run" / "models" / "full" / "model.safetensors")

    one, two = weights(tmp_path / "whole"), weights(broken)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], msg=name)
