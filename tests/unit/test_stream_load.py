"""A model that does not fit into memory answers as one that does, reading its weights from the files in each pass."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

from fulltune.errors import DoesNotFitError
from fulltune.models import save
from fulltune.models.load import load_model
from fulltune.predict import load_predictor
from fulltune.stream import skeleton as module
from fulltune.stream.files import StoredTensor
from fulltune.stream.skeleton import load_within, skeleton
from fulltune.stream.units import find_units
from tests import tiny
from tests.cases import others_long
from tests.contract.test_predict import KINDS, made
from tests.gpu_paths.cards import GIB, Cards, h100
from tests.train import runs
from tests.unit.test_stream_files import base_of, make


def nothing_free() -> tuple[int, int]:
    return 2**30, 1000


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "total_and_free_memory", nothing_free)


@contextlib.contextmanager
def in_own_memory() -> Iterator[None]:
    """Copy loaded weights out of the mapped file, where other places give products other last bits."""

    def load_and_copy(*given: Any, **named: Any) -> Any:
        model = load_model(*given, **named)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model

    with mock.patch.object(module, "load_model", load_and_copy):
        yield


@pytest.fixture
def most_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Most bytes of weights that were read and alive at the same time."""
    alive, most = [0], [0]
    read = StoredTensor.read

    def counted(stored: StoredTensor) -> torch.Tensor:
        values = read(stored)
        alive[0] += values.nbytes
        most[0] = max(most[0], alive[0])
        storage = values.untyped_storage()
        weakref.finalize(storage, lambda size: alive.__setitem__(0, alive[0] - size), values.nbytes)
        return values

    monkeypatch.setattr(StoredTensor, "read", counted)
    return most


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    ids = torch.randint(5, 60, (2, 7))
    more = {"decoder_input_ids": torch.randint(5, 60, (2, 3))} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]), **more}


@pytest.mark.parametrize(
    "kind", others_long(("llama", "tied llama", "bert", "t5", "vit", "gpt2", "bart"), "llama", "t5")
)
def test_streamed_model_returns_the_same_logits(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base, changes = make(tmp_path / "model", kind)
    torch.manual_seed(1)
    with in_own_memory():
        loaded = load_within(base, changes, head_is_new=bool(changes))
    monkeypatch.setattr(module, "total_and_free_memory", nothing_free)
    torch.manual_seed(1)
    with caplog.at_level(logging.WARNING):
        streamed = load_within(base, changes, head_is_new=bool(changes))
    [message] = [record.getMessage() for record in caplog.records]
    assert "of memory are free, so they are read from the disk in each pass" in message
    absent = [name for name, parameter in streamed.named_parameters() if parameter.isnan().all()]
    assert absent == [
        name for name in dict(loaded.named_parameters()) if not name.startswith(("classifier", "bert.pool"))
    ]
    inputs, models = inputs_of(loaded), list[Any]([loaded, streamed])
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, streamed(**inputs).logits)
        if loaded.can_generate():
            inputs.pop("decoder_input_ids", None)
            for beams in (1, 2):
                options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
                assert torch.equal(*(model.generate(**inputs, **options) for model in models))


@pytest.mark.parametrize("kind", ["tied llama", "bert"])
def test_random_weights_are_the_same_each_time(tmp_path: Path, kind: str) -> None:
    base, changes = make(tmp_path / "model", kind)
    base = base_of(tmp_path / "model", base.task, random_weights=True)
    empty = skeleton(base, changes, head_is_new=bool(changes))
    for unit in find_units(empty.model):
        for name, values in empty.read(unit.names).items():
            empty.model.get_parameter(name).data = values
    streamed, model = load_within(base, changes, head_is_new=bool(changes)), empty.model.eval()
    inputs = inputs_of(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, streamed(**inputs).logits)


def test_at_most_two_units_are_in_memory(tmp_path: Path, no_memory: None, most_bytes: list[int]) -> None:
    tiny.save_model(tmp_path / "model", "llama", num_hidden_layers=6)
    streamed = load_within(base_of(tmp_path / "model"), {}, head_is_new=False)
    unit_bytes = [sum(streamed.get_parameter(name).nbytes for name in unit.names) for unit in find_units(streamed)]
    most_bytes[0] = 0
    model: Any = streamed
    model.generate(**inputs_of(streamed), max_new_tokens=3, do_sample=False)
    assert max(unit_bytes) < most_bytes[0] <= 2 * max(unit_bytes) < sum(unit_bytes) / 2


