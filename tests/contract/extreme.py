"""Data files that are made to be too much: pictures that unpack to gigabytes, lines of 50 MB, folders in circles.

The cases are judged as those of `malformed.py`: each row is used as it was written, or listed, or the file is refused
with its name and what to do. On top, a case has seconds, and memory of a few times its size. Huge texts are made when
they are written, never stored; `size_bytes` says how large they are.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import resource
import signal
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests import tiny
from tests.contract import malformed
from tests.contract.malformed import CLASSES, NUM_ROWS, Case, Flaw, Written

FORMS = ("image folder", "image table", "packed", "declared", "long text", "long json", "encoding", "places")
"""Kinds of cases, each as often as the others."""
MOST_SECONDS, SECONDS_PER_MB = 20, 10
"""On a slow machine that is busy: what takes the square of its size takes hours."""
ADDRESS_SPACE_BYTES = 12 * 10**9
FREE_BYTES = 250 * 2**20
"""Libraries that are loaded, buffers, the rows that are no larger than others."""
BOMB_BYTES = 256 * 2**20
"""Parquet that unpacks to more, and to 200 times its size, is refused."""
BYTES_PER_BYTE, BYTES_PER_TOKEN = 40, 120
"""Of memory for each byte of a file: JSON of single digits, lists or keys takes most. Where all of a text is tokenised,
each byte is a token of the test tokenizers, and a number of Python."""
MOST_COLUMNS = 100_000
LONG_MESSAGE = 6_000


# ---- pictures --------------------------------------------------------------------------------------------------

RED, GREEN = (200, 10, 30), (0, 255, 0)


def _saved(image: Any, kind: str = "png", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes, *extra: bytes) -> bytes:
    """A PNG in RGB that says of itself what is given, whatever its pixels are."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + _chunk(b"IDAT", zlib.compress(pixels)) + _chunk(b"IEND", b"")


def whole_pictures(draw: random.Random) -> dict[str, tuple[bytes, str]]:
    """Unusual images that can be decoded: each is red, 6 wide and 4 high; and the suffix that fits."""
    import numpy as np
    from PIL import Image

    red, green = Image.new("RGB", (6, 4), RED), Image.new("RGB", (6, 4), GREEN)
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = {"save_all": True, "append_images": [green] * 3}
    noise = np.full((4, 6), draw.randrange(256), np.uint16) * 257
    pictures = {
        "RGBA": (_saved(Image.new("RGBA", (6, 4), (*RED, 0))), "png"),
        "CMYK": (_saved(red.convert("CMYK"), "jpeg", quality=100), "jpg"),
        "palette": (_saved(red.quantize(4)), "png"),
        "palette with a transparent colour": (_saved(red.quantize(4), transparency=0), "png"),
        "animated gif": (_saved(red, "gif", **frames), "gif"),
        "animated png": (_saved(red, "png", **frames), "png"),
        "animated webp": (_saved(red, "webp", lossless=True, **frames), "webp"),
        "pages": (_saved(red, "tiff", **frames), "tif"),
        "turned jpeg": (_saved(red.rotate(90, expand=True), "jpeg", quality=100, exif=turned), "jpg"),
        "turned png": (_saved(red.rotate(90, expand=True), exif=turned), "PNG"),
        "damaged EXIF": (_saved(red, "jpeg", quality=100, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), "jpeg"),
        "wrong extension": (_saved(red, "bmp"), "jpg"),
        "trailing bytes": (_saved(red) + b"\0" * 5000, "png"),
        "16 bit grey png": (_saved(Image.fromarray(noise)), "png"),
        "16 bit grey tiff": (_saved(Image.fromarray(noise), "tiff"), "tiff"),
        "1 bit": (_saved(Image.new("1", (6, 4), 1)), "png"),
    }
    return pictures


