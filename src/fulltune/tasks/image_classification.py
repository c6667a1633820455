from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import PurePath

import numpy as np

from fulltune.errors import DataError
from fulltune.models.pixels import CONTENT, PATH, PIXELS, ImageReader, decode_image, image_hash, split_image_value
from fulltune.recipe import tasks as recipe_tasks
from fulltune.recipe.data import DataBlock
from fulltune.records.data import Preview
from fulltune.tasks import (
    LENGTH,
    PLACE,
    Example,
    Refused,
    Row,
    RowExamples,
    RowFeatures,
    Target,
    Tensor,
    classes,
    labels,
)
from fulltune.tasks.columns import find_columns as columns_of_roles
from fulltune.tasks.labels import is_empty
from fulltune.tasks.padding import stack_labels

FACTS = recipe_tasks.FACTS["image-classification"]
find_columns = partial(columns_of_roles, ("image", "label"))
UNDECODABLE = "undecodable image"
"""Name of the check for undecodable images, which stop the data stage unless dropping is allowed."""
loss, count_items, reduce_logits = classes.loss, classes.count_items, classes.reduce_logits
metrics, answers = classes.metrics, classes.answers
metrics_from_sums, chance_loss = classes.metrics_from_sums, classes.chance_loss
with_placeholder_answer = classes.with_placeholder_label
row_labels, config_changes = labels.row_labels, classes.config_changes


def find_target(rows: Iterable[Row], columns: Mapping[str, str], data: DataBlock, file: str) -> Target:
    return labels.find_target(rows, columns, data.model_copy(update={"problem_type": "single_label"}), file)


def why_unusable(row: Row, target: Target) -> Refused | None:
    """Return the reason to drop a row without an image or a label, else None."""
    image = row.get(target.columns["image"])
    if not isinstance(image, (str, bytes, Mapping, type(None))):
        return Refused("no image", f"column '{target.columns['image']}' holds {type(image).__name__}, not an image")
    if split_image_value(image) == ("", b""):
        return Refused("no image", f"column '{target.columns['image']}' is empty")
    if is_empty(row.get(target.columns["label"])):
        return Refused("no label", f"column '{target.columns['label']}' is empty")
    return None


why_unanswerable = why_unusable


def group_key(row: Row, target: Target) -> str:
    return image_hash(*split_image_value(row.get(target.columns["image"])))


def encode(rows: Sequence[Row], target: Target, tokenizer: ImageReader, max_length: int) -> RowExamples:
    """Check that each image can be decoded, and make an example with the image's path or, without a path, its bytes."""
    ids = {name: position for position, name in enumerate(target.labels)}
    encoded = []
    for row in rows:
        path, content = split_image_value(row[target.columns["image"]])
        refused = None
        try:
            decode_image(path, content)
        except DataError as error:
            refused = Refused(UNDECODABLE, str(error))
        label = ids[row_labels(row, target)[0]]
        features = {PATH: path, CONTENT: content, "labels": label, LENGTH: tokenizer.num_patches}
        encoded.append([Example(features, trained_tokens=1, refused=refused)])
    return encoded


def preview(features: RowFeatures, target: Target, tokenizer: ImageReader) -> Preview:
    """Return the end of the image's path (or its size) with the label."""
    path, content = features[PATH], features[CONTENT]
    shown = _last_parts(path) if path else f"image of {len(content):,} bytes"
    return Preview.labelled(shown, classes.label_as_text(features["labels"], target))


def display_text(row: Row, target: Target) -> str:
    """Return the last two parts of the image's path, or the row's file and line."""
    value = row.get(target.columns["image"])
    path = value.get("path") if isinstance(value, Mapping) else value
    # Stored rows hold words instead of bytes, such as `<812 bytes>`.
    if isinstance(path, str) and path and not path.startswith("<"):
        return _last_parts(path)
    return str(row.get(PLACE, "image"))


def _last_parts(path: str) -> str:
    return "/".join(PurePath(path).parts[-2:])


def collate(features: Sequence[RowFeatures], pad_token_id: int) -> dict[str, Tensor]:
    """Stack the pixels and labels of decoded images."""
    import torch

    pixels = torch.from_numpy(np.stack([row[PIXELS] for row in features]))
    return {PIXELS: pixels, "labels": stack_labels(features)}


def full_row(target: Target, length: int) -> RowFeatures:
    return {"labels": 0}
