"""Whole runs of encoder-decoders: the target is made of the source, and is neither the source nor a constant."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from fulltune import methods, predict
from fulltune.inference.store import read_original_rows
from fulltune.recipe.methods import FullMethod
from tests import tiny
from tests.train import runs


def kind_rows(count: int) -> list[dict[str, str]]:
    """Texts that name a dish; the target says so in a sentence."""
    rows = []
    for number in range(count):
        word = tiny.FOOD[number % 8]
        rows.append({"document": f"{number} {tiny.PLACES[number % 7]} {word}", "summary": f"now we cook {word} here"})
    return rows


@pytest.mark.long
def test_run_learns_to_write_and_to_stop(tmp_path: Path) -> None:
    pytest.importorskip("rouge_score", reason="the extra text-metrics is not installed")
    pytest.importorskip("sacrebleu", reason="the extra text-metrics is not installed")
    model = tiny.save_model(tmp_path / "model", "t5", dropout_rate=0.0)
    reached = runs.run(
        tmp_path,
        model,
        kind_rows(240),
        until="report",
        task="seq2seq",
        data={"source_prefix": "say: "},
        method={"learning_rate": 1e-2},
        train={"num_train_epochs": 14, "eval_strategy": "steps", "eval_steps": 60},
        evaluate={"bootstrap_samples": 100, "generate_rows": 16, "max_new_tokens": 20},
    )

    runs.assert_report_is_whole(reached)
    assert reached.summary.columns == {"source": "document", "target": "summary"}
    assert reached.plan is not None
    assert reached.plan.metric == "loss"
    before, copy, trained = reached.scores
    assert (before.kind, copy.name, copy.kind) == ("untouched", "copy of the source", "baseline")
    assert trained.metrics["loss"].value < before.metrics["loss"].value / 3
    for metric in ("exact_match", "chrf", "bleu"):
        best = max(row.metrics[metric].value for row in (before, copy))
        assert trained.metrics[metric].value > best + (0.7 if metric == "exact_match" else 50)
    test = list(read_original_rows(reached.folder / "data" / "test"))
    asked = [answer.text for answer in trained.answers]
    assert len(set(asked)) == 16
    assert asked != [row["document"] for row in test[:16]]
    expected = {row["document"]: row["summary"] for row in test}
    assert all(answer.expected == expected[answer.text] for answer in trained.answers)
    report = (reached.folder / "report.md").read_text(encoding="utf-8")
    assert "AutoModelForSeq2SeqLM" in report
    assert "copy of the source" in report

    question = "7 town soup"
    predictor = predict.load_predictor(reached.folder)
    rows = [predict.row_from_text(question, predictor.notes)]
    assert predictor.predict(rows, max_new_tokens=20) == [{"answer": "now we cook soup here"}]
    folder = reached.folder / "models" / "full"
    plain, reader = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    made = plain.generate(**reader(f"say: {question}", return_tensors="pt"), max_new_tokens=30, do_sample=False)
    assert reader.decode(made[0]).endswith("now we cook soup here</s>")


def test_run_leaves_a_table_of_positions_that_is_not_saved_as_it_is(tmp_path: Path) -> None:
    """Marian computes its positions anew on loading: trained ones would be lost."""
    folder = tiny.save_model(tmp_path / "model", "marian")
    reached = runs.run(tmp_path, folder, kind_rows(40), task="seq2seq", train={"max_steps": 3})

    assert reached.outcome is not None
    assert reached.outcome.parameter_changes is not None
    assert not reached.outcome.parameter_changes.unchanged_tensors
    model = methods.apply_method(
        AutoModelForSeq2SeqLM.from_pretrained(folder), FullMethod(kind="full"), "seq2seq"
    ).model
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert fixed == set(methods.sinusoidal_tables(model)) != set()
    assert not fixed & set(load_file(reached.folder / "models" / "full" / "model.safetensors"))
    learned = len(list(model.parameters())) - len(fixed)
    assert reached.outcome.parameter_changes.num_tensors_changed == learned
