"""Files that are made to be too much: no traceback, no hang, no row lost unseen, memory of a few times their size."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from fulltune.data.readers import text_tables
from fulltune.errors import DataError
from fulltune.models import pixels
from fulltune.models.base import Base
from fulltune.recipe.model import ModelBlock
from tests import tiny
from tests.contract import extreme, malformed

FAST, COUNT, AT_ONCE = 48, 200, 50


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, encoder_tokenizer: Any, decoder_tokenizer: Any) -> dict[str, Any]:
    vit = tiny.save_image_model(tmp_path_factory.mktemp("vit"))
    processors = {
        "text-classification": encoder_tokenizer,
        "token-classification": encoder_tokenizer,
        "causal-lm": decoder_tokenizer,
        "image-classification": Base.of(ModelBlock(name=str(vit)), "image-classification").processor,
    }
    folder = tmp_path_factory.mktemp("first")
    for form in ("parquet", "images", "txt"):  # what these load is no memory of the cases
        malformed.run_here(malformed.make(malformed.FORMS.index(form), folder / form), processors)
    return processors


def _found(folder: Path, given: dict[str, Any], seed: int, size_bytes: int | None = None) -> list[str]:
    case = extreme.make(seed, folder, size_bytes)
    result = extreme.run_forked(case, given)
    shutil.rmtree(folder)
    return [f"{seed} {str(case)[:500]}: {problem}" for problem in result.problems]


@pytest.mark.parametrize("form", extreme.FORMS)
def test_extreme_file_is_read_right_or_refused_clearly(tmp_path: Path, given: dict[str, Any], form: str) -> None:
    seeds = range(extreme.FORMS.index(form), FAST, len(extreme.FORMS))
    assert not [line for seed in seeds for line in _found(tmp_path / str(seed), given, seed, 50_000)]


@pytest.mark.long
@pytest.mark.parametrize("start", range(FAST, FAST + COUNT, AT_ONCE))
def test_two_hundred_extreme_files_are_read_right_or_refused(tmp_path: Path, given: dict[str, Any], start: int) -> None:
    assert not [line for seed in range(start, start + AT_ONCE) for line in _found(tmp_path / str(seed), given, seed)]


# ---- the check can fail ----------------------------------------------------------------------------------------


def test_what_hangs_crashes_or_takes_memory_is_noticed(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(change: Any, most_seconds: float = 60) -> str:
        case = extreme._encoding(random.Random(1), tmp_path, 1000)
        case.path = case.path.rename(tmp_path / "rows.jsonl")
        with monkeypatch.context() as patch:
            patch.setattr(text_tables, "json_lines", change)
            result = extreme.run_forked(case, given, most_seconds=most_seconds)
        (tmp_path / "answer.json").unlink(missing_ok=True)
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        return "\n".join(result.problems)

    def hangs(*given: Any) -> Any:
        while True:
            pass

    def crashes(*given: Any) -> Any:
        raise ValueError("a fault")

    def takes(file: Path, encoding: str) -> Any:
        bytearray(extreme.FREE_BYTES * 2)[:] = b"x" * extreme.FREE_BYTES
        raise DataError(f"{file}:1: expected less; repair it")

    assert "hang" in run(hangs, 2)
    assert "a fault" in run(crashes)
    assert "MiB of memory" in run(takes)


# ---- pictures --------------------------------------------------------------------------------------------------

WHOLE = extreme.whole_pictures(random.Random(7))
GREYS = {"1 bit", "16 bit grey png", "16 bit grey tiff"}


@pytest.mark.parametrize("kind", [kind for kind in WHOLE if kind not in GREYS])
def test_an_unusual_image_is_decoded_upright_in_its_colour(kind: str) -> None:
    image = pixels.decode("", WHOLE[kind][0])
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert all(abs(one - two) <= 4 for one, two in zip(image.getpixel((3, 2)), extreme.RED, strict=True))


@pytest.mark.parametrize("value", [0, 55, 255])
@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_an_image_of_16_bits_keeps_its_greys(value: int, kind: str) -> None:
    import numpy as np
    from PIL import Image

    content = extreme._saved(Image.fromarray(np.full((4, 6), value * 257, np.uint16)), kind)
    assert pixels.decode("", content).getpixel((3, 2)) == (value, value, value)


@pytest.mark.parametrize("kind", sorted(extreme.bad_pictures(random.Random(7))))
def test_a_bad_image_is_refused_with_its_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(extreme.bad_pictures(random.Random(7))[kind])
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded: "):
        pixels.decode(str(path), b"")
