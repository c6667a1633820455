"""Data sets on the Hub, served by a Hub on this machine."""

from __future__ import annotations

import gzip
import io
import json
import socket
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pytest
from huggingface_hub import constants, hf_hub_download
from pyarrow import parquet

from fulltune.data.remote.fetch import fetch, fetch_sources
from fulltune.data.remote.hub import list_files
from fulltune.data.sources import find_source_files
from fulltune.errors import DataError
from fulltune.recipe.file import load_recipe
from fulltune.records.events import Event, Message
from tests import tiny
from tests.contract.command import fulltune
from tests.hub import Hub, serve_hub

OFFLINE = mock.patch.object(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve_hub(tmp_path / "hub") as served:
        yield served


def lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def jsonl(count: int, start: int = 0) -> str:
    return lines(tiny.topic_rows(start + count)[start:])


def as_parquet(count: int) -> bytes:
    parquet.write_table(pa.Table.from_pylist(tiny.topic_rows(count)), stream := io.BytesIO())
    return stream.getvalue()


def readme(card: Any) -> str:
    return f"---\n{json.dumps(card)}\n---\n# Rows\n"


def names(address: str) -> list[str]:
    return [file.name for file in list_files(address, None).files]


SPLITS = {
    "split words in file names": (
        {"train.csv": "", "dev-0.csv": "", "dev-1.csv": "", "test.csv": "", "config.json": "", "notes.txt": ""},
        {"train": ["train.csv"], "validation": ["dev-0.csv", "dev-1.csv"], "test": ["test.csv"]},
    ),
    "split words in folder names": (
        {"a/train/x.jsonl.gz": "", "a/test/x.jsonl.gz": ""},
        {"train": ["a/train/x.jsonl.gz"], "test": ["a/test/x.jsonl.gz"]},
    ),
    "packed files": (
        {"train-0-of-1.csv.zst": "", "test.csv.XZ": "", ".train.csv": "", "._a/train.csv": ""},
        {"train": ["train-0-of-1.csv.zst"], "test": ["test.csv.XZ"]},
    ),
    "archives": ({"train.zip": "", "test.zip": "", "LICENSE": ""}, {"train": ["train.zip"], "test": ["test.zip"]}),
    "no split words": ({"b.csv": "", "a.csv": "", "a.json": ""}, {"train": ["a.csv", "b.csv"]}),
    "one pattern": (
        {"a.csv": "", "b.csv": "", "c/a.csv": "", "README.md": readme({"configs": [{"data_files": "*.csv"}]})},
        {"train": ["a.csv", "b.csv"]},
    ),
    "patterns by split": (
        {
            "x/a.csv": "",
            "x/y/b.csv": "",
            "c.csv": "",
            "README.md": readme({"configs": [{"data_dir": "x", "data_files": {"fit": ["**/b.csv", "a.csv"]}}]}),
        },
        {"fit": ["x/a.csv", "x/y/b.csv"]},
    ),
    "the Hub's form": (
        {
            "d/train-0.csv": "",
            "d/held.txt": "",
            "README.md": readme(
                {
                    "configs": [
                        {
                            "config_name": "default",
                            "data_files": [{"split": "train", "path": "d/train-*"}, {"split": "all", "path": "d"}],
                        }
                    ]
                }
            ),
        },
        {"train": ["d/train-0.csv"], "all": ["d/held.txt", "d/train-0.csv"]},
    ),
    "files of a folder, and rows without a number": (
        {
            "d/x.csv": "",
            "d/s/y.csv": "",
            "README.md": readme(
                {"configs": [{"data_files": "d/*"}], "dataset_info": {"splits": [{"name": "train", "num_bytes": 9}]}}
            ),
        },
        {"train": ["d/x.csv"]},
    ),
    "a folder": (
        {"x/train.csv": "", "x/test.csv": "", "y.csv": "", "README.md": readme({"configs": [{"data_dir": "x"}]})},
        {"train": ["x/train.csv"], "test": ["x/test.csv"]},
    ),
}


@pytest.mark.parametrize("case", SPLITS)
def test_splits_are_those_of_the_readme_or_of_the_names(hub: Hub, case: str) -> None:
    files, expected = SPLITS[case]
    commit = hub.push("o/d", files)
    found = {split: list_files(f"hf://datasets/o/d?split={split}", None) for split in expected}
    assert {split: [file.name for file in listing.files] for split, listing in found.items()} == expected
    assert {listing.revision for listing in found.values()} == {commit}
    with pytest.raises(DataError) as raised:
        list_files("hf://datasets/o/d?split=x", None)
    said, _, splits = str(raised.value).partition("; set split: to one of ")
    assert said.endswith("has no split 'x'")
    assert {*splits.split(", ")} == {*expected}


def test_file_names_and_revisions_of_an_address_are_read(hub: Hub) -> None:
    old = hub.push("o/d", {"x/a.csv": "1", "x/b.csv.gz": "", "c.csv": "", "x/old.txt": ""}, ref="refs/tags/v1")
    hub.push("o/d", {"x/a.csv": "22", "README.md": "# rows"})
    listing = list_files("hf://datasets/o/d@v1/x/*", None)
    assert [(file.name, file.size) for file in listing.files] == [("x/a.csv", 1), ("x/b.csv.gz", 0), ("x/old.txt", 0)]
    assert listing.revision == old
    assert names("hf://datasets/o/d@v1/*.csv") == ["c.csv"]
    assert names("hf://datasets/o/d@v1/x/old.txt") == ["x/old.txt"]
    assert list_files("hf://datasets/o/d", None).files[0].size == 2
    assert list_files("hf://datasets/o/d", old).revision == old


def test_configuration_is_the_usual_one_or_must_be_named(hub: Hub) -> None:
    def configs(*flags: bool) -> str:
        entries = [
            {"config_name": name, "data_files": f"{name}.csv", "default": flag}
            for name, flag in zip(("german", "french"), flags, strict=True)
        ]
        infos = [{"config_name": "french", "splits": [{"name": "train", "num_examples": 7}]}]
        return readme({"configs": entries, "dataset_info": infos})

    files = {"german.csv": "", "french.csv": ""}
    hub.push("o/d", {**files, "README.md": configs(False, True)})
    assert names("hf://datasets/o/d") == ["french.csv"]
    assert names("hf://datasets/o/d?config=german") == ["german.csv"]
    hub.push("o/d", {**files, "README.md": configs(False, False)})
    assert list_files("hf://datasets/o/d?config=french&split=train[:3]", None).rows == 7
    for address, said in {
        "hf://datasets/o/d": "has several configs; set config: to one of german, french",
        "hf://datasets/o/d?config=frensh": "has no config 'frensh'; set config: to one of french, german",
    }.items():
        with pytest.raises(DataError, match=said):
            list_files(address, None)


def test_numbers_are_names_as_well(hub: Hub) -> None:
    configs = [{"config_name": 3, "data_files": [{"split": 2020, "path": "a.csv"}]}]
    infos = {"config_name": 3, "splits": [{"name": 2020, "num_examples": 7}]}
    hub.push("o/d", {"a.csv": "", "README.md": readme({"configs": configs, "dataset_info": infos})})
    assert list_files("hf://datasets/o/d?config=3&split=2020", None).rows == 7
    with pytest.raises(DataError, match="has no config '4'; set config: to one of 3"):
        list_files("hf://datasets/o/d?config=4", None)


def test_conversion_of_the_hub_is_offered_for_files_that_need_a_program(hub: Hub) -> None:
    hub.push("o/d", {"d.py": "", "train.csv": "", "a.tar": ""})
    with pytest.raises(DataError, match=r"without a program; its files: d\.py, train\.csv, a\.tar;") as raised:
        list_files("hf://datasets/o/d", None)
    address = str(raised.value).rpartition(" ")[2]
    commit = hub.push(
        "o/d",
        {f"{place}/000{n}.parquet": as_parquet(3) for place in ("en/fit", "fr/fit") for n in (0, 1)},
        "refs/convert/parquet",
    )
    assert names(f"{address}?config=fr") == ["fr/fit/0000.parquet", "fr/fit/0001.parquet"]
    assert list_files(f"{address}?config=en", commit).revision == commit


FAILURES = {
    "unknown": ((401, "RepoNotFound"), "does not exist at {url}, or you may not read it; check OWNER/NAME, or log in"),
    "gated": ((403, "GatedRepo"), "is gated; accept its terms at {url}/datasets/o/d, and log in with 'hf auth login'"),
    "forbidden": ((403, ""), "or you may not read it"),
    "server error": ((500, ""), "{url} cannot be reached (500); check the network, or try again later"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures_of_the_hub_say_what_to_do(hub: Hub, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.push("o/d", {"train.csv": ""})
    answer, said = FAILURES[case]
    hub.failures["/api/datasets/o/d"] = answer
    with pytest.raises(DataError) as raised:
        list_files("hf://datasets/o/d", None)
    (problem,) = raised.value.problems
    assert problem.startswith("o/d: ")
    assert said.format(url=hub.url) in problem
    assert "hf_secret" not in problem


def test_other_mistakes_say_what_there_is(hub: Hub) -> None:
    hub.push("o/d", {"train.csv": "", "README.md": readme({"configs": [{"data_files": [{"path": "x"}]}]})})
    hub.push("o/d", {"train.csv": ""}, ref="refs/heads/cleaned")
    hub.push("o/d", {"train.csv": ""}, ref="refs/tags/v1")
    for address, said in {
        "hf://datasets/o/d@cleand": "o/d: has no revision 'cleand'; use a commit, or one of cleaned, main, v1",
        "hf://datasets/o/d@v1/trian.csv": "o/d: no data file matches 'trian.csv'; its files: train.csv",
        "hf://datasets/o/d": r"o/d: its name or README.md is not valid \(KeyError\('split'\)\)",
    }.items():
        with pytest.raises(DataError, match=said):
            list_files(address, None)
    hub.failures["/refs"] = (500, "")
    with pytest.raises(DataError, match=r"cannot be reached \(500\)"):
        list_files("hf://datasets/o/d@cleand", None)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = mock.patch.object(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with nowhere, pytest.raises(DataError, match=r"cannot be reached .*refused"):
            list_files("hf://datasets/o/d", None)
    with OFFLINE, pytest.raises(DataError, match="HF_HUB_OFFLINE forbids to ask the Hub; unset it"):
        list_files("hf://datasets/o/d", None)


# ---- copies ----------------------------------------------------------------------------------------------------------


def test_copies_are_made_once_and_found_again_offline(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[Event] = []
    old = hub.push("o/d", {"train-0.jsonl": jsonl(3), "train-1.jsonl": jsonl(2, 3)})
    first = fetch("hf://datasets/o/d", said.append)
    assert first.revision == old
    assert "".join(Path(file).read_text() for file in first.files) == jsonl(5)
    assert [event.text for event in said if isinstance(event, Message)] == [
        f"hf://datasets/o/d at {old[:12]}: 2 files, {first.size} bytes"
    ]
    hub.requests.clear()
    assert fetch("hf://datasets/o/d", said.append) == first
    assert not any("resolve" in request for request in hub.requests)

    hub.push("o/d", {"train-0.jsonl": jsonl(4)})
    assert fetch("hf://datasets/o/d", said.append, first) == first
    assert isinstance(said[-1], Message)
    assert said[-1].text.endswith(f"this run goes on with {old[:12]}")
    began = first.model_copy(update={"files": ()})
    monkeypatch.setenv("FULLTUNE_CACHE", str(Path(first.files[0]).parents[2] / "other"))
    again = fetch("hf://datasets/o/d", said.append, began)
    assert again.revision == old
    assert [Path(file).read_text() for file in again.files] == [Path(file).read_text() for file in first.files]
    with OFFLINE:
        assert fetch("hf://datasets/o/d", said.append) == again
    assert capsys.readouterr().err == ""


def test_packed_files_never_replace_others(hub: Hub) -> None:
    with zipfile.ZipFile(stream := io.BytesIO(), "w") as archive:
        archive.writestr("x.jsonl", jsonl(2))
    zipped, plain = stream.getvalue(), jsonl(3)
    files: dict[str, bytes | str]
    files = {"a/x.jsonl": plain, "a/x.jsonl.gz": gzip.compress(jsonl(4).encode()), "a.zip": zipped, "b/a.zip": zipped}
    hub.push("o/d", files)
    rows = sorted(Path(file).read_text().count("\n") for file in fetch("hf://datasets/o/d/**", print).files)
    assert rows == [2, 2, 3, 4]
    commit = hub.refs["o/d"]["refs/heads/main"]
    assert Path(hf_hub_download("o/d", "a/x.jsonl", repo_type="dataset", revision=commit)).read_text() == plain


def test_all_files_of_a_run_are_of_one_commit(hub: Hub, tmp_path: Path) -> None:
    old = hub.push("o/d", {"train.jsonl": jsonl(2), "test.jsonl": jsonl(2, 2)})
    data = {"train": "hf://datasets/o/d", "test": "hf://datasets/o/d@main/test.jsonl"}
    recipe = load_recipe(tiny.write_recipe(tmp_path / "recipe.yaml", "m", "x", data=data))

    def push(event: Event) -> None:
        hub.push("o/d", {"train.jsonl": jsonl(2, 2), "test.jsonl": jsonl(2)})

    sources = fetch_sources(recipe, tmp_path / "run", push)
    assert [source.revision for source in sources.values()] == [old, old]
    test = sources[data["test"]]
    assert Path(test.files[0]).read_text() == jsonl(2, 2)
    with OFFLINE:  # only what was copied at that commit
        assert fetch_sources(recipe, tmp_path / "run", push) == sources
        with pytest.raises(DataError, match="no copy is in the cache"):
            fetch(test.address, push, test.model_copy(update={"files": (), "revision": "0" * 40}))


def test_a_part_of_the_rows_and_columns_is_read(hub: Hub, tmp_path: Path) -> None:
    rows = [{**row, "number": number} for number, row in enumerate(tiny.topic_rows(10))]
    hub.push("o/d", {f"train-{part}.jsonl": lines(rows[5 * part : 5 * part + 5]) for part in (0, 1)})
    source = {"hub": "o/d", "split": "train[40%:]", "columns": ["text", "label"], "where": "number < 8"}
    recipe = load_recipe(tiny.write_recipe(tmp_path / "recipe.yaml", "m", "x", data={"train": source}))
    copies = fetch_sources(recipe, tmp_path / "run", lambda event: None)
    found = [row for _, row in find_source_files(recipe, copies)["train"].rows()]
    assert found == [{"text": row["text"], "label": row["label"]} for row in rows[4:8]]
    source["split"] = "train[5]"
    recipe = load_recipe(tiny.write_recipe(tmp_path / "recipe.yaml", "m", "x", data={"train": source}))
    with pytest.raises(DataError, match=r"hf://datasets/o/d\?split=train\[5\].*: expected a slice such as"):
        find_source_files(recipe, fetch_sources(recipe, tmp_path / "other", lambda event: None))


@pytest.mark.parametrize(
    ("data", "held_out"),
    [
        ({"train": "hf://datasets/o/d/data"}, "test.jsonl"),
        ({"train": "hf://datasets/o/d/data/*.jsonl"}, "test.jsonl"),
        ({"train": "hf://datasets/o/d/parts/**"}, "test"),
        ({"train": "rows.zip"}, "test.csv"),
        ({"train": {"hub": "o/d", "config": "mixed"}}, ""),
        ({"train": "hf://datasets/o/d/data/test.jsonl"}, ""),
        ({"train": {"hub": "o/d", "config": "own", "split": "test"}}, ""),
    ],
)
def test_held_out_files_of_an_address_are_not_trained_on(
    hub: Hub, tmp_path: Path, data: dict[str, Any], held_out: str
) -> None:
    parts = {"data/train.jsonl": jsonl(9), "data/test.jsonl": jsonl(9)}
    parts |= {f"parts/{split}/{part}.jsonl": jsonl(9) for split in ("train", "test") for part in (0, 1)}
    own = [{"split": split, "path": f"parts/{split}/*"} for split in ("train", "test")]
    configs = [{"config_name": "mixed", "data_files": "data/*"}, {"config_name": "own", "data_files": own}]
    hub.push("o/d", {**parts, "README.md": readme({"configs": configs})})
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.writestr("train.csv", "text,label\na,b\n")
        archive.writestr("test.csv", "text,label\na,b\n")
    recipe = load_recipe(tiny.write_recipe(tmp_path / "recipe.yaml", "m", "x", data=data))
    copies = fetch_sources(recipe, tmp_path / "run", lambda event: None)
    if not held_out:
        assert find_source_files(recipe, copies)["train"].files
        return
    with pytest.raises(DataError, match=f"is used for training but contains {held_out}, whose names suggest held-out"):
        find_source_files(recipe, copies)


def test_init_writes_the_splits_that_have_labels(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    test = [{**row, "label": -1} for row in tiny.topic_rows(4)]
    files = {"train": jsonl(30), "dev": jsonl(10, 30), "test": lines(test), "extra": jsonl(3)}
    configs = [
        {"config_name": name, "data_files": [{"split": split, "path": f"{split}.jsonl"} for split in files]}
        for name in ("no", "fr")
    ]
    contents = {f"{split}.jsonl": text for split, text in files.items()}
    hub.push("o/d", {**contents, "README.md": readme({"configs": configs})})
    result = fulltune("init", "o/d")
    assert result.code == 0, result.err
    text = Path("recipe.yaml").read_text()
    assert (
        """
  train: {hub: o/d, config: "no", split: train}
  # not used: split extra
  # not used: config fr
  # not used: test.jsonl: column 'label' is empty
  eval: {hub: o/d, config: "no", split: dev}
  # test rows are split off from train
"""
        in text
    )
    assert load_recipe(Path("recipe.yaml")).data.eval == "hf://datasets/o/d?config=no&split=dev"
    assert "1 file" in result.err
    for given, said in {
        "hf://datasets/o/d?config=xx": "has no config 'xx'; set config: to one of no, fr",
        "o/missing": "does not exist at",
        "ftp://x/a.csv": "unknown kind of address 'ftp://'",
        "data/x.csv": "no such file",
    }.items():
        result = fulltune("init", given, "--force")
        assert result.code in (2, 4)
        assert said in result.err
    Path("o").mkdir()
    assert "no such file" in fulltune("init", "o/d", "--force").err
    result = fulltune("init", f"hf://datasets/o/d@{hub.refs['o/d']['refs/heads/main']}/train*", "--force")
    assert "train*" in str(load_recipe(Path("recipe.yaml")).data.train), result.err


def test_a_recipe_with_a_mistake_can_be_corrected_in_the_same_run_folder(
    hub: Hub, tmp_path: Path, tiny_encoder: Path
) -> None:
    hub.push("o/d", {"train.jsonl": jsonl(30), "test.jsonl": jsonl(10, 30)})
    data = {"train": {"hub": "o/d"}, "test": {"hub": "o/d", "split": "tset"}}
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tiny_encoder, "x", data=data)
    command = ("data", recipe, "--run-folder", tmp_path / "run")
    result = fulltune(*command)
    assert result.code == 4
    assert result.problems[-1].endswith("has no split 'tset'; set split: to one of test, train")
    result = fulltune(*command, "--set", "data.test=o/d")
    assert result.code == 4
    assert result.problems[-1].endswith("for a data set on the Hub, write {hub: o/d}, or give the path of a file")
