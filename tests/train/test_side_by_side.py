"""Comparisons of several tasks on one base, put together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fulltune.records.comparison import ManyTasks
from tests import tiny
from tests.contract.command import Result, fulltune
from tests.train import runs


def rows_of(task: str) -> list[dict[str, Any]]:
    """Each task has labels of its own."""
    return [{"text": row["text"], "label": f"{task}-{row['label']}"} for row in tiny.topic_rows(40)]


COMPARED = [{"kind": "full", "learning_rate": 3e-3}, {"kind": "lora", "learning_rate": 1e-2}]


def recipes(folder: Path, **changes: Any) -> list[Path]:
    tiny.save_model(folder / "model", "bert")
    made = []
    for task in ("intents", "topics"):
        data = tiny.write_jsonl(folder / f"{task}.jsonl", rows_of(task))
        blocks: dict[str, Any] = {"methods": COMPARED, "train": {"max_steps": 6}, "compare": {"seeds": 2}}
        made.append(tiny.write_recipe(folder / f"{task}.yaml", folder / "model", data, **(blocks | changes)))
    return made


def compare(*words: Any) -> Result:
    return fulltune("compare", *words)


@pytest.mark.long
def test_several_recipes_end_with_what_parts_side_by_side_cost(tmp_path: Path) -> None:
    paths = recipes(tmp_path)
    with runs.in_this_process():
        said = compare(*paths, "--run-folder", tmp_path / "both")
    assert said.code == 0, said.err
    assert "2 tasks with one pretrained model" in said.out
    shown = said.out.splitlines()
    for task in ("intents", "topics"):
        card = f"card.html    {tmp_path / 'both' / task / 'card.html'}"
        assert shown.index(task) < shown.index(card)
    assert shown.index("topics") > shown.index(f"card.html    {tmp_path / 'both' / 'intents' / 'card.html'}")
    found = ManyTasks.load(tmp_path / "both" / "tasks.json")
    assert list(found.tasks) == ["intents", "topics"]
    assert [way.method for way in found.methods] == ["full", "lora"]
    assert found.methods[1].stored_bytes < found.methods[0].stored_bytes
    for task in ("intents", "topics"):
        assert (tmp_path / "both" / task / "card.md").exists()
    # The same command trains nothing again.
    attempts = sorted((tmp_path / "both").glob("*/attempts/*"))
    with runs.in_this_process():
        assert compare(*paths, "--run-folder", tmp_path / "both", "--json").code == 0
    assert sorted((tmp_path / "both").glob("*/attempts/*")) == attempts


def test_recipes_that_do_not_go_together_are_refused_at_once(tmp_path: Path) -> None:
    one, two = recipes(tmp_path)
    tiny.save_model(tmp_path / "other", "bert")
    text = two.read_text(encoding="utf-8").replace(str(tmp_path / "model"), str(tmp_path / "other"))
    two.write_text(text.replace("lora", "adapter"), encoding="utf-8")
    said = compare(one, two, one)
    assert "another recipe is also called 'intents'" in said.err
    assert (
        "model: several tasks must share one pretrained model; found "
        f"{tmp_path / 'model'} in intents, {tmp_path / 'other'} in topics"
    ) in said.err
    assert "methods: all recipes must share 'full' and at least one other method" in said.err
