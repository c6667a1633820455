"""A hundred malformed files of all formats: each row is used as it was written or listed, or the file is refused."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from fulltune.data.readers import text_files
from fulltune.models.base import Base
from fulltune.recipe.model import ModelBlock
from tests import tiny
from tests.contract import malformed

COUNT = 96


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, encoder_tokenizer: Any, decoder_tokenizer: Any) -> dict[str, Any]:
    vit = tiny.save_image_model(tmp_path_factory.mktemp("vit"))
    return {
        "question-answering": encoder_tokenizer,
        "text-classification": encoder_tokenizer,
        "token-classification": encoder_tokenizer,
        "causal-lm": decoder_tokenizer,
        "image-classification": Base.from_block(ModelBlock(name=str(vit)), "image-classification").processor,
    }


@pytest.mark.parametrize("seed", range(COUNT))
def test_malformed_file_is_read_right_or_refused_clearly(tmp_path: Path, given: dict[str, Any], seed: int) -> None:
    case = malformed.make(seed, tmp_path / "case")
    assert not malformed.judge(case, malformed.run_here(case, given)), str(case)


def test_the_hundred_have_all_kinds_of_ends(tmp_path: Path) -> None:
    cases = [malformed.make(seed, tmp_path / str(seed)) for seed in range(COUNT)]
    ends = Counter((bool(case.refusals), any(row.lost for row in case.rows)) for case in cases)
    assert min(ends.values()) >= 5
    assert len(ends) == 4


# ---- the check can fail ----------------------------------------------------------------------------------------


def _complaints(folder: Path, given: dict[str, Any], seeds: range) -> str:
    cases = [malformed.make(seed, folder / str(seed)) for seed in seeds]
    return "\n".join(line for case in cases for line in malformed.judge(case, malformed.run_here(case, given)))


def test_a_reader_that_loses_rows_is_noticed(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = text_files.read_json_lines
    monkeypatch.setattr(text_files, "read_json_lines", lambda *given: islice(whole(*given), 1, None))
    assert "rows.jsonl:1: neither used nor listed" in _complaints(
        tmp_path, given, range(3, COUNT, len(malformed.FORMS))
    )


@pytest.mark.parametrize(
    ("problem", "complaint"),
    [
        ("a.csv:2: 3 cells, expected 2; remove one", ""),
        ("a.csv:22: 3 cells, expected 2; remove one", "no place is named"),
        ("a.csv:2: 3 cells", "not said what to do"),
        ("row 2: 3 cells, expected 2; remove one", "the file is not named"),
    ],
)
def test_a_message_that_lacks_something_is_noticed(tmp_path: Path, problem: str, complaint: str) -> None:
    case = malformed.Case(tmp_path, "text-classification", tmp_path / "a.csv")
    case.refusals.append(malformed.Flaw("too many cells", "a.csv:2"))
    found = malformed.judge(case, malformed.Outcome(problems=(problem,)))
    assert complaint in "\n".join(found)
    assert bool(found) == bool(complaint)
