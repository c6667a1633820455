"""Images of unusual kinds are decoded upright in their colour; what no image should be is refused with its name."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fulltune.errors import DataError
from fulltune.models import pixels

COLOUR = (200, 10, 30)


def saved(image: Any, kind: str = "png", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, values: bytes, *extra: bytes) -> bytes:
    """A PNG in RGB that says of itself what is given, whatever its pixels are."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", zlib.compress(values)) + chunk(b"IEND", b"")


def _whole() -> dict[str, bytes]:
    """Each is red, 6 wide and 4 high."""
    red, green = Image.new("RGB", (6, 4), COLOUR), Image.new("RGB", (6, 4), (0, 255, 0))
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = {"save_all": True, "append_images": [green] * 3}
    return {
        "RGBA": saved(Image.new("RGBA", (6, 4), (*COLOUR, 0))),
        "CMYK": saved(red.convert("CMYK"), "jpeg", quality=100),
        "palette with a transparent colour": saved(red.quantize(4), transparency=0),
        "animated gif": saved(red, "gif", **frames),
        "animated webp": saved(red, "webp", lossless=True, **frames),
        "pages": saved(red, "tiff", **frames),
        "turned jpeg": saved(red.rotate(90, expand=True), "jpeg", quality=100, exif=turned),
        "turned png": saved(red.rotate(90, expand=True), exif=turned),
        "damaged EXIF": saved(red, "jpeg", quality=100, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
        "trailing bytes": saved(red) + b"\0" * 5000,
    }


def _bad() -> dict[str, bytes]:
    content = saved(Image.effect_noise((40, 40), 60))
    return {
        "zero bytes": b"",
        "truncated": content[:200],
        "60,000 x 60,000": png(60_000, 60_000, bytes(1000)),
        "65,500 x 65,500 gif": b"GIF89a" + struct.pack("<HH", 65_500, 65_500) + b"\0\0\0;",
        "no pixels": png(0, 0, b""),
        "13,000 x 13,000 of a few bytes": png(13_000, 13_000, bytes(100)),
        "text that unpacks to 100 MB": png(6, 4, bytes(76), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),
        "a page": b"<html><body>404 Not Found</body></html>",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n",
        "numbers without a range": saved(Image.fromarray(np.full((4, 6), 0.5, np.float32)), "tiff"),
    }


WHOLE, BAD = _whole(), _bad()


@pytest.mark.parametrize("kind", WHOLE)
def test_an_unusual_image_is_decoded_upright_in_its_colour(kind: str) -> None:
    image = pixels.decode_image("", WHOLE[kind])
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert all(abs(one - two) <= 4 for one, two in zip(image.getpixel((3, 2)), COLOUR, strict=True))


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_an_image_of_16_bits_keeps_its_greys(kind: str) -> None:
    content = saved(Image.fromarray(np.full((4, 6), 55 * 257, np.uint16)), kind)
    assert pixels.decode_image("", content).getpixel((3, 2)) == (55, 55, 55)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_refused_with_its_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(BAD[kind])
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded: "):
        pixels.decode_image(str(path), b"")
