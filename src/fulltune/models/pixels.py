from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.errors import DataError

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PretrainedConfig

PATH, CONTENT, PIXELS = "path", "content", "pixel_values"


@dataclass(frozen=True)
class ImageReader:
    """A model's image processor with the attributes of a tokenizer that fulltune uses."""

    processor: Any
    num_patches: int
    pad_token_id: int = 0

    @property
    def model_max_length(self) -> int:
        return self.num_patches

    def to_json_string(self) -> str:
        return str(self.processor.to_json_string())

    def save_pretrained(self, folder: str | Path, **_: object) -> None:
        self.processor.save_pretrained(folder)

    def shape(self) -> tuple[int, int, int]:
        """Return channels, height and width of a preprocessed image."""
        from PIL import Image

        blank = Image.new("RGB", (512, 512))
        channels, height, width = np.shape(self.processor(blank, return_tensors="np")[PIXELS][0])
        return channels, height, width

    def pixels(self, path: str, content: bytes) -> np.ndarray:
        """Decode and preprocess an image to float32 [channels, height, width], or raise `DataError`."""
        prepared = self.processor(decode_image(path, content), return_tensors="np")[PIXELS][0]
        return np.asarray(prepared, np.float32)


def num_patches(config: PretrainedConfig) -> int:
    image, patch = (np.broadcast_to(getattr(config, name, None) or 0, 2) for name in ("image_size", "patch_size"))
    return int(np.maximum(image // patch, 1).prod()) if patch.all() else 1


def split_image_value(value: Any) -> tuple[str, bytes]:
    """Split an image value (a path, bytes, or a dictionary with "path" or "bytes") into path and bytes, one of them
    empty."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "", bytes(value)
    return ("", b"") if value is None else (str(value).strip(), b"")


def decode_image(path: str, content: bytes) -> Image.Image:
    """Open an image from `content` or, if that is empty, `path`, as upright 8-bit RGB, or raise `DataError`."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow refuses only twice as many pixels
    try:
        # Opening a pipe waits for a writer, and some devices never end.
        if not content and Path(path).exists() and not Path(path).is_file():
            raise OSError("expected a file, found a folder, pipe or device")
        with Image.open(io.BytesIO(content) if content else path) as image:
            ImageOps.exif_transpose(image, in_place=True)  # a copy of a large image takes another 500 MB
            plain = _to_8_bits(image)
            return plain if plain.mode == "RGB" else plain.convert("RGB")
    # Pillow's parsers raise any exception on broken files.
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        name = f"{len(content)} bytes" if content else path
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{name}: no such file") from None
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # its text repeats the file's name
            text = "unknown image format"
        raise DataError(f"{name}: cannot be decoded: {text[:200]}") from None


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Keep the upper 8 bits of a 16-bit image, because Pillow would turn most values white; raise `ValueError` for 32
    bits."""
    from PIL import Image

    # Older versions of Pillow open 16-bit images in mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its values have 32 bits (mode {image.mode}), so the values of black and white are unknown")
    return image


class ImageRows(Sequence[dict[str, Any]]):
    """Prepared rows whose images are decoded when a row is indexed: `rows[i]["pixel_values"]`."""

    def __init__(self, rows: Any, reader: ImageReader) -> None:
        self.rows, self.reader = rows, reader

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        """Return a row with its decoded image, a list of rows for a slice, or a column for a name."""
        if isinstance(key, str):
            return [row[key] for row in self.rows] if isinstance(self.rows, list) else self.rows[key]
        if isinstance(key, slice):
            return [self[i] for i in range(len(self))[key]]
        row = dict(self.rows[key])
        return {PIXELS: self.reader.pixels(row.pop(PATH), row.pop(CONTENT)), **row}


def image_hash(path: str, content: bytes) -> str:
    """Return the SHA-256 of `content`, of the file at `path` if `content` is empty, or of the path itself if the file
    is unreadable."""
    try:
        content = content or Path(path).read_bytes()
    except OSError:
        content = path.encode()
    return hashlib.sha256(content).hexdigest()
