"""R-Drop: two answers to each row, and what it costs is planned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fulltune.errors import RecipeError, SetupError
from fulltune.train.worker.r_drop import disagreement
from tests import tiny
from tests.train.runs import events, run

TRAIN = {"num_train_epochs": 2, "global_batch_size": 16}


def test_disagreement_is_the_papers_for_the_mean_over_both_answers() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(5, 3), torch.randn(5, 3)
    p, q = F.log_softmax(one, -1), F.log_softmax(other, -1)
    both = F.kl_div(p, q, reduction="sum", log_target=True) + F.kl_div(q, p, reduction="sum", log_target=True)
    # In the paper a row's loss is the sum of both cross entropies plus alpha times half of this; here it is their mean.
    torch.testing.assert_close(disagreement(torch.cat([one, other])) / 10, both / 2 / 2 / 5)
    assert float(disagreement(torch.cat([one, one]))) == 0.0


def test_r_drop_adds_to_the_loss_and_twice_the_rows_to_the_plan(tmp_path: Path) -> None:
    model, rows = tiny.save_model(tmp_path / "model", "bert", hidden_dropout_prob=0.3), tiny.topic_rows(120)
    plain = run(tmp_path / "plain", model, rows, train=TRAIN)
    found = run(tmp_path / "r-drop", model, rows, train={**TRAIN, "r_drop": 2.0})
    assert plain.plan is not None
    assert found.plan is not None
    assert (plain.plan.passes_per_row, found.plan.passes_per_row) == (1, 2)
    assert plain.plan.memory is not None
    assert found.plan.memory is not None
    ratio = found.plan.memory.kinds["activations"] / plain.plan.memory.kinds["activations"]
    assert ratio == pytest.approx(2, rel=0.05) or found.plan.micro_batch_size < plain.plan.micro_batch_size
    losses, others = ([line["loss"] for line in events(tmp_path / name, "train")] for name in ("r-drop", "plain"))
    assert losses != others
    assert found.outcome is not None
    assert plain.outcome is not None
    assert found.outcome.steps == plain.outcome.steps


def test_r_drop_without_dropout_is_refused(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with pytest.raises(SetupError, match=r"this model has none; set model.dropout"):
        run(tmp_path / "none", model, tiny.topic_rows(80), train={**TRAIN, "r_drop": 1.0})


@pytest.mark.parametrize(
    ("blocks", "rows"),
    [
        ({"task": "causal-lm"}, tiny.topic_rows(40)),
        ({}, [{"text": f"number {place}", "label": place / 7} for place in range(60)]),
    ],
)
def test_r_drop_for_what_has_not_one_label_is_refused(tmp_path: Path, blocks: dict, rows: list) -> None:
    model = tiny.save_model(tmp_path / "model", "gpt2" if blocks else "bert")
    with pytest.raises(RecipeError, match=r"train.r_drop: is for classifiers with one label a row; remove it"):
        run(tmp_path, model, rows, train={**TRAIN, "r_drop": 1.0}, **blocks)
