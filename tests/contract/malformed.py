"""Data files with flaws, composed at random, and what must become of them.

A case is a file or folder whose rows are known, with flaws of known effect: a row is used with exactly the text and
label that were written, or it is listed with its place; a file that cannot be read right is refused with its name, the
line where there is one, and what to do. `judge` compares. `bench/malformed_files.py` makes thousands of them.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from fulltune.tasks import PLACE
from tests import tiny

FORMS = (
    *("csv", "tsv", "json", "jsonl", "parquet", "arrow", "feather"),
    *("txt", "conll", "images", "chat", "questions"),
)
"""Formats, each as often as the others."""
KINDS = ("words", "numbers", "regression", "multi_label")
CLASSES = {"words": ("food", "weather", "été"), "numbers": ("0", "1", "2"), "multi_label": ("a", "b c", "ü")}
NUM_ROWS = 48
MOST_LOST = 2
"""Of so many rows, the 5 % that may be listed and left out before the file is refused."""
_TO_DO = re.compile(
    r"\b(save|put|rename|remove|repair|give|name|set|write|close|download|copy|add|change|raise|leave|restore|choose|export)\b",
    re.I,
)
_LINE_END = re.compile("\r\n|\n|\r")


@dataclass
class Written:
    """A row of a case."""

    text: Any
    label: Any
    place: str = ""
    lost: str = ""
    """Why it must not be used; empty: it must be, as it was written."""


@dataclass(frozen=True)
class Flaw:
    """Something for which the file must be refused."""

    what: str
    place: str = ""
    """What the message must hold: file and line, or the file."""


@dataclass
class Case:
    """A data file, or folder, in a folder of its own."""

    folder: Path
    task: str
    path: Path
    kind: str = "words"
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[Written] = field(default_factory=list)
    refusals: list[Flaw] = field(default_factory=list)
    oddities: list[str] = field(default_factory=list)
    """What is unusual and harmless."""
    most_lost: int = MOST_LOST
    is_wild: bool = False
    """Bytes were changed at random: nobody knows which rows are still right."""

    def __str__(self) -> str:
        lost = [f"{row.place} {row.lost}" for row in self.rows if row.lost]
        return f"{self.path.name} ({self.kind}): {[flaw.what for flaw in self.refusals]} {lost} {self.oddities}"


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    crash: str = ""
    problems: tuple[str, ...] = ()
    """Of a refusal."""
    used: tuple[tuple[str, Any, Any, str | None], ...] = ()
    """Place, text, label and decoded tokens of each row; None where its tokens are not the whole text."""
    listed: tuple[tuple[str, str], ...] = ()
    """Place and reason."""


# ---- the oracle ------------------------------------------------------------------------------------------------


def judge(case: Case, outcome: Outcome) -> list[str]:
    """What is wrong with an outcome; empty: nothing."""
    if outcome.crash:
        return [f"crash: {outcome.crash}"]
    return _judge_refusal(case, outcome.problems) if outcome.problems else _judge_use(case, outcome)


def _judge_refusal(case: Case, problems: Sequence[str]) -> list[str]:
    found = []
    lost = [row for row in case.rows if row.lost]
    due = list(case.refusals)
    if len(lost) > case.most_lost:
        due += [Flaw("too many rows are lost", row.place) for row in lost]
    if not due and not case.is_wild:
        found.append(f"refused, though nothing is wrong with the file: {problems[0]}")
    everything = "\n".join(problems)
    if due and not case.is_wild and not any(_stands_in(flaw.place, everything) for flaw in due):
        found.append(f"no place is named, expected one of {[flaw.place for flaw in due][:5]}: {everything}")
    found += [f"the file is not named: {line}" for line in problems if case.path.stem not in line]
    # A list of places has one line about all of them, before or after it.
    if not any(_TO_DO.search(line) for line in (problems[0], problems[-1])):
        found.append(f"not said what to do: {everything}")
    found += [f"not said what was expected: {line}" for line in problems[:1] if not re.search("expected|; |: ", line)]
    return found


def _stands_in(place: str, text: str) -> bool:
    return re.search(rf"{re.escape(place)}(?!\d)", text) is not None


def _judge_use(case: Case, outcome: Outcome) -> list[str]:
    if case.is_wild:
        return []
    found = [f"accepted, though: {flaw.what}" for flaw in case.refusals]
    written = {row.place: row for row in case.rows}
    listed = dict(outcome.listed)
    used = {place: (text, label, tokens) for place, text, label, tokens in outcome.used}
    lost = [row for row in case.rows if row.lost]
    if len(lost) > case.most_lost:
        found.append(f"accepted, though {len(lost)} rows are lost")
    found += [f"{place}: neither used nor listed" for place in written if place not in used and place not in listed]
    found += [f"{place}: used and listed" for place in used if place in listed]
    found += [f"{place}: nobody wrote this row" for place in (*used, *listed) if place not in written]
    found += [f"{place}: listed without a reason" for place, reason in listed.items() if not reason]
    for place, row in written.items():
        if place in listed and not row.lost:
            found.append(f"{place}: left out ({listed[place]}), though nothing is wrong with it")
        if place not in used:
            continue
        text, label, tokens = used[place]
        if row.lost:
            found.append(f"{place}: used, though: {row.lost}")
        elif text != row.text:
            found.append(f"{place}: text {text!r}, written {row.text!r}")
        elif label != row.label:
            found.append(f"{place}: label {label!r}, written {row.label!r}")
        elif tokens is not None and tokens != row.text:
            found.append(f"{place}: tokens say {tokens!r}, written {row.text!r}")
    return found


# ---- rows ------------------------------------------------------------------------------------------------------

_ODD_TEXTS: dict[str, Callable[[str], str]] = {
    "comma": lambda text: f"{text}, and more; yes",
    "quotes": lambda text: f'he said "{text}" twice',
    "line end": lambda text: f"{text}\nsecond line",
    "windows line end": lambda text: f"{text}\r\nsecond line",
    "tab": lambda text: f"{text}\tand a tab",
    "emoji": lambda text: f"{text} 😀👩\u200d🚀",
    "right to left": lambda text: f"{text} שלום مرحبا",
    "far planes": lambda text: f"{text} 𠀀 \U0010fffd",
    "combining": lambda text: f"{text} e\u0301\u0323",
    "line separator": lambda text: f"{text}\u2028and \x85 more",
    "backslash": lambda text: f"{text} \\n \\ud83d \\",
    "long": lambda text: f"{text} {'rain ' * 400}",
    "looks like JSON": lambda text: f'{{"{text}": [1]}}',
    "looks like a number": lambda text: f"1e999 {text}",
    "zero width": lambda text: f"{text}\u200b",
    "byte order mark": lambda text: f"{text}\ufeff",
}


def _rows(draw: random.Random, kind: str, one_line: bool = False) -> list[Written]:
    rows = []
    for number in range(NUM_ROWS):
        text = f"the {draw.choice(tiny.WEATHER)} in the {draw.choice(tiny.PLACES)} number {number}"
        if draw.random() < 0.2:
            text = _ODD_TEXTS[draw.choice(list(_ODD_TEXTS))](text)
        if one_line:
            text = " ".join(text.split())
        rows.append(Written(text, _label(draw, kind, number)))
    return rows


def _label(draw: random.Random, kind: str, number: int) -> Any:
    if kind == "regression":
        return round(draw.uniform(-5, 5), 3) + 0.0005
    if kind == "multi_label":
        classes = CLASSES[kind]
        return sorted({classes[number % 3], classes[(number // 3) % 3]})
    return CLASSES[kind][number % 3]


def _pick(draw: random.Random, rows: list[Written]) -> Written:
    return draw.choice([row for row in rows if not row.lost])


def _count(draw: random.Random, most: int) -> int:
    """Mostly no or one flaw, sometimes several."""
    return min(most, draw.choice((0, 0, 1, 1, 1, 2, 2, 3, 5)))


# ---- separated -------------------------------------------------------------------------------------------------


def _separated(draw: random.Random, folder: Path, suffix: str) -> Case:
    kind = draw.choice(KINDS)
    case = Case(folder, "text-classification", folder / f"rows.{suffix}", kind, rows=_rows(draw, kind))
    sign = "," if suffix == "csv" else "\t"
    end = draw.choice(("\n", "\r\n"))
    header = ["text", "label"]
    extra = draw.choice(("", "", "id", "Text", "LABEL"))
    if extra:
        header.insert(draw.randrange(3), extra)
        case.oddities.append(f"column {extra}")
    cells: dict[int, dict[str, str]] = {}
    for row in case.rows:
        label = json.dumps(row.label) if kind == "multi_label" else str(row.label)
        cells[id(row)] = {"text": row.text, "label": label, extra: draw.choice(("", "7", "x, y", "é"))}
    for _ in range(_count(draw, 5)):
        row = _pick(draw, case.rows)
        _lose_cell(draw, kind, row, cells[id(row)])
    lines: list[str] = []
    broken = {id(_pick(draw, case.rows)) for _ in range(_count(draw, 3))} if draw.random() < 0.35 else set()
    line = 2
    for row in case.rows:
        text = _record([cells[id(row)][name] for name in header], sign, end)
        row.place = f"{case.path.name}:{line}"
        if id(row) in broken:
            text = _break_record(draw, case, row, text, sign, end)
        if draw.random() < 0.03:
            text += end
            case.oddities.append("blank line")
        lines.append(text)
        line += len(_LINE_END.findall(text))
    head = sign.join(header) + end
    content = (head + "".join(lines)).encode("utf-8", "surrogateescape")
    if draw.random() < 0.2:
        content = _damage_text(draw, case, content, header, sign, end)
    _finish_text(draw, case, content)
    return case


def _lose_cell(draw: random.Random, kind: str, row: Written, cells: dict[str, str]) -> None:
    ways = {
        "empty text": {"text": ""},
        "blank text": {"text": " \u00a0\u3000 "},
        "text without width": {"text": "\u200b\u2060\ufeff \u200d"},
    }
    if kind == "multi_label":
        ways |= {"half a list": {"label": draw.choice(('["a"', '["a", "b c"', "a]", "[", '["a" "b c"]', "[a]"))}}
    else:
        ways |= {"empty label": {"label": draw.choice(("", "  "))}}
    if kind == "regression":
        ways |= {"no 32 bits": {"label": draw.choice(("1e39", "-1e999", "inf", "nan", "-Infinity", "9" * 400))}}
    row.lost, change = draw.choice(list(ways.items()))
    cells.update(change)


def _record(cells: Sequence[str], sign: str, end: str) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=sign, lineterminator=end).writerow(cells)
    text = buffer.getvalue()
    return text


def _break_record(draw: random.Random, case: Case, row: Written, text: str, sign: str, end: str) -> str:
    bare = text.removesuffix(end)
    is_quoted = '"' in bare
    ways = ["too many", "too few", "NUL", "not UTF-8"] + ([] if is_quoted else ["open quote"])
    match draw.choice(ways):
        case "too many":
            case.refusals.append(Flaw("too many cells", row.place))
            return bare + sign + "x" + end
        case "too few":
            case.refusals.append(Flaw("too few cells", row.place))
            return "only one cell" + end
        case "NUL":
            case.refusals.append(Flaw("NUL", row.place))
            return "\0" + text
        case "not UTF-8":
            case.refusals.append(Flaw("not UTF-8", row.place))
            return "caf\udce9 " + text
        case _:
            case.refusals.append(Flaw("open quote", row.place))
            return '"' + text


def _damage_text(draw: random.Random, case: Case, content: bytes, header: Sequence[str], sign: str, end: str) -> bytes:
    name = case.path.name
    head, body = content.split(end.encode(), 1)
    kind = draw.choice(("utf-16", "utf-16-le", "empty", "header", "twice", "delimiter", "names", "nul", "wild"))
    if kind == "wild":
        return _scramble(draw, case, content)
    case.refusals.append(
        Flaw(kind, f"{name}:1" if kind in ("utf-16", "utf-16-le", "twice", "delimiter", "nul") else name)
    )
    match kind:
        case "utf-16" | "utf-16-le":
            return content.decode("utf-8", "replace").encode(kind)
        case "empty":
            return b""
        case "header":
            return head + end.encode()
        case "twice":
            return sign.join([*header[1:], header[-1]]).encode() + end.encode() + body
        case "delimiter":
            # With as many semicolons as the header they would be rows.
            return (";".join(header) + end + (";".join("abcd"[: len(header) + 1]) + end) * 40).encode()
        case "names":
            return sign.join(f"c{number}" for number, _ in enumerate(header)).encode() + end.encode() + body
        case _:
            return bytes(len(content))


def _scramble(draw: random.Random, case: Case, content: bytes) -> bytes:
    """A cut, or changed bytes."""
    case.is_wild = True
    if draw.random() < 0.5:
        case.oddities.append("cut")
        return content[: draw.randrange(len(content))]
    case.oddities.append("changed bytes")
    changed = bytearray(content)
    for _ in range(draw.choice((1, 3, 30))):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def _finish_text(draw: random.Random, case: Case, content: bytes) -> None:
    if draw.random() < 0.15 and not case.refusals:
        content = b"\xef\xbb\xbf" + content
        case.oddities.append("byte order mark")
    if draw.random() < 0.15 and content.endswith(b"\n") and not content.endswith((b"\n\n", b"\r\n\r\n")):
        content = content.rstrip(b"\r\n")
        case.oddities.append("no line end at the end")
    case.path.write_bytes(content)


# ---- JSON ------------------------------------------------------------------------------------------------------

_DEEP = "[" * 300 + "]" * 300
_HALF = ('"\\ud83d"', '"bad \\ude00 one"', '"\\uD800\\u0041"')


def _json(draw: random.Random, folder: Path, suffix: str) -> Case:
    kind = draw.choice(KINDS)
    case = Case(folder, "text-classification", folder / f"rows.{suffix}", kind, rows=_rows(draw, kind))
    is_ascii = draw.random() < 0.5
    cells: dict[int, dict[str, str]] = {}
    for row in case.rows:
        label = int(row.label) if kind == "numbers" and draw.random() < 0.3 else row.label
        cells[id(row)] = {
            name: json.dumps(value, ensure_ascii=is_ascii) for name, value in (("text", row.text), ("label", label))
        }
    for _ in range(_count(draw, 5)):
        row = _pick(draw, case.rows)
        _lose_value(draw, kind, row, cells[id(row)])
    for _ in range(_count(draw, 5)):  # harmless: nobody reads these
        odd = draw.choice(
            (*_HALF, _DEEP, "1" + "0" * 400, "NaN", "-Infinity", "1e999", '{"a": ["\\ud800"]}', '"\\u0000"')
        )
        name = draw.choice(("note", "id", "x\\ud800", "Text", "😀"))
        if name not in cells[id(row := draw.choice(case.rows))]:
            cells[id(row)][name] = odd
            case.oddities.append(f"{name}: {odd[:20]}")
    broken = {id(_pick(draw, case.rows)) for _ in range(_count(draw, 3))} if draw.random() < 0.35 else set()
    objects: list[str] = []
    line = 1
    for number, row in enumerate(case.rows, start=1):
        text = "{" + ", ".join(f'"{name}": {value}' for name, value in cells[id(row)].items()) + "}"
        row.place = f"{case.path.name}:{line if suffix == 'jsonl' else number}"
        if id(row) in broken:
            text = _break_object(draw, case, row, text, suffix)
        if suffix == "jsonl" and draw.random() < 0.03:
            text += "\n  "
            case.oddities.append("blank line")
        objects.append(text)
        line += text.count("\n") + 1
    whole = "\n".join(objects) + "\n"
    if suffix == "json":
        indent = draw.choice(("", "\n", "\n  "))
        whole = "[" + f",{indent}".join(objects) + "]"
        if draw.random() < 0.3:
            whole = '{"version": 1, "data": ' + whole + "}"
    content = whole.encode("utf-8", "surrogateescape")
    if draw.random() < 0.1:
        content = _scramble(draw, case, content)
    elif draw.random() < 0.1:
        kinds = {"utf-16": whole.encode("utf-16", "replace"), "empty": b"", "nul": bytes(500), "number": b"17\n"}
        what, content = draw.choice(list(kinds.items()))
        case.refusals.append(Flaw(what, case.path.name))
    _finish_text(draw, case, content)
    return case


def _lose_value(draw: random.Random, kind: str, row: Written, cells: dict[str, str]) -> None:
    ways: dict[str, tuple[str, str | None]] = {
        "half a character": ("text", draw.choice(_HALF)),
        "null": ("text", "null"),
        "no such key": ("text", None),
        "a list": ("text", '["a"]'),
        "an object": ("text", '{"a": 1}'),
        "deep": ("text", _DEEP),
        "empty": ("text", '"  "'),
        "without width": ("text", '"\\u200b"'),
        "null label": ("label", "null"),
        "no label": ("label", None),
        "deep label": ("label", _DEEP),
        "half a character in the label": ("label", f"[{_HALF[0]}]" if kind == "multi_label" else _HALF[1]),
    }
    if kind == "regression":
        ways |= {"no 32 bits": ("label", draw.choice(("1e39", "1e999", "-Infinity", "1" + "0" * 400, '"inf"', "NaN")))}
    row.lost, (name, value) = draw.choice(list(ways.items()))
    if value is None:
        del cells[name]
    else:
        cells[name] = value


def _break_object(draw: random.Random, case: Case, row: Written, text: str, suffix: str) -> str:
    ways = {
        "cut": text[: draw.randrange(2, len(text) - 1)].rstrip(" "),
        "comma": text[:-1] + ",}",
        "a list": "[1, 2]",
        "a number": "17",
        "a key twice": text[:-1] + ', "k": 1, "k": 2}',
        "control": text[:-1] + ', "k": "a\tb"}',
        "NUL": text[:-1] + ', "k": "a\0b"}',
        "not UTF-8": text[:-1] + ', "k": "caf\udce9"}',
        "single quotes": "{'text': 'a'}",
        "too deep": "[" * 100_000,
        "digits": text[:-1] + ', "k": ' + "1" * 5000 + "}",
    }
    what = draw.choice(list(ways))
    # Of a whole JSON document, the line is the parser's, and what stands twice or is too deep has none.
    case.refusals.append(Flaw(what, row.place if suffix == "jsonl" else case.path.name))
    return ways[what]


# ---- tables ----------------------------------------------------------------------------------------------------


def _table(draw: random.Random, folder: Path, suffix: str, wild: bool) -> Case:
    import pyarrow as pa
    from pyarrow import feather, parquet

    kind = draw.choice(KINDS)
    case = Case(folder, "text-classification", folder / f"rows.{suffix}", kind, rows=_rows(draw, kind))
    for number, row in enumerate(case.rows, start=1):
        row.place = f"{case.path.name}:{number}"
    texts: list[Any] = [row.text.encode() for row in case.rows]
    labels: list[Any] = [row.label for row in case.rows]
    for _ in range(_count(draw, 5)):
        row = _pick(draw, case.rows)
        ways: dict[str, Any] = {
            "null": None,
            "not UTF-8": b"caf\xe9",
            "half a character": b"\xed\xa0\xbd",
            "blank": b" ",
        }
        row.lost = draw.choice(["null label", *ways] if kind != "regression" else ["null label", "no 32 bits", *ways])
        if row.lost == "null label":
            labels[case.rows.index(row)] = None
        elif row.lost == "no 32 bits":
            labels[case.rows.index(row)] = draw.choice((1e39, float("inf"), float("nan"), -1e300))
        else:
            texts[case.rows.index(row)] = ways[row.lost]
    form = draw.choice((pa.binary(), pa.string(), pa.large_string(), pa.large_binary()))
    is_large = form in (pa.large_string(), pa.large_binary())
    text = pa.array(texts, pa.large_binary() if is_large else pa.binary()).view(form)
    if draw.random() < 0.2 and not any(row.lost in ("not UTF-8", "half a character") for row in case.rows):
        text = text.dictionary_encode()
    case.oddities.append(str(text.type))
    metadata: dict[bytes, bytes] = {}
    if kind == "numbers" and draw.random() < 0.5:
        names = list(CLASSES["words"])
        features = {"label": {"_type": "ClassLabel", "names": names}}
        metadata[b"huggingface"] = json.dumps({"info": {"features": features}}).encode()
        case.oddities.append("class names")
        for row in case.rows:
            row.label = names[int(row.label)]
    label = pa.array(labels) if kind != "numbers" else pa.array([None if x is None else int(x) for x in labels])
    if kind == "numbers" and not metadata:
        label = label.cast(draw.choice((pa.int8(), pa.int64(), pa.float32(), pa.string())))
    if kind == "words" and draw.random() < 0.3:
        label = label.cast(pa.binary())
    columns = [("text", text), ("label", label)]
    for name in draw.sample(list(_odd_columns()), _count(draw, 3)):
        columns.insert(draw.randrange(len(columns) + 1), (name, _odd_columns()[name]))
        case.oddities.append(name)
    if draw.random() < 0.1 and suffix != "feather":  # which refuses to write this
        columns.append((draw.choice(("label", "text")), label))
        case.refusals.append(Flaw("a column twice", case.path.name))
    if draw.random() < 0.05:
        columns = [(f"c{number}", column) for number, (_, column) in enumerate(columns)]
        case.refusals.append(Flaw("no known column", case.path.name))
    rows = pa.Table.from_arrays([column for _, column in columns], names=[name for name, _ in columns])
    rows = rows.replace_schema_metadata(metadata or None)
    if draw.random() < 0.04:
        rows = rows.slice(0, 0)
        case.refusals.append(Flaw("no rows", case.path.name))
    size = draw.choice((7, 1000))
    if suffix == "parquet":
        compression = draw.choice(("snappy", "zstd", "none"))
        parquet.write_table(rows, case.path, row_group_size=size, compression=compression, store_schema=True)
    elif suffix == "feather":
        feather.write_feather(rows, case.path, chunksize=size)
    else:
        new = draw.choice((pa.ipc.new_stream, pa.ipc.new_file))
        with pa.OSFile(str(case.path), "wb") as file, new(file, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=size)
        if new is pa.ipc.new_stream and size == 7 and len(rows) and draw.random() < 0.3:
            case.path.write_bytes(case.path.read_bytes()[: _second_batch_ends(case.path)])
            case.refusals.append(Flaw("cut between batches", case.path.name))
    content = case.path.read_bytes()
    if draw.random() < 0.15:
        kinds = {
            "empty": b"",
            "text": b"text,label\na,b\n",
            "zeros": bytes(len(content)),
            "cut": content[: len(content) // 2],
        }
        what, content = draw.choice(list(kinds.items()))
        case.refusals.append(Flaw(what, case.path.name))
        case.path.write_bytes(content)
    elif wild and draw.random() < 0.2:
        case.path.write_bytes(_scramble(draw, case, content))
    return case


def _second_batch_ends(path: Path) -> int:
    import pyarrow as pa

    with pa.OSFile(str(path), "rb") as file, pa.ipc.open_stream(file) as reader:
        reader.read_next_batch()
        reader.read_next_batch()
        return int(file.tell())


def _odd_columns() -> dict[str, Any]:
    """Columns that no task reads, of types that Python has trouble with."""
    import pyarrow as pa

    far = [2**60, -(2**60), *range(NUM_ROWS - 2)]
    names = pa.array([b"\xff", *[b"x"] * (NUM_ROWS - 1)], pa.binary())
    return {
        "far": pa.array(far, pa.timestamp("us")),
        "seconds": pa.array([2**42, *range(NUM_ROWS - 1)], pa.timestamp("s")),
        "nanoseconds": pa.array(far, pa.timestamp("ns")),
        "zone": pa.array(far, pa.timestamp("us", tz="Mars/Phobos")),
        "day": pa.array([2**30, *range(NUM_ROWS - 1)], pa.date32()),
        "while": pa.array([2**60, *range(NUM_ROWS - 1)], pa.duration("s")),
        "span": pa.array([timedelta(days=1)] * NUM_ROWS),
        "decimal": pa.array([Decimal("1e20")] * NUM_ROWS),
        "nothing": pa.nulls(NUM_ROWS),
        "map": pa.array([[("a", 1)]] * NUM_ROWS, pa.map_(pa.string(), pa.int64())),
        "lists": pa.array([[[1], None]] * NUM_ROWS),
        "bytes": names,
        "wrong text": names.view(pa.string()),
        "half": pa.array([1.5] * NUM_ROWS, pa.float32()).cast(pa.float16()),
    }


# ---- text, words, images ---------------------------------------------------------------------------------------


def _text(draw: random.Random, folder: Path) -> Case:
    case = Case(folder, "causal-lm", folder / "rows.txt", "raw text", {"packing": False, "text_rows": "line"})
    case.rows = _rows(draw, "words", one_line=True)
    end = draw.choice(("\n", "\r\n"))
    lines: list[str] = []
    for row in case.rows:
        row.label = None
        lines += [draw.choice(("", "  ", "\t"))] * (draw.random() < 0.1)
        lines.append(row.text)
        row.place = f"{case.path.name}:{len(lines)}"
    content = (end.join(lines) + end).encode()
    if draw.random() < 0.4:
        name, row = case.path.name, _pick(draw, case.rows)
        kinds = {
            "not UTF-8": (content.replace(row.text.encode(), b"caf\xe9", 1), row.place),
            "NUL": (content.replace(row.text.encode(), b"a\0b", 1), row.place),
            "utf-16": ((end.join(lines)).encode("utf-16"), f"{name}:1"),
            "utf-16 without a mark": ((end.join(lines)).encode("utf-16-be"), f"{name}:1"),
            "empty": (b"", name),
            "blank": (b" \n\n", name),
            "nul": (bytes(999), f"{name}:1"),
        }
        # Of one text that is part of another one, the first place is another's.
        what, (content, place) = draw.choice(list(kinds.items()))
        case.refusals.append(Flaw(what, name if what in ("not UTF-8", "NUL") else place))
    _finish_text(draw, case, content)
    return case


def _conll(draw: random.Random, folder: Path) -> Case:
    suffix = draw.choice(("conll", "iob", "bio", "iob2"))
    case = Case(folder, "token-classification", folder / f"rows.{suffix}", "tags")
    sign, end = draw.choice(("\t", " ")), draw.choice(("\n", "\r\n"))
    num_columns = draw.choice((2, 2, 4))
    lines: list[str] = []
    broken = {draw.randrange(NUM_ROWS) for _ in range(_count(draw, 3))} if draw.random() < 0.4 else set()
    lost = {draw.randrange(NUM_ROWS) for _ in range(_count(draw, 5))} - broken
    for number in range(NUM_ROWS):
        lines += [""] * draw.choice((0, 0, 0, 1)) + ["-DOCSTART- O" + end] * (draw.random() < 0.05 and not lines)
        words = [
            "Anna",
            draw.choice(tiny.PLACES),
            f"w{number}",
            draw.choice(("é", "😀", "\u00a0", "a\u200bb", '"', "#")),
        ]
        tags = ["B-PER", draw.choice(("I-PER", "O")), "O", draw.choice(("O", "B-LOC"))]
        row = Written(words, tags, f"{case.path.name}:{len(lines) + sum(line.count(end) for line in lines) + 1}")
        if number in lost:
            row.lost, words[:] = "words without width", ["\u200b"] * 4
        at = draw.randrange(4) if number in broken and len(case.rows) else -1
        for place, (word, tag) in enumerate(zip(words, tags, strict=True)):
            line = sign.join([word, *["x"] * (num_columns - 2), tag])
            here = f"{case.path.name}:{len(lines) + sum(line.count(end) for line in lines) + 1}"
            lines.append(_break_word(draw, case, line, here, sign) if place == at else line)
        lines.append("")
        case.rows.append(row)
    content = (end.join(lines) + end).encode("utf-8", "surrogateescape")
    if draw.random() < 0.1:
        content = _scramble(draw, case, content)
    _finish_text(draw, case, content)
    return case


def _break_word(draw: random.Random, case: Case, line: str, place: str, sign: str) -> str:
    word, *_ = line.split(sign)
    ways = {
        "no tag": word,
        "a column more": f"{line}{sign}O",
        "NUL": f"\0{line}",
        "not UTF-8": f"\udce9{line}",
        "not BIO": line.rpartition(sign)[0] + sign + draw.choice(("PER", "B_PER", "S-PER", "7")),
        "a comment": "# text = hello you there",
    }
    what = draw.choice(list(ways))
    # Tags are looked at when all lines can be read; they are named by their sentence and word.
    case.refusals.append(Flaw(what, case.path.name if what == "not BIO" else place))
    return ways[what]


def _images(draw: random.Random, folder: Path) -> Case:
    path = folder / "rows"
    case = Case(folder, "image-classification", path, "images")
    drops = draw.random() < 0.5
    case.settings["undecodable_images"] = "drop" if drops else "error"
    case.most_lost = 24 if drops else 1
    content = _picture(draw)
    for number in range(24):
        label = ("cat", "été", "x y")[number % 3]
        file = path / label / f"{number:02}.{draw.choice(('png', 'PNG', 'jpg'))}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_picture(draw))
        case.rows.append(Written(str(file), label, f"{label}/{file.name}"))
    for _ in range(draw.choice((0, 1, 2, 4))):
        row = _pick(draw, case.rows)
        file = Path(row.text)
        ways: dict[str, Callable[[], Any]] = {
            "a link that leads nowhere": lambda file=file: (file.unlink(), file.symlink_to("gone.png")),
            "a link to itself": lambda file=file: (file.unlink(), file.symlink_to(file.name)),
            "empty": lambda file=file: file.write_bytes(b""),
            "cut": lambda file=file: file.write_bytes(content[: len(content) // 2]),
            "text": lambda file=file: file.write_text("no image"),
        }
        row.lost = draw.choice(list(ways))
        ways[row.lost]()
        if not drops:
            case.refusals.append(Flaw(row.lost, row.place))
    if draw.random() < 0.2:
        row = _pick(draw, case.rows)
        Path(row.text).rename(Path(row.text).with_name("b\udce4r.png"))
        row.lost, row.place = "a name that is not UTF-8", f"{row.label}/b\\xe4r.png"
    if draw.random() < 0.1:
        (path / "cat").rename(path / "k\udce4tzchen")
        case.refusals = [Flaw("a folder that is not UTF-8", "k\\xe4tzchen")]
    for name in draw.sample(("été/notes.txt", "été/.hidden.png", "README.md", ".cache/a.png"), 2):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(content)
        case.oddities.append(name)
    return case


def _nested(draw: random.Random, folder: Path, form: str) -> Case:
    """Conversations, or questions about passages, with damage deep inside."""
    is_chat = form == "chat"
    task = "causal-lm" if is_chat else "question-answering"
    case = Case(folder, task, folder / "rows.jsonl", form)
    lines: list[str] = []
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(_rows(draw, "words"), start=1):
        row.text = row.text[:80]  # of a long one, no token of the answer would be left
        if is_chat:
            said = [{"role": "user", "content": row.text}, {"role": "assistant", "content": f"answer {number}"}]
            values: dict[str, Any] = {"messages": said}
        else:
            answers = {"text": ["the"], "answer_start": [row.text.index("the")]}
            values = {"context": row.text, "question": f"what? {number}", "answers": answers}
        case.rows.append(Written(json.loads(json.dumps(values)), None, f"{case.path.name}:{number}"))
        rows.append(values)
    for _ in range(_count(draw, 5)):
        row = _pick(draw, case.rows)
        values = rows[case.rows.index(row)]
        ways = _chat_damage(values) if is_chat else _question_damage(draw, values)
        row.lost = draw.choice(list(ways))
        part, change = ways[row.lost]
        part.update(change)
    for values in rows:
        lines.append(json.dumps(values, ensure_ascii=True))
    case.path.write_text("\n".join(lines) + "\n", encoding="ascii")
    return case


Damage = dict[str, tuple[dict[str, Any], dict[str, Any]]]
"""What it is, to which part of a row, and what it makes of it."""


def _chat_damage(values: dict[str, Any]) -> Damage:
    user, said = values["messages"]
    half = '[{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "b"}]'
    return {
        "half a character": (user, {"content": "a \ud83d"}),
        "half a key": (user, {"a \ud83d": 1}),
        "deep": (user, {"content": json.loads(_DEEP)}),
        "null": (values, {"messages": None}),
        "half of JSON": (values, {"messages": "[{"}),
        "half a character in JSON": (values, {"messages": half}),
        "no role": (user, {"role": None}),
        "no answer": (said, {"content": " "}),
    }


def _question_damage(draw: random.Random, values: dict[str, Any]) -> Damage:
    answers, half = values["answers"], "a \ud83d"
    start = draw.choice(("a", 10**400, -(10**9), None, float("inf"), [1], {}))
    return {
        "half a character": (values, {"context": half}),
        "half a question": (values, {"question": half}),
        "half an answer": (answers, {"text": [half]}),
        "deep": (answers, {"text": json.loads(_DEEP)}),
        "no passage": (values, {"context": "\u200b"}),
        "wrong start": (answers, {"text": ["nowhere"], "answer_start": [start]}),
        "two starts": (answers, {"answer_start": [1, 2]}),
    }


def _picture(draw: random.Random) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.frombytes("RGB", (8, 8), draw.randbytes(192)).save(buffer, "png")
    return buffer.getvalue()


# ---- cases -----------------------------------------------------------------------------------------------------


def make(seed: int, folder: Path, wild: bool = False) -> Case:
    """The case of a seed, written into an empty folder.

    Args:
        seed: Also gives the format, one after another.
        folder: Where to write.
        wild: Change bytes of binary formats, too: their readers may be killed by it, so not in this process.
    """
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    suffix = FORMS[seed % len(FORMS)]
    match suffix:
        case "csv" | "tsv":
            case = _separated(draw, folder, suffix)
        case "json" | "jsonl":
            case = _json(draw, folder, suffix)
        case "txt":
            return _text(draw, folder)
        case "conll":
            return _conll(draw, folder)
        case "images":
            return _images(draw, folder)
        case "chat" | "questions":
            return _nested(draw, folder, suffix)
        case _:
            case = _table(draw, folder, suffix, wild)
    if draw.random() < 0.15:
        _into_folder(draw, case)
    return case


def _into_folder(draw: random.Random, case: Case) -> None:
    """The file in a folder, beside what systems and people leave there."""
    inside = case.folder / "given"
    inside.mkdir()
    case.path.rename(inside / case.path.name)
    (inside / f"._{case.path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (inside / "README.md").write_text("not rows")
    case.oddities.append("in a folder")
    if draw.random() < 0.2:
        (inside / "test.csv").write_text("text,label\na,b\n")
        case.refusals = [Flaw("a test file in the folder", "test.csv")]
    case.settings["train"] = str(inside)


# ---- running a case --------------------------------------------------------------------------------------------


def recipe_values(case: Case, model: str = "x") -> dict[str, Any]:
    """The recipe of a case."""
    return {"model": model, "task": case.task, "data": {"train": str(case.path), **case.settings}}


def run_here(case: Case, processors: dict[str, Any], prepared: Callable[[], None] = lambda: None) -> Outcome:
    """The data stage on a case, in this process.

    Args:
        case: The case.
        processors: Task to tokenizer, or image processor.
        prepared: Called when the data stage is done, before its rows are read again.
    """
    from fulltune import data
    from fulltune.errors import FulltuneError
    from fulltune.recipe.fields import Recipe

    recipe = Recipe.model_validate(recipe_values(case))
    processor = processors[case.task]
    try:
        try:
            data.prepare(data.Stage(recipe, case.folder / "data", processor, data.Limits(tiny.POSITIONS)))
        finally:
            prepared()
        return outcome_of(case, case.folder / "data", processor)
    except FulltuneError as error:
        return Outcome(problems=error.problems)
    except Exception:
        return Outcome(crash=traceback.format_exc())


def outcome_of(case: Case, folder: Path, processor: Any) -> Outcome:
    """What prepared rows say."""
    from fulltune.inference.store import Rows, read_original_rows
    from fulltune.records.data import DataSummary

    summary = DataSummary.load(folder / "summary.json")
    labels = summary.labels
    used: dict[str, tuple[str, Any, Any, str | None]] = {}
    for split in ("train", "eval", "test"):
        for features, row in zip(Rows(folder / split), list(read_original_rows(folder / split)), strict=True):
            place = row[PLACE]
            if place not in used:  # a long text gives several examples, and the row stands beside the first
                text, label = _seen(case, row, features, labels)
                used[place] = (place, text, label, _decoded(case, features, processor))
    lines = (folder / "dropped.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    listed = [(item["place"], item["reason"]) for item in map(json.loads, lines)]
    return Outcome(used=tuple(used.values()), listed=tuple(listed))


def _seen(case: Case, row: dict[str, Any], features: Any, labels: Sequence[str]) -> tuple[Any, Any]:
    """A used row's text and label: the text as it is kept, the label as the model is given it."""
    match case.kind:
        case "raw text":
            return row["text"], None
        case "tags":
            return row["tokens"], [labels[number] for number in features["tags"]]
        case "images":
            return row["image"], labels[features["labels"]]
        case "chat" | "questions":
            return {name: value for name, value in row.items() if name != PLACE}, None
        case "regression":
            return row["text"], _near(case, row, float(features["labels"]))
        case "multi_label":
            return row["text"], [name for name, has in zip(labels, features["labels"], strict=True) if has]
        case _:
            return row["text"], labels[features["labels"]]


def _near(case: Case, row: dict[str, Any], value: float) -> float:
    """The written target, where the kept one is as near to it as 32 bits can be."""
    for one in case.rows:
        if one.text == row["text"] and abs(one.label - value) < 1e-5:
            return float(one.label)
    return value


def _decoded(case: Case, features: Any, processor: Any) -> str | None:
    if case.task != "text-classification" or len(features["input_ids"]) >= tiny.POSITIONS:
        return None
    text = processor.decode(features["input_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)
