"""Prepared rows are made once: other runs link to them, and anything that could change them makes new ones."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fulltune import data
from fulltune.data import written
from fulltune.errors import DataError
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from fulltune.records.events import Event, Message
from tests import tiny

ROWS = tiny.topic_rows(40)


class Runs:
    """Data stages of several runs over one cache, which count how often something is tokenised."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer, self.num_encoded = folder, tokenizer, 0
        self.file = tiny.write_csv(folder / "train.csv", ROWS)
        self.cache = folder / "runs" / ".fulltune-cache"

    def prepare(self, run: str, *, positions: int = 64, model_type: str = "bert", **options: Any) -> DataSummary:
        settings = {"train": str(self.file), **options.pop("settings", {})}
        recipe = Recipe.model_validate({"model": "x", "task": "text-classification", "data": settings})
        stage = data.Stage(
            recipe,
            self.folder / "runs" / run / "data",
            options.pop("tokenizer", self.tokenizer),
            data.Limits(positions, model_type),
            cache_folder=self.cache,
            **options,
        )
        return data.prepare(stage)

    def cached(self) -> list[Path]:
        """What lies in the cache, but for its lock."""
        return sorted(path for path in self.cache.iterdir() if path.name != ".lock")

    def files(self, run: str) -> dict[str, int]:
        """Names of a run's data files with their inodes."""
        folder = self.folder / "runs" / run / "data"
        return {
            str(path.relative_to(folder)): path.stat().st_ino for path in sorted(folder.rglob("*")) if path.is_file()
        }


@pytest.fixture
def runs(tmp_path: Path, encoder_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Runs:
    runs = Runs(tmp_path, encoder_tokenizer)
    module = sys.modules["fulltune.data.prepare"]  # the package's name `prepare` is the function
    plain = module.encode_source

    def counted(*arguments: Any) -> Any:
        runs.num_encoded += 1
        return plain(*arguments)

    monkeypatch.setattr(module, "encode_source", counted)
    return runs


def test_second_run_links_to_the_files_of_the_first(runs: Runs) -> None:
    first = runs.prepare("one")
    assert runs.num_encoded == 1
    assert runs.prepare("two") == first
    assert runs.num_encoded == 1
    assert runs.files("two") == runs.files("one")
    assert {name for name in runs.files("one") if name.endswith("arrow")} == {
        f"{split}/rows.arrow" for split in ("train", "eval", "test")
    }
    (kept,) = runs.cached()
    assert kept.name == first.fingerprint


def edit(runs: Runs) -> dict[str, Any]:
    runs.file.write_text(runs.file.read_text(encoding="utf-8").replace("sun", "fun", 1), encoding="utf-8")
    return {}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(edit, id="content"),
        pytest.param(lambda runs: {"positions": 32}, id="model's limit"),
        pytest.param(lambda runs: {"model_type": "roberta"}, id="model's kind"),
        pytest.param(lambda runs: {"tokenizer": tiny.encoder_tokenizer(token_types=False)}, id="tokenizer's inputs"),
        pytest.param(lambda runs: {"tokenizer": tiny.encoder_tokenizer(model_max_length=16)}, id="tokenizer's limit"),
        pytest.param(lambda runs: {"tokenizer": tiny.writer_tokenizer()}, id="tokenizer"),
        pytest.param(lambda runs: {"settings": {"split_seed": 7}}, id="seed"),
        pytest.param(lambda runs: {"settings": {"max_length": 12}}, id="max_length"),
        pytest.param(
            lambda runs: {"settings": {"test": str(tiny.write_csv(runs.folder / "test.csv", tiny.topic_rows(8)))}},
            id="test file",
        ),
    ],
)
def test_anything_that_changes_the_rows_makes_them_anew(runs: Runs, change: Callable[[Runs], dict[str, Any]]) -> None:
    first = runs.prepare("one")
    before, encoded = runs.files("one"), runs.num_encoded
    other = runs.prepare("two", **change(runs))
    assert runs.num_encoded > encoded
    assert other.fingerprint != first.fingerprint
    assert not set(before.values()) & set(runs.files("two").values())
    assert runs.files("one") == before


def test_same_content_elsewhere_is_found(runs: Runs) -> None:
    runs.prepare("one")
    runs.file = tiny.write_csv(runs.folder / "moved" / "train.csv", ROWS)
    runs.prepare("two")
    assert runs.num_encoded == 1


