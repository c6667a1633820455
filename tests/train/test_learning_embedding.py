"""Embeddings are trained, scored against the untouched model and BM25, saved for sentence-transformers and asked."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file

from fulltune import pipeline, predict
from fulltune.errors import DataError, FulltuneError, RecipeError, SetupError
from fulltune.export import hf
from fulltune.inference.store import Rows
from fulltune.models.sentence_files import FILES, write_sentence_files
from fulltune.train.journal import CHOOSING
from fulltune.train.worker.loading import NEGATIVES
from tests import tiny
from tests.contract.command import fulltune
from tests.train import runs

TRAIN = {"num_train_epochs": 4, "global_batch_size": 16, "micro_batch_size": 4}
RATE = {"learning_rate": 5e-3}


def pair_rows(count: int = 120) -> list[dict[str, str]]:
    """A query shares no word with its positive, which BM25 would need."""
    places = [(word, place) for word in tiny.WEATHER for place in tiny.PLACES]
    return [
        {"query": f"{place} {word} {number // 80}", "positive": f"{word[::-1]}s {place.upper()}ed{number // 80}"}
        for number in range(count)
        for word, place in [places[number % 80]]
    ]


@pytest.fixture(scope="module")
def reached(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("embedding")
    model = tiny.save_model(folder / "model", "bert")
    settings = {"prompts": {"query": "ask: ", "passage": "doc: "}, "default_prompt_name": None}
    (model / FILES[2]).write_text(json.dumps(settings), encoding="utf-8")
    with runs.without_tracing():
        return runs.run(folder, model, pair_rows(), until="report", task="embedding", train=TRAIN, method=RATE)


@pytest.mark.slow
def test_it_is_better_than_without_training(reached: Any) -> None:
    runs.assert_report_is_whole(reached)
    scores = {score.name: score.metrics["ndcg@10"].value for score in reached.scores}
    assert scores["full-seed42"] > scores["before training"] + 0.1
    assert scores["full-seed42"] > scores["BM25"] + 0.1
    report = (reached.folder / "report.md").read_text(encoding="utf-8")
    assert "| BM25 " in report
    assert "Test queries whose positives rank lowest" in report
    assert "[CLS]ask: " in report
    assert "[CLS]doc: " in report
    card = (reached.folder / "models" / "full" / "README.md").read_text(encoding="utf-8")
    assert 'SentenceTransformer("full")' in card
    assert "library_name: sentence-transformers" in card
    assert "model.encode_query(" in card
    assert reached.plan is not None
    pooling = next(setting for setting in reached.plan.settings if setting.name == "model.pooling")
    assert (pooling.value, pooling.reason) == (
        "mean",
        "no file at hand names a pooling; encoders are usually pooled by the mean over tokens",
    )


@pytest.mark.slow
def test_saved_folder_names_the_body_its_prompts_and_pooling(reached: Any) -> None:
    folder = reached.folder / "models" / "full"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["architectures"], config["pooling"], config["normalize"]) == (["BertModel"], "mean", True)
    modules, pooling, settings = (json.loads((folder / name).read_text(encoding="utf-8")) for name in FILES)
    assert [module["type"].rpartition(".")[2] for module in modules] == ["Transformer", "Pooling", "Normalize"]
    assert pooling["pooling_mode_mean_tokens"] is True
    assert settings["prompts"] == {"query": "ask: ", "passage": "doc: "}
    [answer] = predict.load_predictor(reached.folder).predict([{"query": "the sun"}])
    assert np.linalg.norm(answer["embedding"]) == pytest.approx(1, abs=1e-5)
    assert predict.row_from_text("the sun", predict.load_predictor(reached.folder).notes) == {"query": "the sun"}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_vectors_are_printed_and_written(reached: Any, tmp_path: Path, suffix: str) -> None:
    rows, output = tiny.write_csv(tmp_path / "rows.csv", [{"query": "the sun"}]), tmp_path / f"vectors.{suffix}"
    printed = fulltune("predict", reached.folder, "the sun")
    assert printed.code == 0, printed.err
    vector = json.loads(printed.out)
    written = fulltune("predict", reached.folder, "--file", rows, "--output", output)
    assert written.code == 0, written.err
    if suffix == "parquet":
        [read] = parquet.read_table(output).column("predicted_embedding").to_pylist()
    elif suffix == "csv":
        read = json.loads(next(csv.DictReader(output.open(encoding="utf-8")))["predicted_embedding"])
    else:
        read = json.loads(output.read_text(encoding="utf-8"))["predicted_embedding"]
    assert read == pytest.approx(vector, abs=1e-6)
    assert len(vector) == 32


@pytest.mark.long
def test_answers_are_those_of_sentence_transformers(reached: Any) -> None:
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    folder, texts = reached.folder / "models" / "full", ["the sun", "rain " * 200, "SNOW"]
    answers = predict.load_predictor(reached.folder).predict([{"query": text} for text in texts])
    theirs = SentenceTransformer(str(folder), device="cpu").encode_query(texts)
    assert np.abs(theirs - [answer["embedding"] for answer in answers]).max() < 1e-5
    assert type(AutoModel.from_pretrained(folder)).__name__ == "BertModel"


@pytest.mark.slow
@pytest.mark.long
def test_lora_of_a_decoder_is_merged_into_a_folder_of_sentence_transformers(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    from fulltune.methods import folder as folders

    model = tiny.save_model(tmp_path / "model", "llama", tokenizer=tiny.decoder_tokenizer(bos="<s>"))
    train = {"max_steps": 4, "global_batch_size": 8, "micro_batch_size": 2}
    with runs.without_tracing():
        runs.run(
            tmp_path, model, tiny.topic_rows(60), until="report", task="embedding", train=train, method={"kind": "lora"}
        )
    folders.merge_into_pretrained(tmp_path / "run" / "models" / "lora", tmp_path / "merged")
    rows = [{"text": text} for text in ("the sun", "soup and bread")]
    ours = [answer["embedding"] for answer in predict.load_predictor(tmp_path / "run").predict(rows)]
    theirs = SentenceTransformer(str(tmp_path / "merged"), device="cpu").encode([row["text"] for row in rows])
    assert np.abs(theirs - ours).max() < 1e-5
    card = (tmp_path / "run" / "models" / "lora" / "README.md").read_text(encoding="utf-8")
    assert "which 'fulltune predict' adds to the pretrained model" in card


def test_training_that_only_harms_keeps_the_model_as_it_was(tiny_encoder: Path, tmp_path: Path) -> None:
    train = {"max_steps": 4, "warmup_steps": 0, "eval_strategy": "steps", "eval_steps": 2}
    rows = [{"query": row["text"], "positive": row["text"] + " again"} for row in tiny.topic_rows(60)]
    with runs.without_tracing():
        reached = runs.run(
            tmp_path, tiny_encoder, rows, until="report", task="embedding", train=train, method={"learning_rate": 0.5}
        )
    assert reached.outcome is not None
    assert reached.outcome.best_step == 0
    before, after = load_file(tiny_encoder / "model.safetensors"), runs.final_weights(tmp_path)
    assert after
    assert all(torch.equal(tensor, before[name.removeprefix("bert.")]) for name, tensor in after.items())
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "on the eval rows; no later weights were better" in report
    assert "- saved weights: the pretrained model's" in report
    assert "- values changed:" not in report


@pytest.mark.slow
def test_lora_predicts_and_is_exported_with_the_prompts_and_pooling_of_training(reached: Any, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    base, run = reached.folder / "models" / "full", tmp_path / "run"
    blocks: dict[str, Any] = {"train": {"max_steps": 2, "global_batch_size": 8}, "method": {"kind": "lora"}}
    with runs.without_tracing():
        source = {"name": str(base), "pooling": "cls"}
        runs.run(tmp_path, base, pair_rows(40), until="evaluate", task="embedding", model=source, **blocks)
    result = fulltune("export", run, "--to", "hf", "-o", tmp_path / "out", "--dtype", "bfloat16")
    assert result.code == 0, result.err
    checks = json.loads((tmp_path / "out" / "verify.json").read_text(encoding="utf-8"))["checks"]
    assert any(check["name"].endswith("embeddings") for check in checks)
    encoder = SentenceTransformer(str(tmp_path / "out"), device="cpu").float()
    theirs = encoder.encode(["the sun"], prompt_name="query")[0]
    for folder, tolerance in ((tmp_path / "out", 1e-5), (run, 0.03)):
        [answer] = predict.load_predictor(folder).predict([{"query": "the sun"}])
        assert np.abs(theirs - answer["embedding"]).max() < tolerance
    assert np.abs(theirs - encoder.encode(["the sun"])[0]).max() > 0.03


@pytest.mark.slow
def test_export_whose_pooling_differs_is_not_verified(
    reached: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_other_files(folder: Path, config: Any, max_length: int) -> None:
        config.pooling, before = "cls", config.pooling
        write_sentence_files(folder, config, max_length)
        config.pooling = before

    monkeypatch.setattr(hf, "write_sentence_files", write_other_files)
    result = fulltune("export", reached.folder, "--to", "hf", "-o", tmp_path / "out")
    assert result.code != 0
    assert "embeddings" in result.err


@pytest.mark.slow
def test_classifier_of_an_embedding_folder_is_no_folder_of_sentence_transformers(reached: Any, tmp_path: Path) -> None:
    base = reached.folder / "models" / "full"
    with runs.without_tracing():
        runs.run(tmp_path, base, tiny.topic_rows(), train={"max_steps": 2})
    folder = tmp_path / "run" / "models" / "full"
    assert not (folder / FILES[0]).exists()
    assert not {"pooling", "prompts"} & json.loads((folder / "config.json").read_text(encoding="utf-8")).keys()


@pytest.mark.slow
def test_mixture_of_experts_is_trained(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "qwen3_moe")
    train = {"max_steps": 2, "global_batch_size": 8, "micro_batch_size": 4, "logging_steps": 1}
    with runs.without_tracing():
        runs.run(tmp_path, model, pair_rows(40), task="embedding", train=train)
    losses = [line for line in runs.events(tmp_path, "train") if "router_loss" in line]
    assert losses


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            {"train": {"global_batch_size": 1}},
            "train.global_batch_size: 1, but the other rows of a batch are a query's",
        ),
        ({"train": {"placement": "stream"}}, "train.placement: stream is not supported for embedding yet"),
        ({"data": {"packing": True}}, "data.packing: is impossible for embedding"),
        ({"data": {"folds": 3}}, "data.folds: is not supported for embedding yet"),
        ({"method": {"kind": "head"}}, "head"),
        ({"evaluate": {"metric": "accuracy"}}, "evaluate.metric: 'accuracy' is not available for embedding"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, blocks: Any, message: str) -> None:
    with pytest.raises((RecipeError, SetupError), match=message):
        runs.run(
            tmp_path, tiny.save_model(tmp_path / "m", "bert"), pair_rows(), until="plan", task="embedding", **blocks
        )


def test_recipe_is_written_for_a_file_of_anchors_and_positives(tmp_path: Path) -> None:
    rows = [{"anchor": row["query"], "positive": row["positive"]} for row in pair_rows(20)]
    file, recipe = tiny.write_csv(tmp_path / "pairs.csv", rows), tmp_path / "recipe.yaml"
    result = fulltune("init", file, "--output", recipe)
    assert result.code == 0, result.err
    text = recipe.read_text(encoding="utf-8")
    assert "task: embedding" in text
    assert "query: anchor\n  positive: positive" in text
    assert "20 rows, query and positive" in text


def test_rows_whose_positive_is_the_query_are_listed_and_too_many_refused(tmp_path: Path) -> None:
    model, rows = tiny.save_model(tmp_path / "model", "bert"), pair_rows()
    rows[3]["positive"] = rows[3]["query"].upper()
    job = runs.job(tmp_path, model, rows, task="embedding")
    summary = pipeline.prepare(job)
    assert summary.dropped == {"own positive": 1}
    for row in rows[:20]:
        row["positive"] = row["query"]
    (tmp_path / "few").mkdir()
    with pytest.raises(DataError, match=r"own positive: 20.*the text is the query itself"):
        pipeline.prepare(runs.job(tmp_path / "few", model, rows, task="embedding"))


def test_module_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "bert")
    modules = [{"type": f"sentence_transformers.models.{name}", "path": ""} for name in ("Transformer", "Dense")]
    (model / FILES[0]).write_text(json.dumps(modules), encoding="utf-8")
    with pytest.raises(SetupError, match="has a module 'Dense', which is not supported; use another model"):
        runs.run(tmp_path, model, pair_rows(), until="plan", task="embedding")


@pytest.mark.slow
def test_hard_negatives_are_chosen_once_and_a_broken_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "bert")
    train = {"max_steps": 6, "global_batch_size": 16, "micro_batch_size": 8, "logging_steps": 1, "save_steps": 3}
    blocks: dict[str, Any] = {"task": "embedding", "train": train, "method": RATE, "data": {"hard_negatives": 2}}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    with runs.without_tracing():
        reached = runs.run(whole, model, pair_rows(), until="report", **blocks)
        with pytest.raises(FulltuneError):
            runs.run(broken, model, pair_rows(), options={"listener": runs.at_step(4, runs.fail)}, **blocks)
        chosen = (broken / "run" / NEGATIVES).read_bytes()
        runs.run(broken, model, pair_rows(), **blocks)
    assert (broken / "run" / NEGATIVES).read_bytes() == chosen
    assert [event["name"] for event in runs.events(broken, "phase")].count(CHOOSING) == 1
    weights = runs.final_weights(whole)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in runs.final_weights(broken).items())
    labels = np.stack(Rows(whole / "run" / "negatives")["labels"])
    assert labels.shape == (reached.summary.splits["train"].rows, 5)
    assert not (labels[:, 3:] == labels[:, 2:3]).any()
    report = (reached.folder / "report.md").read_text(encoding="utf-8")
    assert re.search(r"\| hard negatives +\| passed +\| 2 in each row; [\d.]+% of the nearest may be false", report)
