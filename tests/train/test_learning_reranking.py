"""Rerankers are trained, scored against BM25's order, saved as cross-encoders and asked."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulltune import predict
from fulltune.errors import DataError
from tests import tiny
from tests.contract.command import fulltune
from tests.train import runs

TRAIN = {"num_train_epochs": 4, "global_batch_size": 8, "micro_batch_size": 4}


def rows_with_negatives(count: int = 96) -> list[dict[str, str]]:
    """A wrong document shares more words with the query than the right one, which says so."""
    places = [(word, place) for word in tiny.WEATHER for place in tiny.PLACES]
    return [
        {
            "query": f"{word} in {place} {number}",
            "positive": f"yes {place} {number}",
            "negative": f"no {word} in {place} {number}",
        }
        for number in range(count)
        for word, place in [places[number % len(places)]]
    ]


@pytest.fixture(scope="module")
def reached(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("reranking")
    # As published cross-encoders are, whose scores are no probabilities.
    of_library = {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.0.1"}
    model = tiny.save_model(folder / "model", "bert", sentence_transformers=of_library)
    with runs.without_tracing():
        return runs.run(
            folder,
            model,
            rows_with_negatives(),
            until="report",
            task="reranking",
            train=TRAIN,
            data={"candidates": 4, "max_length": 40},
            method={"learning_rate": 5e-3},
        )


@pytest.mark.slow
def test_it_is_better_than_the_first_stage(reached: Any) -> None:
    runs.assert_report_is_whole(reached)
    scores = {score.name: score.metrics["ndcg@10"].value for score in reached.scores}
    assert scores["full-seed42"] > scores["BM25"] + 0.1
    assert "linear probe of the pretrained model" in scores
    card = (reached.folder / "models" / "full" / "README.md").read_text(encoding="utf-8")
    assert 'CrossEncoder("full")' in card
    assert "pipeline_tag: text-ranking" in card


@pytest.mark.slow
def test_scores_are_printed_and_written(reached: Any, tmp_path: Path) -> None:
    asked = [{"query": "rain in town 3", "positive": text} for text in ("yes town 3", "no rain in town 3")]
    rows, output = tiny.write_csv(tmp_path / "rows.csv", asked), tmp_path / "scores.csv"
    written = fulltune("predict", reached.folder, "--file", rows, "--output", output)
    assert written.code == 0, written.err
    columns = list(csv.DictReader(output.open(encoding="utf-8")))
    assert [*columns[0]] == ["query", "positive", "predicted_score", "predicted_error"]
    right, wrong = (float(row["predicted_score"]) for row in columns)
    assert 1 > right > wrong > 0


@pytest.mark.long
def test_answers_are_those_of_a_cross_encoder(reached: Any) -> None:
    from sentence_transformers import CrossEncoder

    pairs = [("rain in town 3", "yes town 3"), ("sun", "no sun in town " * 50)]
    answers = predict.load_predictor(reached.folder).predict([{"query": one, "positive": two} for one, two in pairs])
    model = CrossEncoder(str(reached.folder / "models" / "full"), device="cpu")
    assert np.abs(model.predict(pairs) - [answer["score"] for answer in answers]).max() < 1e-5


@pytest.mark.long
def test_cross_encoder_of_a_chat_model_reads_texts_without_its_template(tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    model = tiny.save_model(tmp_path / "model", "llama", tokenizer=tiny.decoder_tokenizer(bos="<s>"))
    train = {"max_steps": 3, "global_batch_size": 4, "micro_batch_size": 2}
    rows, data = rows_with_negatives(48), {"candidates": 3}
    with runs.without_tracing():
        reached = runs.run(tmp_path, model, rows, until="train", task="reranking", train=train, data=data)
    [answer] = predict.load_predictor(reached.folder).predict([{"query": "sun", "positive": "yes town"}])
    scores = CrossEncoder(str(reached.folder / "models" / "full"), device="cpu").predict([("sun", "yes town")])
    assert scores[0] == pytest.approx(answer["score"], abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "head"])
def test_other_methods_score_pairs(tmp_path: Path, method: str) -> None:
    model = tiny.save_model(tmp_path / "model", "llama", tokenizer=tiny.decoder_tokenizer(bos="<s>"))
    train = {"max_steps": 3, "global_batch_size": 4, "micro_batch_size": 2}
    with runs.without_tracing():
        reached = runs.run(
            tmp_path,
            model,
            rows_with_negatives(48),
            until="report",
            task="reranking",
            train=train,
            data={"candidates": 3},
            method={"kind": method},
        )
    report = (reached.folder / "report.md").read_text(encoding="utf-8")
    assert "Test queries whose positives rank lowest" in report
    [answer] = predict.load_predictor(reached.folder).predict([{"query": "sun", "positive": "yes town"}])
    assert 0 < answer["score"] < 1


def test_rows_without_positives_are_refused(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "bert")
    with pytest.raises(DataError, match=r"column 'positive' is empty"):
        runs.run(tmp_path, model, [{**row, "positive": ""} for row in rows_with_negatives(9)], task="reranking")


@pytest.mark.slow
def test_export_for_sentence_transformers_names_the_class_that_reads_the_folder(reached: Any) -> None:
    done = fulltune("export", reached.folder, "--to", "sentence-transformers")
    assert done.code == 2
    assert "CrossEncoder of sentence-transformers reads" in done.err


def labelled_candidates(count: int = 60) -> list[dict[str, Any]]:
    """The texts of `rows_with_negatives` and others, each in a row with its grade."""
    graded = [("positive", 2), ("other", 1), ("negative", 0), ("far", 0)]
    return [
        {"question": row["query"], "answer": row[name], "label": grade}
        for number, row in enumerate(rows_with_negatives(count))
        for name, grade in graded
        for row in [row | {"other": f"perhaps yes {number}", "far": f"no {tiny.FOOD[number % 8]} {number}"}]
    ]


@pytest.mark.slow
def test_labelled_candidates_are_learned_and_ranked(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "bert")
    columns = {"query": "question", "text": "answer", "label": "label"}
    with runs.without_tracing():
        reached = runs.run(
            tmp_path,
            model,
            labelled_candidates(),
            until="report",
            task="reranking",
            train=TRAIN,
            data={**columns, "max_length": 40, "test_fraction": 0.2},
            method={"learning_rate": 5e-3},
        )
    runs.assert_report_is_whole(reached)
    scores = {score.name: score.metrics["ndcg@10"].value for score in reached.scores}
    assert scores["full-seed42"] > scores["random order"] + 0.1
    assert scores["full-seed42"] > scores["BM25"] + 0.1
    assert "linear probe of the pretrained model" in scores
    assert any("frozen" in name for name in scores)
    assert reached.scores[-1].rows == 12  # queries

    asked = [{"question": "rain in town 3", "answer": text} for text in ("yes town 3", "no rain in town 3")]
    rows, output = tiny.write_csv(tmp_path / "asked.csv", asked), tmp_path / "scores.csv"
    written = fulltune("predict", reached.folder, "--file", rows, "--output", output)
    assert written.code == 0, written.err
    right, wrong = (float(row["predicted_score"]) for row in csv.DictReader(output.open(encoding="utf-8")))
    assert 1 > right > wrong > 0
