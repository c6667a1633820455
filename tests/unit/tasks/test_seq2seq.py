"""Encoder-decoders: tokens and limits, the decoder's inputs, loss against the model's own, scores of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from fulltune.errors import DataError
from fulltune.inference.run import Batching, generate_answers, model_batch, run_rows
from fulltune.recipe.data import DataBlock
from fulltune.tasks import LENGTH, Target, seq2seq
from tests import tiny

TARGET = Target("source_target", {"source": "s", "target": "t"})
ROWS = [{"s": "the sun over the town", "t": "sun"}, {"s": "rain", "t": "the rain falls in the cold morning"}]


def encoded(kind: str = "t5", target: Target = TARGET, max_length: int = 99, rows: Any = ROWS) -> list[Any]:
    return [row[0] for row in seq2seq.encode(rows, target, tiny.writer_tokenizer(kind), max_length)]


def test_columns_named_by_language_are_not_guessed() -> None:
    with pytest.raises(DataError, match=r"no column found for data\.source"):
        seq2seq.find_columns(["en", "de"], [], DataBlock(train="x"), "f")
    roles = seq2seq.find_columns(["en", "de"], [], DataBlock(train="x", source="en", target="de"), "f")
    assert roles == {"source": "en", "target": "de"}


@pytest.mark.parametrize(("kind", "read"), [("t5", "sum: rain</s>"), ("bart", "<s>sum: rain</s>")])
def test_source_has_its_prefix_and_target_its_end(kind: str, read: str) -> None:
    target = seq2seq.find_target(iter(ROWS), TARGET.columns, DataBlock(train="x", source_prefix="sum: "), "f")
    example = encoded(kind, target)[1]
    first, second = seq2seq.preview(example.features, target, tiny.writer_tokenizer(kind)).segments
    assert (first.text, first.trained) == (f"{read}\n", False)
    start = "<s>" if kind == "bart" else ""
    assert (second.text, second.trained) == (f"{start}the rain falls in the cold morning</s>", True)
    features = example.features
    assert features[LENGTH] == len(features["input_ids"]) + len(features["labels"])
    assert example.longest == len(features["labels"])
    assert example.trained_tokens == len(features["labels"])
    assert not example.truncated


def test_tokenizer_without_end_of_its_own_gets_one() -> None:
    tokenizer = tiny.decoder_tokenizer(pad="<|pad|>")
    (example,) = seq2seq.encode(ROWS[:1], TARGET, tokenizer, 99)[0]
    assert example.features["labels"][-1] == tokenizer.eos_token_id


def test_cut_source_keeps_its_end_and_cut_target_loses_it() -> None:
    whole, cut = encoded(), encoded(max_length=4)
    end = tiny.writer_tokenizer().eos_token_id
    assert cut[0].features["input_ids"] == [*whole[0].features["input_ids"][:3], end]
    assert cut[1].features["labels"] == whole[1].features["labels"][:4]
    assert cut[1].features["labels"][-1] != end
    assert [example.truncated for example in cut] == [True, True]
    assert [example.longest for example in cut] == [4, 4]
    row, tokenizer = ROWS[0], tiny.writer_tokenizer()
    assert seq2seq.generation_ids(row, TARGET, tokenizer, 4) == cut[0].features["input_ids"]


@pytest.mark.parametrize("kind", tiny.WRITERS)
def test_loss_is_that_of_the_model_given_its_labels(kind: str, tmp_path: Path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny.save_model(tmp_path, kind)).eval()
    tokenizer = tiny.writer_tokenizer(kind)
    features = [{name: np.array(value) for name, value in row.features.items()} for row in encoded(kind)]
    batch = model_batch(model, seq2seq, features, tokenizer.pad_token_id)
    labels = batch.pop("labels")
    assert set(batch) == {"input_ids", "attention_mask", "decoder_input_ids"}
    assert batch["decoder_input_ids"][:, 0].tolist() == [model.config.decoder_start_token_id] * 2
    assert torch.equal(batch["decoder_input_ids"][1, 1:], labels[1, :-1])
    assert batch["decoder_input_ids"].min() >= 0
    with torch.no_grad():
        logits = model(**batch).logits
        theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    ours = seq2seq.loss(logits, labels, TARGET) / seq2seq.count_items(labels)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    kept = run_rows(model, features, seq2seq, TARGET, tokenizer.pad_token_id, Batching(1))
    assert kept["tokens"].tolist() == [len(row["labels"]) for row in features]
    assert seq2seq.metrics(kept, TARGET)["loss"] == pytest.approx(float(theirs), rel=1e-5)


def test_start_token_of_a_model_that_cannot_shift_comes_from_its_config(tmp_path: Path) -> None:
    class Plain:
        config = AutoConfig.for_model("t5", decoder_start_token_id=7, pad_token_id=9)

    labels = torch.tensor([[4, 5, -100], [4, 5, 6]])
    assert seq2seq.decoder_input_ids(Plain(), labels).tolist() == [[7, 4, 5], [7, 4, 5]]


@pytest.mark.parametrize("kind", tiny.WRITERS)
def test_answers_do_not_depend_on_the_batch_or_on_settings_for_other_texts(kind: str, tmp_path: Path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny.save_model(tmp_path, kind)).eval()
    tokenizer = tiny.writer_tokenizer(kind)
    sources = [row.features["input_ids"] for row in encoded(kind)]
    plain = [generate_answers(model, tokenizer, [ids], 6, Batching(1))[0] for ids in sources]
    model.generation_config.update(num_beams=4, min_length=5, no_repeat_ngram_size=1, early_stopping=True)
    assert generate_answers(model, tokenizer, sources, 6, Batching(2)) == plain
    if kind == "bart":  # the only one with learned positions: more tokens than those would be an error
        room = generate_answers(model, tokenizer, sources, 10_000, Batching(2))
        assert [text[:3] for text in room] == [text[:3] for text in plain]


def test_bleu_is_that_of_the_corpus_and_of_each_resample() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="the extra text-metrics is not installed")
    pytest.importorskip("rouge_score", reason="the extra text-metrics is not installed")
    answers = ["the sun shines over the town", "rain", "we cook soup with bread and cheese", "", "an apple, at night"]
    expected = ["the sun shines over the old town", "rain", "we cook soup and bread", "egg", "an apple after dinner"]
    kept = seq2seq.score_answers(answers, expected)
    values = seq2seq.metrics(kept, TARGET)
    assert values["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, [expected]).score)
    assert values["exact_match"] == pytest.approx(0.2)
    assert set(values) == {"exact_match", "rougeL", "chrf", "bleu"} <= set(seq2seq.FACTS.metrics)
    chosen = np.array([0, 0, 2, 4, 3])
    resample = seq2seq.metrics({name: array[chosen] for name, array in kept.items()}, TARGET)
    theirs = sacrebleu.corpus_bleu([answers[i] for i in chosen], [[expected[i] for i in chosen]]).score
    assert resample["bleu"] == pytest.approx(theirs)


def test_bleu_without_a_match_of_four_words_is_smoothed_as_sacrebleu_does() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="the extra text-metrics is not installed")
    pytest.importorskip("rouge_score", reason="the extra text-metrics is not installed")
    answers, expected = ["the sun over the town", "we cook soup"], ["the sun in the old town", "we cook bread"]
    theirs = sacrebleu.corpus_bleu(answers, [expected])
    assert theirs.counts[3] == 0
    assert theirs.score > 1
    found = seq2seq.metrics(seq2seq.score_answers(answers, expected), TARGET)
    assert found["bleu"] == pytest.approx(theirs.score)
