"""Images from folders and tables, decoded as the model's processor wants them; broken ones are found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from fulltune.data.readers.files import is_image_folder, list_images
from fulltune.data.readers.read import locate_data_files, resolve_image_paths
from fulltune.errors import DataError, SetupError
from fulltune.inference.run import RowSubset, positions_by_length
from fulltune.inference.store import Rows, make_record_batch, write_rows
from fulltune.models import base
from fulltune.models.base import Base
from fulltune.models.load import load_model
from fulltune.models.pixels import ImageReader, ImageRows, num_patches, split_image_value
from fulltune.recipe.data import DataBlock
from fulltune.recipe.model import ModelBlock
from fulltune.tasks import Target, image_classification
from tests import tiny

TARGET = Target("single_label", {"image": "image", "label": "label"}, ("cat", "dog"))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ImageReader:
    folder = tiny.save_image_model(tmp_path_factory.mktemp("vit"))
    return Base.from_block(ModelBlock(name=str(folder)), "image-classification").processor


def picture(path: Path, colour: tuple[int, ...] = (200, 100, 0), mode: str = "RGB", **save: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (20, 12), colour if mode == "RGB" else colour[0]).save(path, **save)
    return path


def encoded(row: Mapping[str, Any], reader: ImageReader) -> Any:
    [[example]] = image_classification.encode([{"label": "dog", **row}], TARGET, reader, 64)
    return example


# ---- files -----------------------------------------------------------------------------------------------------


def test_folder_of_class_folders_is_read_in_order(tmp_path: Path) -> None:
    for name in ("dog/2.png", "dog/10.JPG", "cat/1.webp"):
        picture(tmp_path / name)
    (tmp_path / "cat" / "notes.md").write_text("no image")
    picture(tmp_path / ".cache" / "thumbnail.png")
    assert is_image_folder(tmp_path)
    assert list(locate_data_files([str(tmp_path)]).rows()) == [
        ("cat/1.webp", {"image": str(tmp_path / "cat/1.webp"), "label": "cat"}),
        ("dog/10.JPG", {"image": str(tmp_path / "dog/10.JPG"), "label": "dog"}),
        ("dog/2.png", {"image": str(tmp_path / "dog/2.png"), "label": "dog"}),
    ]


def test_folder_with_a_table_beside_the_images_is_read_by_its_table(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n1.png,cat\n")
    assert not is_image_folder(tmp_path)
    assert not is_image_folder(tmp_path / "1.png")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("1.png", "images are directly in this folder; expected one folder per class"),
        ("train/cat/1.png", "train: contains no image, expected one folder per class"),
    ],
)
def test_images_that_are_not_in_one_folder_per_class_are_refused(tmp_path: Path, name: str, said: str) -> None:
    picture(tmp_path / name)
    assert is_image_folder(tmp_path)
    with pytest.raises(DataError) as caught:
        list_images(tmp_path)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("one.png", "/data/one.png"),
        ("/other/one.png", "/other/one.png"),
        ({"bytes": None, "path": "one.png"}, {"bytes": None, "path": "/data/one.png"}),
        ({"bytes": b"x", "path": "one.png"}, {"bytes": b"x", "path": "one.png"}),
        (b"x", b"x"),
        ("", ""),
    ],
)
def test_path_in_a_table_starts_at_its_folder(value: Any, expected: Any) -> None:
    row = {"Image": value, "label": "cat"}
    assert resolve_image_paths(row, Path("/data"), None) == {"Image": expected, "label": "cat"}
    assert resolve_image_paths({"file": value}, Path("/data"), "file") == {"file": expected}
    assert resolve_image_paths({"file": value}, Path("/data"), None) == {"file": value}


# ---- rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.png", ("a.png", b"")),
        (b"xy", ("", b"xy")),
        ({"bytes": b"xy", "path": "a.png"}, ("", b"xy")),
        ({"bytes": None, "path": "a.png"}, ("a.png", b"")),
        ({}, ("", b"")),
        (None, ("", b"")),
    ],
)
def test_cell_is_a_path_or_bytes(value: Any, expected: tuple[str, bytes]) -> None:
    assert split_image_value(value) == expected


def test_pixels_are_those_of_the_models_processor(tmp_path: Path, reader: ImageReader) -> None:
    folder = tiny.save_image_model(tmp_path / "vit")
    path = picture(tmp_path / "cat" / "1.png")
    content = path.read_bytes()
    rows = [dict(encoded({"image": image}, reader).features) for image in (str(path), content)]
    batch = image_classification.collate(ImageRows(rows, reader)[0:2], 0)
    expected = AutoImageProcessor.from_pretrained(folder, backend="pil")(Image.open(path), return_tensors="np")
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    for found in batch["pixel_values"].numpy():
        np.testing.assert_array_equal(found, expected["pixel_values"][0])
    assert batch["labels"].tolist() == [1, 1]
    assert rows[0]["length"] == reader.num_patches == 4


def test_same_file_under_two_names_is_a_duplicate(tmp_path: Path) -> None:
    one, two = picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    other = picture(tmp_path / "c.png", (1, 2, 3))
    keys = [image_classification.group_key({"image": str(path)}, TARGET) for path in (one, two, other)]
    assert keys[0] == keys[1] == image_classification.group_key({"image": one.read_bytes()}, TARGET)
    assert keys[2] != keys[0]


def test_classes_are_found_in_the_order_of_their_numbers() -> None:
    data = DataBlock(train="rows.csv")
    columns = {"image": "file_name", "label": "label"}
    rows = [{"file_name": "a", "label": label} for label in ("10", "9", "9.5")]
    assert image_classification.find_target(iter(rows), columns, data, "rows.csv").labels == ("9", "9.5", "10")


def test_preview_and_mistakes_name_the_file_and_its_folder(reader: ImageReader) -> None:
    features = {"path": "/far/away/dog/1.png", "content": b"", "labels": 1}
    shown = image_classification.preview(features, TARGET, reader)
    assert (shown.segments[0].text, shown.label) == ("dog/1.png", "dog")
    bare = image_classification.preview({"path": "", "content": b"12345", "labels": 0}, TARGET, reader)
    assert bare.segments[0].text == "image of 5 bytes"
    assert image_classification.display_text({"image": "/far/away/dog/1.png"}, TARGET) == "dog/1.png"
    held = {"image": "<5 bytes>", "fulltune:place": "rows.parquet:3"}
    assert image_classification.display_text(held, TARGET) == "rows.parquet:3"


# ---- model -----------------------------------------------------------------------------------------------------


def test_reader_of_a_saved_model_is_the_same(tmp_path: Path, reader: ImageReader) -> None:
    folder = tiny.save_image_model(tmp_path / "vit")
    reader.save_pretrained(tmp_path / "again")
    again = AutoImageProcessor.from_pretrained(tmp_path / "again", backend="pil")
    assert again.to_json_string() == reader.to_json_string()
    assert base.processor_fingerprint(reader) == reader.to_json_string()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(SetupError, match="the image processor cannot be read"):
        _ = Base.from_block(ModelBlock(name=str(folder)), "image-classification").processor


def test_head_for_other_classes_is_replaced(tmp_path: Path) -> None:
    """Most image models on the Hub come with a head for the 1,000 classes of ImageNet."""
    from transformers import ViTConfig, ViTForImageClassification

    folder = tiny.save_image_model(tmp_path / "vit")
    ViTForImageClassification(ViTConfig.from_pretrained(folder, num_labels=7)).save_pretrained(folder)
    base = Base.from_block(ModelBlock(name=str(folder)), "image-classification")
    changes = {"num_labels": 2, "id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    loaded: Any = load_model(base, changes, head_is_new=True)
    assert loaded.classifier.out_features == 2


def test_number_of_patches_is_read_from_the_config(reader: ImageReader) -> None:
    from transformers import SwinConfig, ViTConfig

    assert num_patches(ViTConfig(image_size=224, patch_size=16)) == 196
    assert num_patches(SwinConfig(image_size=[64, 32], patch_size=4)) == 128
    assert num_patches(object()) == 1


def test_missing_pillow_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.save_image_model(tmp_path / "vit")
    found = base.importlib.util.find_spec
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None if name == "PIL" else found(name))
    with pytest.raises(SetupError, match=r"pip install 'fulltune\[images\]'"):
        _ = Base.from_block(ModelBlock(name=str(folder)), "image-classification").processor


def test_lengths_are_known_without_decoding(tmp_path: Path, reader: ImageReader) -> None:
    rows = [{"path": f"missing{n}.png", "content": b"", "labels": n % 2, "length": 4} for n in range(3)]
    write_rows(tmp_path, [make_record_batch(rows, ["{}"] * 3)])
    opened = base.with_decoded_images(Rows(tmp_path), reader)
    assert positions_by_length(opened) == [0, 1, 2]
    assert positions_by_length(RowSubset(opened, [2, 0])) == [0, 1]
    assert opened["labels"].tolist() == [0, 1, 0]
    assert RowSubset(opened, [1, 0])["labels"].tolist() == [1, 0]
    with pytest.raises(DataError, match="no such file"):
        opened[1]
