"""Every recipe in `examples` loads; those whose rows are in the project are prepared and planned with a tiny model."""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import sqlite3
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet
import pytest

from fulltune.recipe.file import load_recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary
from fulltune.records.scores import Scores
from tests import tiny
from tests.contract.command import fulltune
from tests.hub import serve_hub
from tests.s3 import serve_s3
from tests.train import runs

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(EXAMPLES.glob("*.yaml"))
ELSEWHERE = ("ddp", "fsdp2", "zero2", "zero3", "zero3-offload", "plan-7b", "plan-70b", "compare-banking77", "hub", "s3")
ELSEWHERE += ("stream-7b-random",)
"""With tests of their own: several processes (test_placements.py), three of them with DeepSpeed (test_zero.py), two
without weights (test_plan.py), one compares, two read rows from a Hub and a bucket, one has 7 B parameters."""
ONE_PROCESS = [path for path in RECIPES if path.stem not in ELSEWHERE]
OWN_ROWS = {
    "chat": ("chat", 40, ()),
    "experts": ("chat", 40, ()),
    "regression": ("regression", 60, ()),
    "entities": ("tags", 80, ("O", "B-LOC", "B-PER", "B-TIME", "I-LOC", "I-PER", "I-TIME")),
    "raw_text": ("text", 29, ()),
    "pairs": ("single_label", 60, ("contradicts", "follows", "open")),
    "embedding": ("query_and_positive", 90, ()),
    "reranking": ("ranking", 90, ()),
    "multiple_choice": ("choice", 40, ()),
    "images": ("single_label", 60, ("disc", "square", "triangle")),
    "summarise": ("source_target", 90, ()),
    "squad": ("span", 160, ()),  # windows of the tiny model
    "multi_label": ("multi_label", 48, ("cleaning", "guests", "money", "shopping")),
}
"""Recipe to problem type, rows in all splits, labels."""
TRACED = ("banking77", "chat")


@pytest.fixture(autouse=True)
def _data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_BENCH_DATA", str(tmp_path / "bench"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_of_an_example_is_accepted(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.method.kind == "full"
    assert Path(recipe.output) == EXAMPLES.parent / "runs"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_of_an_example_says_how_to_run_it(path: Path) -> None:
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    commands = [line for line in comments if re.search(r"fulltune (run|plan|compare|train) ", line)]
    assert commands
    assert all(f"examples/{path.name}" in line for line in commands)


def test_examples_with_rows_in_the_project_are_all_tested() -> None:
    files = {path.stem: load_recipe(path).data.task_files for path in ONE_PROCESS}
    assert all(files.values())
    assert {name for name, given in files.items() if all(Path(file).exists() for file in given)} == set(OWN_ROWS)


@pytest.mark.parametrize("name", OWN_ROWS)
def test_example_with_own_rows_is_prepared_and_planned(
    name: str, tmp_path: Path, tiny_encoder: Path, tiny_decoder: Path
) -> None:
    kind, rows, labels = OWN_ROWS[name]
    model = tiny_decoder if name in ("chat", "raw_text") else tiny_encoder
    if name == "images":
        model = tiny.save_image_model(tmp_path / "vit")
    if name == "experts":
        model = tiny.save_model(tmp_path / "mixture", "qwen3_moe")
    if name == "summarise":
        model = tiny.save_model(tmp_path / "t5", "t5")
    with runs.without_tracing():  # of which the runs to the end do enough
        result = fulltune(
            *("plan", EXAMPLES / f"{name}.yaml", "--run-folder", tmp_path / "run", "--json"),
            *("--set", f"model={model}", "--set", "evaluate.generate_rows=0"),
        )
    assert result.code == 0, result.err
    assert json.loads(result.out)["trial"] == "full-seed42"
    summary = DataSummary.load(tmp_path / "run" / "data" / "summary.json")
    assert summary.problem_type == kind
    assert summary.labels == labels
    assert sum(split.rows for split in summary.splits.values()) == rows
    assert not summary.dropped
    # The examples are small on purpose.
    assert all(any(word in note for word in ("only ", "packed", "instead of the")) for note in summary.notes)


def test_streamed_example_has_1024_tokens_a_step(tmp_path: Path) -> None:
    result = fulltune("data", EXAMPLES / "stream-7b-random.yaml", "--run-folder", tmp_path)
    assert result.code == 0, result.err
    train = DataSummary.of_run(tmp_path).splits["train"]
    rows_per_step = load_recipe(EXAMPLES / "stream-7b-random.yaml").train.global_batch_size or 0
    assert rows_per_step * train.tokens / train.rows >= 1024


