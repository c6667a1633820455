"""Settings that a guide shows as parts of a recipe train a tiny model to its end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fulltune.compare.rate_search import run_recipe
from tests import tiny
from tests.train import runs

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
CHAT = re.search(r"`(data\.train_on: last)`", (GUIDES / "data.md").read_text(encoding="utf-8"))


def block(word: str) -> dict[str, Any]:
    """The guide on training's one part of a recipe that has this word in it."""
    blocks = re.findall(r"```yaml\n(.*?)```", (GUIDES / "training.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    [text] = [text for text in blocks if word in text]
    return dict(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("word", "kind", "task"),
    [
        ("rougeL", "llama", "causal-lm"),
        ("freeze", "bert", "text-classification"),
        pytest.param("folds: 5", "bert", "text-classification", marks=pytest.mark.long),
    ],
)
def test_setting_of_the_guide_trains(word: str, kind: str, task: str, tmp_path: Path) -> None:
    rows = tiny.pair_rows() if task == "causal-lm" else tiny.topic_rows()
    model = tiny.save_model(tmp_path / "model", kind, num_hidden_layers=5 if word == "freeze" else 2)
    given = block(word)
    given.get("data", {}).pop("train", None)
    given["evaluate"] = {"generate_rows": 4, "baselines": False, **given.get("evaluate", {})}
    if task == "text-classification":
        del given["evaluate"]["generate_rows"]
    with runs.in_this_process():
        reached = run_recipe(runs.job(tmp_path, model, rows, **given, task=task, train={"max_steps": 2}))
    assert reached.report is not None
    trained = reached.scores[-1]
    assert trained.main_metric in trained.metrics


def test_only_the_last_answer_of_a_chat_is_trained_as_the_guide_says(tmp_path: Path) -> None:
    assert CHAT is not None
    name, value = CHAT[1].removeprefix("data.").split(": ")
    rows = [{"messages": [*row["messages"], *row["messages"]]} for row in tiny.chat_rows()]
    model = tiny.save_model(tmp_path / "model", "llama")
    tokens = []
    for number, data in enumerate(({}, {name: value})):
        summary = runs.run(tmp_path / str(number), model, rows, until="data", task="causal-lm", data=data).summary
        tokens.append(summary.splits["train"].trained_tokens)
    assert tokens[0] == 2 * tokens[1]