def test_model_that_fits_is_in_memory_and_a_limit_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, _ = make(tmp_path / "model", "llama")
    assert not any(one.isnan().any() for one in load_within(base, {}, head_is_new=False).parameters())
    assert not caplog.records
    within = load_within(base, {}, head_is_new=False, memory_limit=2**20)  # less than Python takes
    assert all(one.isnan().all() for one in within.parameters())


def test_model_that_neither_fits_nor_streams_is_refused(tmp_path: Path, no_memory: None) -> None:
    base, _ = make(tmp_path / "model", "llama")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "part.safetensors")
    with pytest.raises(DoesNotFitError, match=r"1,000 bytes of memory are free, but they cannot be streamed.*no model"):
        load_within(base, {}, head_is_new=False)


@pytest.mark.stand_in("a card by a patched torch.cuda", card="what the driver calls free")
def test_card_must_have_room_for_the_model_if_it_goes_there(tmp_path: Path) -> None:
    base, _ = make(tmp_path / "model", "llama")
    with Cards([h100()]).plugged_in() as cards:
        cards[0].take(79 * GIB - 1000)
        assert not any(one.isnan().any() for one in load_within(base, {}, head_is_new=False).parameters())
        (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "part.safetensors")
        with pytest.raises(DoesNotFitError, match=r"1,000 bytes of memory are free, but they cannot be streamed"):
            load_within(base, {}, head_is_new=False, device="cuda")


@pytest.mark.parametrize("kind", others_long(KINDS, "single_label", "span", "prompt_completion", "source_target"))
def test_predictions_are_the_same(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "model", kind)
    texts = ["the sun shines", "we cook soup with bread", "rain"]
    rows: dict[str, list[Mapping[str, Any]]] = {
        "choice": [{"question": text, "choices": ["yes", "no"]} for text in texts],
        "tags": [{"tokens": text.split()} for text in texts],
        "span": [{"context": text, "question": "what?"} for text in texts],
        "prompt_completion": [{"prompt": text} for text in texts],
        "chat": [{"messages": [{"role": "user", "content": text}]} for text in texts],
        "source_target": [{"source": text} for text in texts],
    }
    given = rows.get(kind, [{"text": text} for text in texts])
    with in_own_memory():
        expected = load_predictor(folder).predict(given)
    monkeypatch.setattr(module, "total_and_free_memory", nothing_free)
    streamed = load_predictor(folder)
    assert all(one.isnan().all() for one in streamed.model.get_input_embeddings().parameters())
    assert streamed.predict(given) == expected
    assert expected[0] is not None


@pytest.mark.parametrize("file_bytes", [2**28, 20_000])
def test_saved_model_is_a_plain_folder(tmp_path: Path, file_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "FILE_BYTES", file_bytes)
    base, _ = make(tmp_path / "model", "tied llama")
    empty, loaded = skeleton(base, {}, head_is_new=False), load_model(base, {}, head_is_new=False)
    save.save_in_parts(empty.model, tmp_path / "saved", lambda name: empty.read([name])[name])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for (name, expected), (other, value) in zip(loaded.named_parameters(), again.named_parameters(), strict=True):
        assert (name, value.dtype) == (other, expected.dtype)
        assert torch.equal(value, expected)
    loaded.save_pretrained(tmp_path / "whole")
    assert (len([*(tmp_path / "saved").glob("*.safetensors")]) > 1) == (file_bytes == 20_000)
    for file in ("config.json", "generation_config.json"):
        saved, whole = (json.loads((tmp_path / folder / file).read_text()) for folder in ("saved", "whole"))
        assert saved == whole


@pytest.mark.parametrize("kind", others_long(("llama", "bert"), "llama"))
def test_scores_are_the_same(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, is_writer = tiny.save_model(tmp_path / "model", kind), kind == "llama"
    blocks: dict[str, Any] = {"train": {"max_steps": 1}, "evaluate": {"generate_rows": 4, "max_new_tokens": 4}}
    blocks |= {"task": "causal-lm"} if is_writer else {}
    rows = tiny.pair_rows(40) if is_writer else tiny.topic_rows(40)
    with runs.without_tracing():
        runs.run(tmp_path, model, rows, **blocks)
        shutil.copytree(tmp_path / "run", tmp_path / "trained")
        with in_own_memory():
            expected = runs.run(tmp_path, model, rows, until="evaluate", **blocks)
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "trained").rename(tmp_path / "run")
        monkeypatch.setattr(module, "total_and_free_memory", nothing_free)
        streamed = runs.run(tmp_path, model, rows, until="evaluate", **blocks)
    timeless = [[one.model_copy(update={"seconds": None}) for one in result.scores] for result in (streamed, expected)]
    assert timeless[0] == timeless[1]
    assert len(expected.scores) > 1
