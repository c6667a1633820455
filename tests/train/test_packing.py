"""Raw text in packed rows: the model learns, and no text sees another; where that cannot be had, packing is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fulltune.errors import RecipeError
from fulltune.inference.store import Rows
from fulltune.system.run_folder import RunResult
from fulltune.tasks import causal_lm
from tests import tiny
from tests.contract.command import fulltune
from tests.train import runs

WORDS = (*tiny.PLACES, *tiny.FOOD, *tiny.WEATHER)
TEXTS = [
    {"text": " ".join(WORDS[(number * 7 + step * step) % len(WORDS)] for step in range(3 + number % 9))}
    for number in range(200)
]


def go(folder: Path, model: Path, until: Any = "data", **blocks: Any) -> RunResult:
    data = {"max_length": 64, **blocks.pop("data", {})}
    return runs.run(folder, model, TEXTS, until=until, task="causal-lm", data=data, **blocks)


def token_losses(model: Any, rows: Rows) -> dict[tuple[int, ...], np.ndarray]:
    """Each text's tokens to the losses of all but its first one."""
    found = {}
    features = [dict(row) for row in rows]
    for start in range(0, len(features), 5):
        batch = causal_lm.collate(features[start : start + 5], 0)
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        for row, of_row in zip(features[start : start + 5], losses, strict=True):
            count = len(row["input_ids"])
            begins = np.flatnonzero(row.get("position_ids", np.arange(count)) == 0).tolist()
            for begin, end in zip(begins, [*begins[1:], count], strict=True):
                found[tuple(row["input_ids"][begin:end].tolist())] = of_row[begin : end - 1].numpy()
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_rows_have_the_losses_of_texts_alone(kind: str, tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", kind)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    packed, alone = (
        token_losses(model, Rows(go(tmp_path / str(on), folder, data={"packing": on}).folder / "data" / "train"))
        for on in (None, False)
    )

    assert packed.keys() == alone.keys()
    assert len(packed) > 100
    for text, losses in alone.items():
        np.testing.assert_allclose(packed[text], losses, atol=1e-4)


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("opt") / "tiny-opt", "opt")


def test_model_that_does_not_keep_texts_apart_is_not_packed_and_the_note_says_why(opt: Path, tmp_path: Path) -> None:
    summary = go(tmp_path, opt).summary
    assert not summary.packed
    (note,) = (note for note in summary.notes if "packing" in note)
    assert note.startswith("packing is off because ")
    assert "'opt' model" in note
    assert "position_ids" not in Rows(tmp_path / "run" / "data" / "train")[0]


def test_packing_asked_for_where_it_cannot_be_had_is_refused(opt: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data.packing: .*'opt' model.*; remove the"):
        go(tmp_path, opt, data={"packing": True})
    result = fulltune("data", tmp_path / "recipe.yaml")
    assert result.code == 2
    assert "Traceback" not in result.err
    assert len(result.problems) == 1


def test_long_text_becomes_several_pieces_and_none_of_it_is_lost(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "llama")
    long = {"text": " ".join(WORDS[number % 24] for number in range(400))}
    rows = [long, *TEXTS[:40]]
    reached = runs.run(tmp_path, model, rows, until="data", task="causal-lm", data={"max_length": 64, "packing": False})
    ids = tiny.decoder_tokenizer()(long["text"])["input_ids"]
    pieces = [ids[start : start + 64] for start in range(0, len(ids), 64)]
    assert len(pieces) > 8
    for split in ("train", "eval", "test"):
        found = [row.tolist() for row in Rows(reached.folder / "data" / split)["input_ids"]]
        held = [piece in found for piece in pieces[:-1]]
        assert all(held) or not any(held)  # one text never lies in two splits
        if all(held):
            assert [*pieces[-1], 2] in found
            break
    else:
        pytest.fail("the long text is in no split")
    assert sum(split.truncated_rows for split in reached.summary.splits.values()) == 0
