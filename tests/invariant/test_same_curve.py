"""The same global batches give the same losses and weights, however they are cut into micro batches and processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fulltune.records.data import DataSummary
from tests import tiny
from tests.cases import others_long
from tests.train import runs

# Neither a head that starts from a probe nor values far from 0 make rounding larger than what is compared.
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02}
RANDOM = {"head_init": "random"}
# In no case do the train rows fill the last global batch of an epoch.
TRAIN: dict[str, Any] = {"num_train_epochs": 2, "global_batch_size": 8, "logging_steps": 1, "warmup_steps": 0}
CUTS: tuple[dict[str, Any], ...] = (
    {"micro_batch_size": 4},
    {"micro_batch_size": 1},
    {"micro_batch_size": 2, "activation_checkpointing": True},
)


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in runs.events(folder, "train")]


def assert_same(folder: Path, other: Path) -> None:
    assert losses(other) == pytest.approx(losses(folder), abs=1e-4)
    norms = [[event["grad_norm"] for event in runs.events(where, "train")] for where in (folder, other)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3, abs=1e-4)
    one, two = runs.final_weights(folder), runs.final_weights(other)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


def assert_any_cut_is_the_same(folder: Path, model: Path, rows: runs.Rows, **blocks: Any) -> None:
    runs.run(folder / "whole", model, rows, train={**TRAIN, "micro_batch_size": 8}, **blocks)
    curve = losses(folder / "whole")
    assert len(curve) >= 6
    assert len(set(curve)) == len(curve)
    rows_in_train = DataSummary.load(folder / "whole" / "run" / "data" / "summary.json").splits["train"].rows
    assert rows_in_train % 8 > 1
    for number, cut in enumerate(CUTS):
        runs.run(folder / str(number), model, rows, train={**TRAIN, **cut}, **blocks)
        assert_same(folder / "whole", folder / str(number))


def label_rows() -> list[dict[str, Any]]:
    return tiny.topic_rows(34)


def several_label_rows() -> list[dict[str, Any]]:
    rows = []
    for number, row in enumerate(label_rows()):
        labels = [name for bit, name in enumerate(("a", "b", "c")) if (number + 1) >> bit & 1]
        rows.append({"text": row["text"], "labels": labels})
    return rows[:-3]  # so that the last global batch of the train rows is a part of one


def number_rows() -> list[dict[str, Any]]:
    # One target is -100: the value that transformers takes for "no label".
    rows = [{"text": row["text"], "score": number / 7 - 2} for number, row in enumerate(label_rows())]
    rows[0]["score"] = -100.0
    return rows


def answer_rows() -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"{tiny.PLACES[number % 10]} {number}:",
            "completion": " soup" * (1 + 17 * (number % 2) + number % 5),
        }
        for number in range(34)
    ]


def query_rows() -> list[dict[str, Any]]:
    """Of which several share a positive."""
    return [
        {"query": row["text"], "positive": f"{row['label']} {number % 16}"} for number, row in enumerate(label_rows())
    ]


CASES = {
    "single_label": ("bert", NO_DROPOUT, label_rows, {"method": RANDOM}),
    "decoder": ("llama", {}, label_rows, {}),
    "multi_label": ("bert", NO_DROPOUT, several_label_rows, {"method": RANDOM}),
    "regression": ("bert", NO_DROPOUT, number_rows, {"method": RANDOM, "data": {"label": "score"}}),
    "answers": ("llama", {}, answer_rows, {"task": "causal-lm"}),
    "queries": ("bert", NO_DROPOUT, query_rows, {"task": "embedding"}),
}


@pytest.mark.parametrize("case", others_long(CASES, "single_label", "answers"))
def test_any_micro_batch_and_recomputing_give_the_same_curve(case: str, tmp_path: Path) -> None:
    """`answers` have 1 to 22 trained tokens: the mean of micro batch means would weigh the short ones more."""
    kind, changes, rows, blocks = CASES[case]
    model = tiny.save_model(tmp_path / "model", kind, **changes)

    assert_any_cut_is_the_same(tmp_path, model, rows(), **blocks)


@pytest.mark.parametrize("case", ["multi_label", "single_label", "regression", "answers"])
def test_logged_loss_is_the_mean_over_rows_or_trained_tokens(case: str, tmp_path: Path) -> None:
    """The loss of step 1, computed anew by hand on the untrained model and the first global batch."""
    from fulltune.inference.store import Rows
    from fulltune.tasks import Target, task_named
    from fulltune.train.loop.sampler import GlobalBatchSampler
    from fulltune.train.worker.loading import apply_method, load_pretrained

    kind, changes, rows, blocks = CASES[case]
    model = tiny.save_model(tmp_path / "model", kind, **changes)
    train = {**TRAIN, "micro_batch_size": 2}
    job = runs.job(tmp_path, model, rows(), train=train, **blocks)
    reached = runs.run(tmp_path, model, rows(), train=train, **blocks)
    summary, task = reached.summary, task_named(job.recipe.task)
    target = replace(Target.of(summary), logit_scale=summary.scale or (0.0, 1.0))
    torch.manual_seed(42)
    bare, tokenizer, _ = load_pretrained(job.recipe, task, target)
    untrained = apply_method(bare, job.recipe).model
    split = Rows(tmp_path / "run" / "data" / "train")
    first = GlobalBatchSampler(split["length"], 8, 8, 42, True).batches_of_epoch()[0]
    batch = task.collate([split[i] for i in first], tokenizer.pad_token_id)
    labels = batch.pop("labels")
    items = int((labels[:, 1:] != -100).sum()) if case == "answers" else 8
    with torch.no_grad():
        expected = float(task.loss(untrained(**batch).logits, labels, target)) / items

    assert losses(tmp_path)[0] == pytest.approx(expected, rel=1e-4)