def bad_pictures(draw: random.Random) -> dict[str, bytes]:
    """Images that cannot be decoded, or that hold what no image is."""
    import numpy as np
    from PIL import Image

    content = _saved(Image.frombytes("RGB", (40, 40), draw.randbytes(4800)))
    photo = _saved(Image.frombytes("RGB", (40, 40), draw.randbytes(4800)), "jpeg")
    damaged = bytearray(content)
    for place in range(60, 100):
        damaged[place] ^= 0x5A
    return {
        "zero bytes": b"",
        "truncated png": content[: draw.randrange(9, len(content) - 20)],
        "truncated jpeg": photo[: draw.randrange(3, len(photo) * 3 // 4)],
        "60,000 x 60,000": png(60_000, 60_000, bytes(1000)),
        "65,500 x 65,500 gif": b"GIF89a" + struct.pack("<HH", 65_500, 65_500) + b"\0\0\0;",
        "no pixels": png(0, 0, b""),
        "13,000 x 13,000 of a few bytes": png(13_000, 13_000, bytes(100)),
        "text that unpacks to 100 MB": png(6, 4, bytes(76), _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),
        "corrupt chunks": bytes(damaged),
        "a chunk of 2 GB": content[:33] + struct.pack(">I", 2**31 - 1) + b"tEXt" + content[41:],
        "a page": b"<html><body>404 Not Found</body></html>",
        "a vector image": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n",
        "numbers without a range": _saved(Image.fromarray(np.full((4, 6), 0.5, np.float32)), "tiff"),
    }


def _image_folder(draw: random.Random, folder: Path) -> Case:
    path = folder / "rows"
    case = Case(folder, "image-classification", path, "images", {"undecodable_images": draw.choice(("drop", "error"))})
    drops = case.settings["undecodable_images"] == "drop"
    odd = draw.choice(("x y", "été", "-rf", "#1 %s {0}", "a\nb", "'quoted\"", "[1]", "a" * 200, "😀", "con", "$(id)"))
    whole = whole_pictures(draw)
    for number in range(24):
        label = ("cat", "dog", odd)[number % 3]
        content, suffix = malformed._picture(draw), "png"
        name = draw.choice((f"{number}", f"{number} é", f"{number}\n", f"#{number}%20", f"--{number}"))
        if draw.random() < 0.3:
            what = draw.choice(list(whole))
            content, suffix = whole[what]
            content += b"" if what == "trailing bytes" else bytes(number + 1)  # no image stands twice
            case.oddities.append(what)
        file = path / label / f"{name}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        case.rows.append(Written(str(file), label, f"{label}/{file.name}"))
    bad = bad_pictures(draw)
    for _ in range(draw.choice((0, 1, 2, 3))):
        row = malformed._pick(draw, case.rows)
        row.lost = draw.choice(list(bad))
        Path(row.text).write_bytes(bad[row.lost])
    if draw.random() < 0.3:
        row = malformed._pick(draw, case.rows)
        row.lost = draw.choice(("a pipe", "a circle of links", "a device"))
        _odd_file(Path(row.text), row.lost)
    case.most_lost = 24 if drops else 0
    case.refusals += [Flaw(row.lost, row.place) for row in case.rows if row.lost and not drops]
    _odd_folders(draw, case)
    return case


def _odd_file(file: Path, kind: str) -> None:
    """What is no file of bytes, in the place of one."""
    file.unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a device":
        file.symlink_to("/dev/zero")
    else:
        other = file.with_name(f".{file.name}")
        other.symlink_to(file.name)
        file.symlink_to(other.name)


def _odd_folders(draw: random.Random, case: Case) -> None:
    """Folders that lead back to themselves, and such without an image."""
    path = case.path
    kinds: dict[str, Callable[[], Any]] = {
        "a class in a circle": lambda: (path / "cat" / "again").symlink_to("../cat"),
        "a circle to the top": lambda: (path / "cat" / "up").symlink_to(".."),
        "a folder named as an image": lambda: (path / "cat" / "inner.png").mkdir(),
        "a link to itself": lambda: (path / "loop").symlink_to("loop"),
        "hidden": lambda: (path / ".empty").mkdir(),
    }
    for what in draw.sample(list(kinds), 1 if draw.random() < 0.4 else 0):
        kinds[what]()
        case.oddities.append(what)
    if draw.random() < 0.15:
        (path / "empty class").mkdir()
        if draw.random() < 0.5:
            (path / "empty class" / "notes.txt").write_text("later")
        case.refusals = [Flaw("a class without an image", "empty class")]


def _image_table(draw: random.Random, folder: Path) -> Case:
    """A table of images that names them, or holds them."""
    import pyarrow as pa
    from pyarrow import parquet

    holds = draw.random() < 0.5
    path = folder / ("rows.parquet" if holds else "rows.jsonl")
    drops = draw.random() < 0.5
    case = Case(folder, "image-classification", path, "pictures", {"undecodable_images": "drop" if drops else "error"})
    cells: list[Any] = []
    for number in range(NUM_ROWS):
        content, file = malformed._picture(draw), folder / f"{number}.png"
        file.write_bytes(content)
        written = f"<{len(content)} bytes>" if holds else str(file)
        case.rows.append(Written(written, ("cat", "dog")[number % 2], f"{path.name}:{number + 1}"))
        cells.append(content if holds else file.name)
    bad = bad_pictures(draw)
    for _ in range(draw.choice((0, 1, 2, 3))):
        row = malformed._pick(draw, case.rows)
        number = case.rows.index(row)
        others = () if holds else ("a pipe", "a circle of links", "a device", "a folder", "a name of 5,000")
        row.lost = draw.choice((*bad, *others))
        if row.lost in bad:
            cells[number] = bad[row.lost] if holds else cells[number]
            (folder / f"{number}.png").write_bytes(bad[row.lost])
        elif row.lost == "a folder":
            cells[number] = "."
        elif row.lost == "a name of 5,000":
            cells[number] = "n" * 5000 + ".png"
        else:
            _odd_file(folder / f"{number}.png", row.lost)
        # A table that holds no bytes in a cell has no image there: such rows are listed as empty.
        if not drops and not (holds and row.lost == "zero bytes"):
            case.refusals.append(Flaw(row.lost, row.place))
    case.most_lost = malformed.MOST_LOST + (NUM_ROWS if drops else 0)
    labels = [row.label for row in case.rows]
    if holds:
        parquet.write_table(pa.table({"image": pa.array(cells, pa.binary()), "label": labels}), path)
    else:
        rows = [json.dumps({"image": cell, "label": label}) for cell, label in zip(cells, labels, strict=True)]
        path.write_text("\n".join(rows) + "\n")
    return case


# ---- packed, and declared --------------------------------------------------------------------------------------


def _rows(suffix: str) -> tuple[list[Written], list[tuple[str, str]]]:
    """Plain rows of text and label, each with its place, and the same as cells."""
    first = 2 if suffix in ("csv", "tsv") else 1
    words = CLASSES["words"]
    rows = [
        Written(f"the {tiny.WEATHER[i % 4]} number {i}", words[i % 3], f"rows.{suffix}:{i + first}")
        for i in range(NUM_ROWS)
    ]
    return rows, [(str(row.text), str(row.label)) for row in rows]


def _csv(cells: Sequence[tuple[str, str]], header: str = "text,label") -> bytes:
    return "\n".join([header, *(f"{text},{label}" for text, label in cells), ""]).encode()


def _packed(draw: random.Random, folder: Path, size_bytes: int) -> Case:
    """Rows that are compressed, under the name of what they hold, or their own."""
    _, cells = _rows("csv")
    plain = _csv(cells)
    nested = gzip.compress(gzip.compress(bz2.compress(plain)))
    kinds: dict[str, tuple[str, bytes]] = {
        "gz": (".gz", gzip.compress(plain)),
        "bz2": (".bz2", bz2.compress(plain)),
        "xz": (".xz", lzma.compress(plain)),
        "zst": (".zst", b"\x28\xb5\x2f\xfd" + plain),
        "zip": (".zip", _zip({"rows.csv": plain})),
        "gz in gz": (".gz", nested),
        "zip in zip": (".zip", _zip({"in.zip": _zip({"in.zip": _zip({"rows.csv": plain})})})),
        "a gz that unpacks to much": (".gz", gzip.compress(bytes(10 * size_bytes))),
        "a bz2 that unpacks to much": (".bz2", bz2.compress(b"a" * size_bytes)),
        "a zip that unpacks to much": (".zip", _zip({"rows.csv": bytes(10 * size_bytes)})),
        "a cut gz": (".gz", gzip.compress(plain)[:20]),
    }
    what = draw.choice(list(kinds))
    ending, content = kinds[what]
    name = draw.choice((f"rows.csv{ending}", f"rows{ending}", "rows.csv", "rows.jsonl", "rows.txt", "rows.conll"))
    is_text = name.endswith(".txt")
    case = Case(folder, "causal-lm" if is_text else "text-classification", folder / name, "words", rows=[])
    if name.endswith(".conll"):
        case.task, case.kind = "token-classification", "tags"
    case.path.write_bytes(content)
    case.oddities.append(what)
    case.refusals.append(Flaw(what, name))
    if name == f"rows.csv{ending}" and draw.random() < 0.5:  # beside rows that can be read
        case.path = folder / "rows"
        case.path.mkdir()
        (folder / name).rename(case.path / name)
        (case.path / "more.csv").write_bytes(plain)
    return case


def _zip(files: dict[str, bytes]) -> bytes:
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return buffer.getvalue()


def _varint(number: int) -> bytes:
    """A number as parquet's footer holds it: zigzag, seven bits a byte."""
    number, parts = number << 1, b""
    while number > 127:
        parts, number = parts + bytes([number & 127 | 128]), number >> 7
    return parts + bytes([number])


def _declared(draw: random.Random, folder: Path, size_bytes: int) -> Case:
    """Tables that say that they hold much more than they do, or unpack to much more than they are."""
    import pyarrow as pa
    from pyarrow import feather, parquet

    suffix = draw.choice(("parquet", "parquet", "arrow", "feather"))
    rows, cells = _rows(suffix)
    case = Case(folder, "text-classification", folder / f"rows.{suffix}", rows=rows)
    texts, labels = [text for text, _ in cells], [label for _, label in cells]
    kind = draw.choice(("number", "number", "a cell that unpacks to much", "a column that unpacks to much", "as many"))
    columns: dict[str, Any] = {"text": texts, "label": labels}
    if kind == "a cell that unpacks to much":
        row = rows[draw.randrange(NUM_ROWS)]
        row.text = "rain " * (size_bytes * 8 // 5)
        texts[rows.index(row)] = row.text
        case.unpacked_bytes = len(row.text)
    elif kind == "a column that unpacks to much":
        # In a dictionary, equal texts would stand once.
        columns["note"] = pa.array([f"{i}" + "0" * (size_bytes * 8 // NUM_ROWS) for i in range(NUM_ROWS)])
        case.unpacked_bytes = size_bytes * 8
    case.oddities.append(kind)
    table = pa.table(columns)
    if suffix == "parquet":
        is_dictionary = draw.random() < 0.5
        parquet.write_table(table, case.path, compression="zstd", use_dictionary=is_dictionary)
    elif suffix == "feather":
        feather.write_feather(table, case.path, compression="zstd")
    else:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.OSFile(str(case.path), "wb") as file, pa.ipc.new_file(file, table.schema, options=options) as writer:
            writer.write_table(table)
    if suffix == "parquet" and case.unpacked_bytes > max(BOMB_BYTES, 200 * case.path.stat().st_size):
        case.refusals.append(Flaw(kind, case.path.name))
    if kind == "number":
        case.is_wild = True
        content = case.path.read_bytes()
        change = _in_footer if suffix == "parquet" else _in_buffers
        case.path.write_bytes(change(draw, case, content))
    return case


def _in_footer(draw: random.Random, case: Case, content: bytes) -> bytes:
    """One of the sizes in parquet's footer becomes absurd."""
    from pyarrow import parquet

    meta = parquet.read_metadata(case.path).row_group(0)
    size = struct.unpack("<I", content[-8:-4])[0]
    footer = content[-8 - size : -8]
    column = meta.column(draw.randrange(2))
    numbers = {
        "rows": meta.num_rows,
        "bytes": meta.total_byte_size,
        "packed": column.total_compressed_size,
        "unpacked": column.total_uncompressed_size,
    }
    what = draw.choice(list(numbers))
    places = [i for i in range(len(footer)) if footer.startswith(_varint(numbers[what]), i)]
    place = draw.choice(places)
    absurd = _varint(draw.choice((10**6, 2**31 - 1, 2**40, 2**61)))
    footer = footer[:place] + absurd + footer[place + len(_varint(numbers[what])) :]
    case.oddities.append(f"{what} in the footer")
    return content[: -8 - size] + footer + struct.pack("<I", len(footer)) + content[-4:]


def _in_buffers(draw: random.Random, case: Case, content: bytes) -> bytes:
    """A compressed buffer says that it unpacks to very much."""
    frame = b"\x28\xb5\x2f\xfd"
    places = [i for i in range(8, len(content)) if content.startswith(frame, i)]
    place = draw.choice(places)
    absurd = struct.pack("<q", draw.choice((2**33, 2**40, 2**62, -5)))
    return content[: place - 8] + absurd + content[place:]


# ---- long ------------------------------------------------------------------------------------------------------


def _long_text(draw: random.Random, folder: Path, size_bytes: int) -> Case:
    suffix = draw.choice(("csv", "csv", "tsv", "txt", "conll"))
    if suffix == "txt":
        return _long_lines(draw, folder, size_bytes)
    if suffix == "conll":
        return _long_sentence(draw, folder, size_bytes)
    rows, cells = _rows(suffix)
    case = Case(folder, "text-classification", folder / f"rows.{suffix}", rows=rows)
    sign = "," if suffix == "csv" else "\t"
    kind = draw.choice(("cell", "word", "doubled", "open", "columns", "twice", "blank", "header", "name", "spaces"))
    number = draw.randrange(1, NUM_ROWS)
    row, label = rows[number], cells[number][1]
    head = f"text{sign}label"
    wide = max(10, size_bytes // 60)
    case.oddities.append(kind)
    lines = [f"{text}{sign}{label}" for text, label in cells]
    match kind:
        case "cell":
            row.text = "rain " * (size_bytes // 5) + "end"
        case "word":
            row.text = "a" * size_bytes
        case "doubled":
            row.text = '"' * (size_bytes // 2)
        case "open":
            lines[0] = f'"{lines[0]}'
            lines[-1] += " rain" * (size_bytes // 5)
            case.refusals.append(Flaw(kind, f"rows.{suffix}:2"))
        case "columns" | "twice":
            names = [f"c{i}" for i in range(wide)]
            if wide > MOST_COLUMNS:
                case.refusals.append(Flaw("too many columns", f"rows.{suffix}:1"))
            if kind == "twice":
                names[-1] = names[-2]
                case.refusals.append(Flaw(kind, f"rows.{suffix}:1"))
            head = sign.join([head, *names])
            lines = [line + sign * wide for line in lines]
        case "blank":
            lines[number] += "\n" * size_bytes
            for later in rows[number + 1 :]:
                later.place = f"rows.{suffix}:{int(later.place.partition(':')[2]) + size_bytes}"
        case "header":
            head, lines = sign.join(["c"] * (size_bytes // 2)), []
            case.refusals.append(Flaw(kind, f"rows.{suffix}:1"))
        case "name":
            head = f"text{sign}{'n' * size_bytes}"
            case.refusals.append(Flaw(kind, f"rows.{suffix}"))
        case _:
            row.text, row.lost = " " * size_bytes, "blank"
    if kind in ("cell", "word", "doubled", "spaces"):
        lines[number] = '"' + row.text.replace('"', '""') + f'"{sign}{label}'
    case.path.write_bytes("\n".join([head, *lines, ""]).encode())
    return case


def _long_lines(draw: random.Random, folder: Path, size_bytes: int) -> Case:
    rows, _ = _rows("txt")
    case = Case(folder, "causal-lm", folder / "rows.txt", "raw text", {"packing": False, "text_rows": "line"}, rows)
    number = draw.randrange(NUM_ROWS)
    kind = draw.choice(("line", "word", "blank"))
    case.oddities.append(kind)
    for row in rows:
        row.label = None
    long = {"line": "rain " * (size_bytes // 5) + "end", "word": "é" * (size_bytes // 2)}
    rows[number].text = long.get(kind, rows[number].text)
    lines = [row.text for row in rows]
    if kind == "blank":
        lines[number] += "\n" * size_bytes
        for later in rows[number + 1 :]:
            later.place = f"rows.txt:{int(later.place.partition(':')[2]) + size_bytes}"
    case.path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return case


def _long_sentence(draw: random.Random, folder: Path, size_bytes: int) -> Case:
    case = Case(folder, "token-classification", folder / "rows.conll", "tags")
    number = draw.randrange(1, NUM_ROWS)
    kind = draw.choice(("word", "sentence", "tag", "columns"))
    case.oddities.append(kind)
    lines: list[str] = []
    for i in range(NUM_ROWS):
        words, tags = ["Anna", "sees", f"w{i}"], ["B-PER", "O", "O"]
        row = Written(words, tags, f"rows.conll:{len(lines) + 1}")
        if i == number and kind == "word":
            words[1] = "a" * size_bytes
        elif i == number and kind == "sentence":
            words += ["x"] * (size_bytes // 4)
            tags += ["O"] * (size_bytes // 4)
        elif i == number and kind in ("tag", "columns"):
            tags[1] = "O" * size_bytes if kind == "tag" else "O " * (size_bytes // 2) + "O"
            case.refusals.append(Flaw(kind, f"rows.conll:{len(lines) + 2}" if kind == "columns" else "rows.conll"))
        lines += [*(f"{word} {tag}" for word, tag in zip(words, tags, strict=True)), ""]
        case.rows.append(row)
    case.path.write_text("\n".join(lines))
    return case


def _long_json(draw: random.Random, folder: Path, size_bytes: int) -> Case:
    suffix = draw.choice(("jsonl", "jsonl", "json"))
    rows, cells = _rows(suffix)
    case = Case(folder, "text-classification", folder / f"rows.{suffix}", rows=rows)
    objects = [json.dumps({"text": text, "label": label}) for text, label in cells]
    number = draw.randrange(1, NUM_ROWS)
    row, bare = rows[number], objects[number][:-1]
    deep, many = min(size_bytes, 100_000), size_bytes // 4
    ways: dict[str, tuple[Callable[[], str], str]] = {
        # What stands in the row, and whether the row is used, lost, or the file refused.
        "text": (lambda: bare + "}", "used"),
        "escapes": (lambda: bare + "}", "used"),
        "note": (lambda: f'{bare}, "note": "{"x" * size_bytes}"}}', "used"),
        "numbers": (lambda: f'{bare}, "note": [{"1," * many}1]}}', "used"),
        "lists": (lambda: f'{bare}, "note": [{"[]," * many}1]}}', "used"),
        "keys": (lambda: bare + "".join(f', "k{i}": 0' for i in range(many // 3)) + "}", "used"),
        "a key twice": (
            lambda: bare + "".join(f', "k{i}": 0' for i in range(many // 3)) + f', "k{many // 3 - 1}": 1}}',
            "refused",
        ),
        "a key": (lambda: f'{bare}, "{"k" * size_bytes}": 1}}', "used"),
        "deep": (lambda: f'{bare}, "note": {"[" * deep}{"]" * deep}}}', "refused"),
        "deep objects": (lambda: bare + ', "note": ' + '{"a":' * deep + "1" + "}" * deep + "}", "refused"),
        "deep and open": (lambda: f'{bare}, "note": {"[" * deep}', "refused"),
        "digits": (lambda: f'{bare}, "note": {"1" * size_bytes}}}', "refused"),
        "a fraction": (lambda: f'{bare}, "note": 0.{"1" * size_bytes}}}', "used"),
        "an open text": (lambda: f'{bare}, "note": "{"x" * size_bytes}', "refused"),
        "spaces": (lambda: bare + " " * size_bytes + "}", "used"),
        "label list": (lambda: f'{{"text": "{row.text}", "label": [{"1," * many}1]}}', "used"),
    }
    kind = draw.choice(list(ways))
    case.oddities.append(kind)
    if kind in ("text", "escapes"):
        row.text = "rain " * (size_bytes // 5) + "end" if kind == "text" else "é" * (size_bytes // 6)
        bare = json.dumps({"text": row.text, "label": row.label})[:-1]
    if kind == "label list":
        case.kind = "multi_label"
        for one in rows:
            one.label = [one.label]
        row.label = ["1"]
    make, end = ways[kind]
    objects[number] = make()
    if end == "refused":
        # Of a whole JSON document, the line is the parser's.
        case.refusals.append(Flaw(kind, row.place if suffix == "jsonl" else f"rows.{suffix}"))
    case.path.write_text("\n".join([*objects, ""]) if suffix == "jsonl" else "[" + ",\n".join(objects) + "]")
    return case


# ---- encodings -------------------------------------------------------------------------------------------------


def _encoding(draw: random.Random, folder: Path, size_bytes: int) -> Case:
    suffix = draw.choice(("csv", "jsonl", "txt"))
    rows, cells = _rows(suffix)
    case = Case(folder, "text-classification", folder / f"rows.{suffix}", rows=rows)
    if suffix == "txt":
        case.task, case.kind = "causal-lm", "raw text"
        case.settings |= {"packing": False, "text_rows": "line"}
        for row in rows:
            row.label = None
    number = draw.randrange(1, NUM_ROWS - 1)
    row = rows[number]
    damage = {
        "NUL": b"a\0b",
        "latin-1": "café".encode("latin-1"),
        "gb18030": "天气很好".encode("gb18030"),
        "shift-jis": "天気".encode("shift-jis"),
        "utf-16": "weather".encode("utf-16"),
        "utf-32": "weather".encode("utf-32"),
        "overlong": b"\xc0\x80",
        "half a character": b"\xed\xa0\xbd",
        "cut": "😀".encode()[:3],
        "beyond unicode": b"\xf4\x90\x80\x80",
    }
    harmless = {
        "a mark inside": "a \ufeff b",
        "separators": "a \u2028 b \u2029 c \x85 d",
        "right to left": "a \u202e b",
        "not a character": "a \ufffe b \uffff c",
        "private": "a \U0010ffff b \ue000",
    }
    kind = draw.choice([*damage, *harmless, "a mark at a line", "a mark and a quote", "utf-16 at the end", "dos end"])
    case.oddities.append(kind)
    lines = [_line(suffix, text, label) for text, label in cells]
    if kind in damage:
        lines[number] = lines[number].replace(b"number", damage[kind])
        case.refusals.append(Flaw(kind, row.place))
    elif kind in harmless:
        row.text = f"{harmless[kind]} {row.text}"
        lines[number] = _line(suffix, row.text, cells[number][1])
    elif kind == "a mark at a line":
        lines[number] = b"\xef\xbb\xbf" + lines[number]
        row.text = f"\ufeff{row.text}"
        if suffix == "jsonl":
            case.refusals.append(Flaw(kind, row.place))
    elif kind == "a mark and a quote":
        lines[number] = b'\xef\xbb\xbf"a text",food' if suffix == "csv" else b'\xef\xbb\xbf"a text"'
        row.text = '\ufeff"a text"'
        if suffix != "txt":
            case.refusals.append(Flaw(kind, row.place))
    elif kind == "utf-16 at the end":
        lines.append("more weather".encode("utf-16"))
        case.refusals.append(Flaw(kind, f"rows.{suffix}:{len(lines) + (suffix == 'csv')}"))
    else:
        lines.append(b"\x1a")
        if suffix == "txt":
            rows.append(Written("\x1a", None, f"rows.txt:{len(lines)}"))
        else:
            case.refusals.append(Flaw(kind, f"rows.{suffix}:{len(lines) + (suffix == 'csv')}"))
    # Far into the file, decoders work block by block.
    filler = [_line(suffix, "rain " * 200 + str(i), "food") for i in range(draw.choice((0, 0, size_bytes // 1000)))]
    for i, line in enumerate(filler):
        place = f"rows.{suffix}:{i + 1 + (suffix == 'csv')}"
        text = line.decode().partition(",")[0] if suffix != "jsonl" else json.loads(line)["text"]
        rows.insert(i, Written(text, None if suffix == "txt" else "food", place))
    for row in rows[len(filler) :]:
        row.place = _further(row.place, len(filler))
    case.refusals = [Flaw(flaw.what, _further(flaw.place, len(filler))) for flaw in case.refusals]
    head = [b"text,label"] if suffix == "csv" else []
    case.path.write_bytes(b"\n".join([*head, *filler, *lines, b""]))
    return case


def _line(suffix: str, text: str, label: str) -> bytes:
    if suffix == "jsonl":
        return json.dumps({"text": text, "label": label}, ensure_ascii=False).encode()
    return (f"{text},{label}" if suffix == "csv" else text).encode()


def _further(place: str, lines: int) -> str:
    name, _, line = place.partition(":")
    return f"{name}:{int(line) + lines}"


# ---- places ----------------------------------------------------------------------------------------------------


def _places(draw: random.Random, folder: Path) -> Case:
    """What stands under a data file's name and is none, alone or beside one."""
    rows, cells = _rows("csv")
    alone = draw.random() < 0.5
    name = draw.choice(("odd.csv", "odd.jsonl", "odd.parquet", "odd.json", "odd.conll", "odd.txt"))
    kind = draw.choice(("a pipe", "a circle of links", "a device", "a folder", "a link to its folder", "gone"))
    case = Case(folder, "text-classification", folder / name if alone else folder / "rows", rows=[] if alone else rows)
    inside = folder if alone else case.path
    inside.mkdir(exist_ok=True)
    file = inside / name
    if kind == "a folder":
        file.mkdir()
    elif kind == "a link to its folder":
        file.symlink_to(".")
    elif kind == "gone":
        file.symlink_to("nowhere.csv")
    else:
        _odd_file(file, kind)
    case.oddities.append(f"{kind} {name}")
    if alone:
        case.refusals.append(Flaw(kind, name))
        return case
    (inside / "rows.csv").write_bytes(_csv(cells))
    if not name.endswith(".txt"):  # which is not taken from a folder
        case.refusals.append(Flaw(kind, name))
    return case


# ---- cases -----------------------------------------------------------------------------------------------------


def size_bytes_of(seed: int) -> int:
    """Most cases are small, one in five of a form has 2 MB, one in sixty 50 MB."""
    number = seed // len(FORMS)
    return 50_000_000 if number % 60 == 59 else 2_000_000 if number % 5 == 4 else 200_000


def make(seed: int, folder: Path, size_bytes: int | None = None) -> Case:
    """The case of a seed, written into an empty folder."""
    size_bytes = size_bytes or size_bytes_of(seed)
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    match FORMS[seed % len(FORMS)]:
        case "image folder":
            return _image_folder(draw, folder)
        case "image table":
            return _image_table(draw, folder)
        case "packed":
            return _packed(draw, folder, size_bytes)
        case "declared":
            return _declared(draw, folder, size_bytes)
        case "long text":
            return _long_text(draw, folder, size_bytes)
        case "long json":
            return _long_json(draw, folder, size_bytes)
        case "encoding":
            return _encoding(draw, folder, size_bytes)
        case _:
            return _places(draw, folder)


@dataclass(frozen=True)
class Result:
    """What became of a case in a process of its own."""

    problems: tuple[str, ...]
    """What is wrong with it; empty: nothing."""
    end: str
    """read, refused, killed or hang."""
    seconds: float
    peak_bytes: int
    """Memory beyond what the process had when it began."""


def size_of(path: Path) -> int:
    """Bytes of a file, or of a folder's files; what is no file counts nothing."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file())


def run_forked(case: Case, processors: dict[str, Any], most_seconds: float | None = None) -> Result:
    """The data stage on a case in a forked process, which is killed when its time is over."""
    answer = case.folder / "answer.json"
    size = max(size_of(case.path), case.unpacked_bytes)
    most_seconds = most_seconds or MOST_SECONDS + SECONDS_PER_MB * size / 10**6
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            answer.write_text(json.dumps(_judged(case, processors, size)))
        finally:
            os._exit(0)
    status: int | None = None
    while status is None and time.monotonic() - start < most_seconds:
        done, found = os.waitpid(child, os.WNOHANG)
        status = found if done else None
        time.sleep(0.005)
    seconds = time.monotonic() - start
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return Result((f"hang: not done after {most_seconds:.0f} s",), "hang", seconds, 0)
    if not answer.exists():
        return Result((f"killed: wait status {status}",), "killed", seconds, 0)
    return Result(**json.loads(answer.read_text()), seconds=seconds)


def _judged(case: Case, processors: dict[str, Any], size: int) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = 0

    def measure() -> None:
        nonlocal peak
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024

    outcome = malformed.run_here(case, processors, measure)
    # Signs of no width or no meaning are not what every tokenizer keeps; the texts are compared as they stand.
    outcome = replace(outcome, used=tuple((place, text, label, None) for place, text, label, _ in outcome.used))
    problems = [problem[-1500:] for problem in malformed.judge(case, outcome)]
    long = [line for line in outcome.problems if len(line) > LONG_MESSAGE]
    problems += [f"a message of {len(line):,} characters: {line[:300]}" for line in long]
    is_tokenised = case.kind in ("raw text", "tags")
    if not outcome.crash and peak > FREE_BYTES + (BYTES_PER_TOKEN if is_tokenised else BYTES_PER_BYTE) * size:
        problems.append(f"{peak / 2**20:.0f} MiB of memory for {size / 2**20:.1f} MiB of file")
    end = "crash" if outcome.crash else "refused" if outcome.problems else "read"
    return {"problems": problems, "end": end, "peak_bytes": peak}
