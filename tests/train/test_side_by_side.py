"""Several tasks on one base: answers of several parts over one loaded base, and comparisons put together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fulltune import predict
from fulltune.errors import SetupError
from fulltune.records.comparison import ManyTasks
from tests import tiny
from tests.contract.command import Result, fulltune
from tests.train import runs

STEPS = {"max_steps": 6, "warmup_steps": 0}
METHODS = {"intents": "lora", "topics": "adapter", "moods": "prompt"}
TEXTS = ["the red apple", "a fast car on the road", "green trees"]


def rows_of(task: str) -> list[dict[str, Any]]:
    """Each task has labels of its own."""
    return [{"text": row["text"], "label": f"{task}-{row['label']}"} for row in tiny.topic_rows(40)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of three methods on one base, by the name of their task."""
    folder = tmp_path_factory.mktemp("several")
    tiny.save_model(folder / "model", "bert")
    found = {}
    for task, kind in METHODS.items():
        (folder / task).mkdir()
        method = {"kind": kind, "learning_rate": 3e-2}
        runs.run(folder / task, folder / "model", rows_of(task), train=STEPS, method=method)
        found[task] = (folder / task / "run").rename(folder / f"run-{task}")
    return found


def test_parts_over_one_base_answer_as_each_does_alone(trained: dict[str, Path]) -> None:
    together = predict.load_side_by_side(trained)
    for task, run in trained.items():
        rows = [predict.row_from_text(text, together[task].notes) for text in TEXTS]
        assert together[task].predict(rows) == predict.load(run).predict(rows)
        assert together[task].predict(rows)[0]["label"].startswith(task)


def test_base_is_in_memory_once_and_what_was_trained_is_not_shared(trained: dict[str, Path]) -> None:
    models = {task: one.model for task, one in predict.load_side_by_side(trained).items()}
    word = "bert.embeddings.word_embeddings.weight"
    assert len({model.get_parameter(word).data_ptr() for model in models.values()}) == 1
    query = "bert.encoder.layer.0.attention.self.query"
    assert (
        models["intents"].get_parameter(f"{query}.base_layer.weight").data_ptr()
        == models["topics"].get_parameter(f"{query}.weight").data_ptr()
    )
    norm = "bert.encoder.layer.0.attention.output.LayerNorm.weight"  # adapters train it
    frozen, moved = (models[task].get_parameter(norm) for task in ("intents", "topics"))
    assert frozen.data_ptr() != moved.data_ptr()
    assert not torch.equal(frozen, moved)
    all_of = {p.data_ptr(): p.numel() for model in models.values() for p in model.parameters()}
    alone = sum(p.numel() for p in models["intents"].parameters())
    assert sum(all_of.values()) < 1.6 * alone


def test_whole_models_and_other_bases_are_refused(trained: dict[str, Path], tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", "bert")
    runs.run(tmp_path, tmp_path / "model", rows_of("intents"), train=STEPS)
    with pytest.raises(SetupError, match=r"whole: is a whole model .* shares nothing with others"):
        predict.load_side_by_side({**trained, "whole": tmp_path / "run"})
    other = tmp_path / "other"
    other.mkdir()
    runs.run(other, tmp_path / "model", rows_of("intents"), train=STEPS, method={"kind": "head"})
    with pytest.raises(SetupError, match="these models are not of one base: intents on "):
        predict.load_side_by_side({**trained, "other": other / "run"})
    same = tmp_path / "same"
    shutil.copytree(trained["intents"], same)
    notes = json.loads((same / "models" / "lora" / "fulltune.json").read_text(encoding="utf-8"))
    notes["base_model"]["dropout"] = 0.5
    (same / "models" / "lora" / "fulltune.json").write_text(json.dumps(notes), encoding="utf-8")
    with pytest.raises(SetupError, match=r"same on .*\(dropout 0\.5\)"):
        predict.load_side_by_side({**trained, "same": same})


def ask(*words: Any) -> Result:
    return fulltune("predict", *words)


def test_command_answers_with_all_or_with_the_one_that_a_row_names(trained: dict[str, Path], tmp_path: Path) -> None:
    intents, topics, moods = trained.values()
    several = (intents, "--with", topics, "--with", moods)
    said = ask(*several[:1], *TEXTS[:2], *several[1:])
    assert said.code == 0, said.err
    names = [line.partition(":")[0] for line in said.out.splitlines()]
    assert names == ["run-intents", "run-topics", "run-moods"] * 2

    rows = [
        {"text": text, "model": name}
        for text, name in zip(TEXTS, ("run-moods", "run-intents", "run-moods"), strict=True)
    ]
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    said = ask(*several, "--file", file, "--by", "model", "--json")
    assert said.code == 0, said.err
    answers = [json.loads(line) for line in said.out.splitlines()]
    assert [answer["model"] for answer in answers] == ["run-moods", "run-intents", "run-moods"]
    assert answers[1]["label"].startswith("intents")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a text", "--by", "model"], "--by tells models apart: name the others with --with"),
        (["a text", "--with", "{topics}", "--by", "model"], "--by names a column: give rows with --file"),
        (["a text", "--with", "{intents}"], "--with: two folders are called 'run-intents' ({intents} and {intents})"),
    ],
)
def test_command_that_cannot_be_meant_is_refused(words: list[str], message: str, trained: dict[str, Path]) -> None:
    said = ask(trained["intents"], *(word.format(**trained) for word in words))
    assert said.code == SetupError.exit_code
    assert message.format(**trained) in said.err


def test_row_that_names_no_model_is_refused(trained: dict[str, Path], tmp_path: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"text": "one", "model": "run-intent"}])
    said = ask(trained["intents"], "--with", trained["topics"], "--file", file, "--by", "model")
    assert "rows.jsonl:1: model is 'run-intent', expected one of run-intents, run-topics (1 such rows)" in said.err
    said = ask(trained["intents"], "--with", trained["topics"], "--file", file, "--by", "which")
    assert f"{file}: has no column 'which'; it has text, model" in said.err


# ---- comparisons of several tasks ------------------------------------------------------------------------------

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
    assert "2 tasks on one base" in said.out
    shown = said.out.splitlines()
    for task in ("intents", "topics"):
        card = f"card.html    {tmp_path / 'both' / task / 'card.html'}"
        assert shown.index(task) < shown.index(card)
    assert shown.index("topics") > shown.index(f"card.html    {tmp_path / 'both' / 'intents' / 'card.html'}")
    found = ManyTasks.load(tmp_path / "both" / "tasks.json")
    assert [task.name for task in found.tasks] == ["intents", "topics"]
    assert [way.arm for way in found.ways] == ["full", "lora"]
    assert found.ways[1].stored_bytes < found.ways[0].stored_bytes
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
    assert "is called 'intents' like another one" in said.err
    assert (
        "model: several tasks share one base and one report; all must give the same ("
        f"{tmp_path / 'model'} in intents, {tmp_path / 'other'} in topics)"
    ) in said.err
    assert "methods: no method but 'full' is compared in all of these recipes" in said.err
