"""Files that are named train, dev or test: what `init` makes of them, and what a recipe must not train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from fulltune.cli.init import assign_files_to_splits, write_recipe
from fulltune.data.readers.files import group_files_by_split
from fulltune.data.sources import find_source_files
from fulltune.errors import DataError
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import load_recipe
from tests import tiny


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.tsv", "train"),
        ("sst2_Train.csv", "train"),
        ("train-00000-of-00001.parquet", "train"),
        ("dev.tsv", "eval"),
        ("VALID.json", "eval"),
        ("val-0.csv", "eval"),
        ("test.tsv", "test"),
        ("train_test.csv", "test"),
        ("testset.csv", "test"),
        ("testset_w_refs.csv", "test"),
        ("held-out.jsonl", "test"),
        ("test-00000-of-00001-b42a775f407cee45.parquet", "test"),
        ("dev_matched.tsv", "eval"),
        ("test_data.csv", "test"),
        ("my_evaluation_data_v2.csv", "eval"),
        ("training-set.csv", "train"),
        ("test-driven-design.jsonl", None),
        ("test_pilots_of_old.jsonl", None),
        ("contest.csv", None),
        ("devices.csv", None),
    ],
)
def test_split_is_a_word_of_the_name_but_not_of_a_title(name: str, split: str | None) -> None:
    assert Path(name) in group_files_by_split([Path("train.csv"), Path(name)])[split]


def _folder(folder: Path, *names: str) -> Path:
    for place, name in enumerate(names):
        rows = [{**row, "text": f"{row['text']} of {place}"} for row in tiny.topic_rows(20)]
        tiny.write_csv(folder / name, rows)
    return folder


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        (("Train.csv", "TEST.csv"), "", (["Train.csv"], None, "TEST.csv")),
        (("a.csv", "b.csv", "test.csv"), "", (["a.csv", "b.csv"], None, "test.csv")),
        (("train-0.csv", "train-1.csv"), "", (["train-0.csv", "train-1.csv"], None, None)),
        (("a.csv", "b.csv"), "", ([""], None, None)),
        (("trainset.csv", "devset.csv", "testset.csv"), "", (["trainset.csv"], "devset.csv", "testset.csv")),
        (("moby_dick.csv", "training_manual.csv", "essays.csv"), "", ([""], None, None)),
        (("moby_dick.csv", "crash_test.csv", "test_pilots.csv"), "", ([""], None, None)),
        (("reviews.csv", "reviews_test.csv"), "", (["reviews.csv"], None, "reviews_test.csv")),
        (("my_training.csv", "my_test.csv"), "", (["my_training.csv"], None, "my_test.csv")),
        (("train.csv", "dev.csv", "test.csv"), "train.csv", (["train.csv"], "dev.csv", "test.csv")),
        (("my_train.csv", "my_valid.csv", "other_test.csv"), "my_train.csv", (["my_train.csv"], "my_valid.csv", None)),
        (("reviews.csv", "test.csv"), "reviews.csv", (["reviews.csv"], None, None)),
    ],
)
def test_files_of_a_folder_and_beside_a_file_are_found_by_name(
    tmp_path: Path, names: tuple[str, ...], given: str, expected: tuple[list[str], str | None, str | None]
) -> None:
    train, *held_out = expected
    splits = assign_files_to_splits(_folder(tmp_path, *names) / given)
    named = zip(("eval", "test"), held_out, strict=True)
    assert splits[0] == tuple(tmp_path / name for name in train)
    assert splits[1] == {split: tmp_path / name for split, name in named if name}


@pytest.mark.parametrize("has_mark", [False, True])
def test_folders_named_for_splits_are_taken_as_these(tmp_path: Path, has_mark: bool) -> None:
    for name in ("train", "validation", "test", "more"):
        (tmp_path / name).mkdir()
        _folder(tmp_path, f"{name}/rows.csv")
    if has_mark:  # as DatasetDict.save_to_disk writes it
        (tmp_path / "dataset_dict.json").write_text("{}")
    recipe, files = write_recipe(tmp_path, tmp_path / "recipe.yaml", None, False)
    data = load_recipe(tmp_path / "recipe.yaml").data
    assert (recipe.num_rows, files[2]) == (20, ("more: its name does not mention train, eval or test",))
    assert data.train == (f"{tmp_path}/train",)
    assert (data.eval, data.test) == (f"{tmp_path}/validation", f"{tmp_path}/test")
    with pytest.raises(DataError, match=rf"{tmp_path}: is used for training but contains validation, test, whose"):
        find_source_files(_recipe(tmp_path), {})
    if not has_mark:
        _folder(tmp_path, "rows.csv")
        assert assign_files_to_splits(tmp_path) == ((tmp_path,), {}, ())


@pytest.mark.parametrize("inner", ["cat", ""])
def test_folders_of_images_are_splits_only_if_they_hold_classes(tmp_path: Path, inner: str) -> None:
    for name in ("train", "test"):
        (tmp_path / name / inner).mkdir(parents=True)
        (tmp_path / name / inner / "1.png").write_bytes(b"")
    expected = ((tmp_path / "train",), {"test": tmp_path / "test"}, ()) if inner else ((tmp_path,), {}, ())
    assert assign_files_to_splits(tmp_path) == expected


def test_file_that_says_nothing_beside_train_is_named(tmp_path: Path) -> None:
    splits = assign_files_to_splits(_folder(tmp_path, "train.csv", "labels.csv", "test.csv"))
    unused = ("labels.csv: its name does not mention train, eval or test",)
    assert splits == ((tmp_path / "train.csv",), {"test": tmp_path / "test.csv"}, unused)


def test_two_files_for_the_same_held_out_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"expected one file of eval rows, found dev.csv, val.csv; choose one with --eval FILE"
    ):
        assign_files_to_splits(_folder(tmp_path, "train.csv", "dev.csv", "val.csv"))


def test_init_leaves_out_test_rows_without_labels_and_says_so(tmp_path: Path) -> None:
    _folder(tmp_path, "train.csv", "dev.csv")
    tiny.write_csv(tmp_path / "test.csv", [{"index": "0", "text": "soup"}])
    recipe = tmp_path / "new" / "recipe.yaml"
    written, files = write_recipe(tmp_path, recipe, None, False)
    assert (written.files.where, written.num_rows) == ("train.csv", 20)
    assert files[2] == ("test.csv: has no column 'label', which the train file has",)
    data = load_recipe(recipe).data
    assert (data.train, data.eval, data.test) == ((str(tmp_path / "train.csv"),), str(tmp_path / "dev.csv"), None)
    assert "# not used: test.csv: has no column 'label', which the train file has" in recipe.read_text()


def test_init_writes_no_number_that_the_plan_chooses(tmp_path: Path) -> None:
    write_recipe(_folder(tmp_path, "rows.csv") / "rows.csv", recipe := tmp_path / "recipe.yaml", None, False)
    for name in ("learning_rate", "num_train_epochs", "global_batch_size"):
        assert f"{name}:" not in recipe.read_text()


def test_folder_with_test_rows_is_not_trained_on(tmp_path: Path) -> None:
    _folder(tmp_path, "train.csv", "dev.csv", "test.csv")
    with pytest.raises(DataError) as refusal:
        find_source_files(_recipe(tmp_path), {})
    assert refusal.value.problems == (
        f"{tmp_path}: is used for training but contains dev.csv, test.csv, whose names suggest held-out rows; set "
        "data.train to the other files, and data.eval or data.test to these files",
    )


def test_corpus_with_words_of_splits_in_its_titles_is_trained_on(tmp_path: Path) -> None:
    names = ["moby_dick.csv", "model_evaluation.csv", "test-driven-design.csv"]
    _folder(tmp_path, *names)
    assert [file.name for file in find_source_files(_recipe(tmp_path), {})["train"].files] == names


def test_folder_of_shards_and_a_file_that_the_recipe_names_are_trained_on(tmp_path: Path) -> None:
    _folder(tmp_path / "shards", "train-0.csv", "train-1.csv", "more.csv")
    _folder(tmp_path, "test.csv")
    files = find_source_files(_recipe(tmp_path / "shards", tmp_path / "test.csv"), {})
    assert [file.name for file in files["train"].files] == ["more.csv", "train-0.csv", "train-1.csv", "test.csv"]


def _recipe(*train: Path) -> Recipe:
    data = {"train": [str(path) for path in train]}
    return Recipe.model_validate({"model": "m", "task": "text-classification", "data": data})