def test_rows_through_a_function_are_never_taken_from_the_cache(runs: Runs) -> None:
    for run in ("one", "two"):
        runs.prepare(run, preprocess=lambda row: {**row, "text": row["text"].upper()})
    assert runs.num_encoded == 2
    assert not runs.cache.exists()


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(("stays", "is_linked"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_rows_that_were_damaged_are_named_and_made_anew(
    runs: Runs, damage: Callable[[Path], None], stays: bool, is_linked: bool
) -> None:
    """Those of the run, of the cache where both are one file, or of the cache for another run."""
    first = runs.prepare("one")
    rows = runs.folder / "runs" / "one" / "data" / "train" / "rows.arrow"
    before = rows.read_bytes()
    if not is_linked:  # on another file system they are copies
        rows.unlink()
        rows.write_bytes(before)
    damage(rows if stays else runs.cached()[0] / "train" / "rows.arrow")
    events: list[Event] = []
    assert (
        runs.prepare("one" if stays else "two", listener=events.append, planned_fingerprint=first.fingerprint) == first
    )
    damaged = [event.text for event in events if isinstance(event, Message)]
    of_cache = is_linked and (damage is not Path.unlink or not stays)
    assert runs.num_encoded == (2 if of_cache else 1)
    assert len(damaged) == stays + of_cache
    assert all("train/rows.arrow " in one for one in damaged)
    assert (runs.folder / "runs" / ("one" if stays else "two") / "data" / "train" / "rows.arrow").read_bytes() == before


def test_other_file_system_gets_a_copy(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible(*_: Any, **__: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    first = runs.prepare("one")
    monkeypatch.setattr(os, "link", impossible)
    assert runs.prepare("two") == first
    assert runs.num_encoded == 1
    one, two = runs.files("one"), runs.files("two")
    assert one.keys() == two.keys()
    assert not set(one.values()) & set(two.values())
    for name in one:
        folders = (runs.folder / "runs" / run / "data" / name for run in ("one", "two"))
        assert len({path.read_bytes() for path in folders}) == 1


def test_only_the_five_used_last_are_kept(runs: Runs) -> None:
    fingerprints = [runs.prepare(f"run {seed}", settings={"split_seed": seed}).fingerprint for seed in range(5)]
    for age, name in enumerate(reversed(fingerprints), start=1):
        os.utime(runs.cache / name, (time.time() - age, time.time() - age))
    runs.prepare("again", settings={"split_seed": 0})  # used now: no longer the oldest
    sixth = runs.prepare("sixth", settings={"split_seed": 5}).fingerprint
    assert {path.name for path in runs.cached()} == {fingerprints[0], *fingerprints[2:], sixth}
    assert runs.files("run 1")


def test_what_a_killed_run_left_is_no_data_and_goes_after_a_day(runs: Runs) -> None:
    name = runs.prepare("one").fingerprint
    fresh, old = (runs.cache / f"{name}.part-{pid}" for pid in (1, 2))
    for left in (fresh, old):
        (left / "train-whole").mkdir(parents=True)
    os.utime(old, (time.time() - 90_000, time.time() - 90_000))
    # This process's own name, of an earlier process with the same number.
    own = runs.cache / f"{name}.part-{os.getpid()}"
    (own / "eval").mkdir(parents=True)
    shutil.rmtree(runs.cache / name)

    runs.prepare("two")

    assert runs.num_encoded == 2
    assert {path.name for path in runs.cached()} == {name, fresh.name}
    assert set(runs.files("two")) == set(runs.files("one"))


def test_stage_that_fails_leaves_nothing_half_done_and_the_earlier_rows(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.prepare("one")
    before = runs.files("one")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(written, "write_rows", full)
    with pytest.raises(OSError, match="No space left"):
        runs.prepare("one", settings={"split_seed": 3})
    assert runs.files("one") == before
    assert not list(runs.folder.rglob("*.part-*"))


def _replace(file: Path) -> None:
    """Another file of the same size, with its time set back."""
    was = file.stat()
    other = file.with_suffix(".new")
    other.write_bytes(file.read_bytes().replace(b"rain", b"snow"))
    other.replace(file)
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))


def _append(file: Path) -> None:
    with file.open("a") as stream:
        stream.write("rain at the end,weather\n")


CHANGES: dict[str, Callable[[Path], Any]] = {
    "replaced": _replace,
    "appended": _append,
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("moment", ["_fingerprint_inputs", "find_target_and_count_rows", "encode_source"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_read_is_refused_and_nothing_is_kept(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, change: str, moment: str
) -> None:
    module = sys.modules["fulltune.data.prepare"]
    before = getattr(module, moment)

    def then_changed(*arguments: Any) -> Any:
        result = before(*arguments)
        CHANGES[change](runs.file)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(module, moment, then_changed)
        done = "was deleted" if change == "deleted" else "changed"
        with pytest.raises(DataError, match=rf"train\.csv: {done} while it was being read; run again"):
            runs.prepare("one")
    assert not runs.cached()
    assert not (runs.folder / "runs" / "one" / "data").exists()
    tiny.write_csv(runs.file, ROWS)
    runs.prepare("two")
    assert len(runs.cached()) == 1


@pytest.mark.parametrize("column", ["text", "label"])
def test_a_column_of_which_no_cell_can_be_read_is_named(runs: Runs, column: str) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_pylist(ROWS)
    cells = pa.array([b"caf\xe9 %d" % number for number in range(len(ROWS))]).view(pa.string())
    runs.file = runs.folder / "rows.parquet"
    parquet.write_table(table.set_column(table.schema.get_field_index(column), column, cells), runs.file)
    with pytest.raises(DataError, match=rf"rows\.parquet: .*column '{column}' holds a text that is not UTF-8"):
        runs.prepare("one")
