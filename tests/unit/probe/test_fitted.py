"""A run folder's probe is fitted once, whoever asks first, and test rows take no part."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fulltune.probe import (
    initialise_head_from_probe,
    load_baseline_classifier,
    load_or_fit_probe,
    predict_baseline,
)
from fulltune.probe.features import FeatureExtractor
from fulltune.recipe.tasks import ProblemType, TaskName
from fulltune.records.probe import Probe
from tests.unit.probe.models import extractor_of, logits_alone, model_of, rows_of


def test_several_who_ask_at_once_get_the_same(tmp_path: Path) -> None:
    rows, threads_that_fitted, probes = rows_of("single_label", 40), [], []

    def extract() -> FeatureExtractor:
        threads_that_fitted.append(threading.get_ident())
        return extractor_of(model_of("Bert", "text-classification"), "text-classification", "single_label")

    threads = [
        threading.Thread(target=lambda: probes.append(load_or_fit_probe(tmp_path, extract, rows, rows[:9])))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(threads_that_fitted) == 1
    assert len(probes) == 4
    assert len({probe.model_dump_json() for probe in probes}) == 1
    assert probes[0] == Probe.load(tmp_path / "probe" / "probe.json")
    assert not list(tmp_path.rglob("*.part"))


def test_one_that_broke_off_is_fitted_again(tmp_path: Path) -> None:
    rows = rows_of("single_label", 40)

    def broken() -> FeatureExtractor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_or_fit_probe(tmp_path, broken, rows, rows)
    model = model_of("Bert", "text-classification")
    assert (
        load_or_fit_probe(tmp_path, lambda: extractor_of(model, "text-classification", "single_label"), rows, rows).head
        is not None
    )


def test_the_same_rows_give_the_same_bytes_and_draw_no_random_number(tmp_path: Path) -> None:
    """Also with another random state, and when nothing has to be fitted: what is drawn later is the same."""
    rows, written = rows_of("single_label", 40), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        model = model_of("Bert", "text-classification")
        before = torch.get_rng_state()
        extractor = extractor_of(model, "text-classification", "single_label")
        load_or_fit_probe(tmp_path / str(seed), lambda extractor=extractor: extractor, rows, rows[:9])
        initialise_head_from_probe(model, tmp_path / str(seed))
        assert torch.equal(torch.get_rng_state(), before)
        written.append((tmp_path / str(seed) / "probe" / "head.safetensors").read_bytes())
    assert written[0] == written[1]


def test_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = model_of("Bert", "text-classification").train()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    rows = rows_of("single_label", 40)
    load_or_fit_probe(tmp_path, lambda: extractor_of(model, "text-classification", "single_label"), rows, rows)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert model.training


def test_layers_that_the_checkpoint_lacks_are_the_same_wherever_the_start_is_taken(tmp_path: Path) -> None:
    """A head may have more layers than are fitted, drawn anew in each trial; the last one was fitted on the first's."""
    config = transformers.BigBirdConfig(
        vocab_size=100,
        pad_token_id=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        attention_type="original_full",
        max_position_embeddings=64,
        num_labels=3,
    )
    first, other = (transformers.BigBirdForSequenceClassification(config).eval() for _ in range(2))
    other.bert.load_state_dict(
        {name: one for name, one in first.bert.state_dict().items() if "pooler" not in name}, False
    )
    rows, task = rows_of("single_label", 40), "text-classification"
    probe = load_or_fit_probe(
        tmp_path, lambda: extractor_of(first, "text-classification", "single_label"), rows, rows[:9]
    )
    assert probe.head is not None
    assert probe.head.dense is None
    for model in (first, other):
        initialise_head_from_probe(model, tmp_path)
    logits, others = (logits_alone(extractor_of(model, task, "single_label"), rows[:5]) for model in (first, other))
    np.testing.assert_array_equal(logits, others)


@pytest.mark.parametrize(
    ("task", "kind"),
    [("text-classification", "single_label"), ("token-classification", "tags"), ("multiple-choice", "choice")],
)
def test_rival_answers_each_row_by_its_number(task: TaskName, kind: ProblemType, tmp_path: Path) -> None:
    """In whatever batches the rows are read, and whatever the pooling; rows without an item have no answer."""
    model = model_of("Bert", task)
    rows = rows_of(kind, 40)
    probe = load_or_fit_probe(tmp_path, lambda: extractor_of(model, task, kind), rows, rows[:9])
    classifier = load_baseline_classifier(tmp_path)
    assert probe.baseline is not None
    if kind == "tags":
        rows[5]["labels"] = [-100] * len(rows[5]["labels"])
        rows[5]["word_ids"] = [-1] * len(rows[5]["word_ids"])
    outputs_of = {}
    for batch_size in (7, 1):
        answers = predict_baseline(
            extractor_of(model, task, kind, batch_size=batch_size), rows, probe.baseline, classifier
        )
        outputs_of[batch_size] = dict(answers)
        assert len(answers) == len(outputs_of[batch_size]) == (39 if kind == "tags" else 40)
    for number, outputs in outputs_of[7].items():
        items = {"tags": len(rows[number].get("tags", ())), "choice": 4}.get(kind, 1)
        assert outputs.shape == (items, 1 if kind == "choice" else 3)
        np.testing.assert_allclose(outputs, outputs_of[1][number], atol=1e-3)