def _stand_ins(folder: Path) -> None:
    """Small files in the places and forms of the data that are not part of the project."""
    for name in ("train", "test"):
        rows = [{"text": row["text"], "category": row["label"]} for row in tiny.topic_rows(60)]
        tiny.write_csv(folder / "banking77" / f"{name}.csv", rows)
        pairs = [{"question": row["prompt"], "answer": row["completion"]} for row in tiny.pair_rows(40)]
        tiny.write_jsonl(folder / "gsm8k" / f"{name}.jsonl", pairs)
    (folder / "shakespeare").mkdir()
    scene = "First Keeper:\n" + "the rain falls over the town in the cold morning\n" * 75
    plays = "\n".join(f"{scene}number {number}\n" for number in range(30))
    (folder / "shakespeare" / "input.txt").write_text(plays, encoding="utf-8")
    with contextlib.closing(sqlite3.connect(folder / "tickets.db")) as database, database:
        database.execute("CREATE TABLE tickets (id INTEGER PRIMARY KEY, text, label)")
        values = [(row["text"], row["label"]) for row in tiny.topic_rows(60)]
        database.executemany("INSERT INTO tickets (text, label) VALUES (?, ?)", [*values, ("buy this", "spam")])
    (folder / "wnut17").mkdir()
    sentences = "".join(f"the\tO\n{place}\tB-location\nshines\tO\n\n" for place in tiny.PLACES * 4)
    for name in ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated"):
        (folder / "wnut17" / name).write_text(sentences, encoding="utf-8")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model for each task, and a mixture of experts."""
    folder = tmp_path_factory.mktemp("models")
    encoder, decoder = tiny.save_model(folder / "bert", "bert"), tiny.save_model(folder / "llama", "llama")
    by_task = {name: encoder for name, facts in FACTS.items() if facts.reads == "text" and not facts.writes}
    return by_task | {
        "causal-lm": decoder,
        "experts": tiny.save_model(folder / "mixture", "qwen3_moe"),
        "seq2seq": tiny.save_model(folder / "t5", "t5"),
        "image-classification": tiny.save_image_model(folder / "vit"),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        path if path.stem in ("banking77", "shakespeare") else pytest.param(path, marks=pytest.mark.long)
        for path in ONE_PROCESS
    ],
    ids=lambda path: path.stem,
)
def test_example_runs_end_to_end(path: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    """Two steps with a tiny model, from the rows to the report."""
    _stand_ins(tmp_path / "bench")
    recipe = load_recipe(path)
    settings = {
        "model": models.get(path.stem) or models[recipe.task],
        "data.max_length": 64 if recipe.data.max_length else "null",
        "train.num_train_epochs": "null",
        "train.max_steps": 2,
        "train.device": "cpu",
        "train.precision": "fp32",
        "evaluate.bootstrap_samples": 100,
        "evaluate.generate_rows": min(2, recipe.evaluate.generate_rows),
        "evaluate.max_new_tokens": 4,
    }
    options = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    # Tracing takes seconds for each; what it finds has tests of its own.
    untraced = runs.without_tracing() if path.stem not in TRACED else contextlib.nullcontext()
    with runs.in_this_process(), untraced:
        result = fulltune("run", path, "--run-folder", tmp_path / "run", *options)
    assert result.code == 0, result.err
    assert (tmp_path / "run" / "models" / "full" / "model.safetensors").exists()
    assert path.stem in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    scores = [Scores.load(file) for file in (tmp_path / "run" / "scores").glob("*.json")]
    assert {score.kind for score in scores} >= {"trained"}
    assert len(scores) > 1


@pytest.mark.slow
def test_example_of_a_bucket_is_prepared_and_planned(tmp_path: Path, models: dict[str, Path]) -> None:
    _stand_ins(tmp_path / "bench")
    with serve_s3("my-bucket") as client, runs.without_tracing():
        for name in ("train", "test"):
            table = pyarrow.csv.read_csv(tmp_path / "bench" / "banking77" / f"{name}.csv")
            pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
            client.upload_file(str(tmp_path / f"{name}.parquet"), "my-bucket", f"banking77/{name}.parquet")
        model = f"model={models['text-classification']}"
        run = tmp_path / "run"
        result = fulltune("plan", EXAMPLES / "s3.yaml", "--run-folder", run, "--set", model)
    assert result.code == 0, result.err
    assert {
        split: summary.rows for split, summary in DataSummary.load(run / "data" / "summary.json").splits.items()
    } == {
        "train": 54,
        "eval": 6,
        "test": 60,
    }


@pytest.mark.slow
@pytest.mark.long
def test_example_from_the_hub_names_its_commit_and_keeps_it(tmp_path: Path, tiny_encoder: Path) -> None:
    rows = [{"text": row["text"], "label_text": row["label"]} for row in tiny.topic_rows(80)]
    first, second = ("".join(f"{json.dumps(row)}\n" for row in part) for part in (rows[:60], rows[60:]))
    options = ["--run-folder", tmp_path / "run", "--set", f"model={tiny_encoder}", "--set", "train.max_steps=2"]
    options += ["--set", "train.num_train_epochs=null", "--set", "train.device=cpu", "--set", "train.precision=fp32"]
    with serve_hub(tmp_path / "hub") as hub, runs.in_this_process(), runs.without_tracing():
        commit = hub.push("mteb/banking77", {"train.jsonl": first, "test.jsonl": second})
        prepared = fulltune("data", EXAMPLES / "hub.yaml", *options)
        assert prepared.code == 0, prepared.err
        hub.push("mteb/banking77", {"train.jsonl": second})
        result = fulltune("run", EXAMPLES / "hub.yaml", *options)
    assert result.code == 0, result.err
    assert f"this run goes on with {commit[:12]}" in result.err
    texts = [(tmp_path / "run" / name).read_text() for name in ("sources.json", "report.html", "report.md")]
    texts += [(tmp_path / "run" / "models" / "full" / "README.md").read_text()]
    assert [commit in text for text in texts] == [True] * 4
    assert DataSummary.of_run(tmp_path / "run").splits["test"].rows == 20


@pytest.mark.slow
@pytest.mark.long
def test_example_of_a_comparison_ends_with_verdict_and_card(tmp_path: Path, models: dict[str, Path]) -> None:
    """One seed of each method at a given rate: the search has tests of its own."""
    _stand_ins(tmp_path / "bench")
    kinds = [{"kind": kind, "learning_rate": 1e-3} for kind in ("full", "lora", "adapter", "prompt")]
    settings = {
        "model": models["text-classification"],
        "methods": json.dumps(["base", *kinds]),
        "compare.seeds": 1,
        "train.num_train_epochs": "null",
        "train.max_steps": 2,
        "train.device": "cpu",
        "train.precision": "fp32",
    }
    options = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    path = EXAMPLES / "compare-banking77.yaml"
    with runs.in_this_process(), runs.without_tracing():
        result = fulltune("compare", path, "--run-folder", tmp_path / "run", *options)
    assert result.code == 0, result.err
    assert "UNDECIDED" in result.out
    assert all((tmp_path / "run" / name).exists() for name in ("card.md", "card.html", "proof.json"))
    assert sorted(folder.name for folder in (tmp_path / "run" / "models").iterdir()) == [
        *("adapter", "full", "lora", "prompt")
    ]


def test_example_of_a_comparison_is_fair_by_its_lint() -> None:
    result = fulltune("compare", EXAMPLES / "compare-banking77.yaml", "--lint")
    assert (result.code, result.out.strip()) == (0, "no unfair setting was found")


def test_comparison_recipe_is_not_run_as_one_method(tmp_path: Path) -> None:
    path = EXAMPLES / "compare-banking77.yaml"
    result = fulltune("run", path, "--run-folder", tmp_path / "run")
    assert result.code == 2
    assert result.problems == [
        f"{path}: methods: run a comparison with 'fulltune compare {path}', or replace 'methods' with one 'method' for "
        "a single run"
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_classic_script_learns_without_handing_over_tokenizer_or_collator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (EXAMPLES / "classic_script.py").read_text(encoding="utf-8")
    assert "Trainer(model=model, args=args, train_dataset=train, eval_dataset=val)" in text
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="the model has no padding token, which classification needs"):
        made = runpy.run_path(str(EXAMPLES / "classic_script.py"))
    assert made["trainer"].evaluate()["eval_loss"] < 0.4  # guessing has 0.69
    assert (tmp_path / "classic-output" / "model" / "model.safetensors").exists()
