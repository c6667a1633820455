"""Groups rows that no split may separate: rows with the same `data.group`, and near duplicates (MinHash, Broder 1997).

A signature holds the smallest hash of a text's character 5-grams for each of 128 hash functions. The share of equal
positions estimates the Jaccard similarity, with a standard error of at most 4.5 %.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import numpy as np

from fulltune.audit.texts import masked_text
from fulltune.data.readers.read import LocatedRow
from fulltune.recipe.data import DataBlock
from fulltune.tasks.columns import BadCell, in_batches, is_blank
from fulltune.text import counted, listed

NUM_HASHES = 128
_SHINGLE = 5
_BASE = np.uint64(0x9E3779B97F4A7C15)
_CHARACTERS_AT_ONCE = 50_000
_PAIRS_AT_ONCE = 4_000
_MAX_ROWS_COMPARED = 16


def minhash(texts: Sequence[str]) -> np.ndarray:
    """Compute MinHash signatures of the texts: uint16 [texts, 128]."""
    none = np.empty((0, NUM_HASHES), np.uint16)
    return np.concatenate([none, *map(_minhash_of_batch, in_batches(texts, most_characters=_CHARACTERS_AT_ONCE))])


def _minhash_of_batch(texts: Sequence[str]) -> np.ndarray:
    padded = [text.ljust(_SHINGLE, "\0") for text in texts]
    letters = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in padded])
    count = len(letters) - _SHINGLE + 1
    grams = np.zeros(count, np.uint64)
    for place in range(_SHINGLE):
        grams = grams * _BASE + letters[place : place + count]
    grams = _mix_bits(grams)
    starts = np.cumsum(lengths) - lengths
    # A gram that extends into the next text is replaced by the first gram of its own text.
    of_text = np.repeat(np.arange(len(texts)), lengths)[:count]
    reaches = np.arange(count) > (starts + lengths - _SHINGLE)[of_text]
    grams[reaches] = grams[starts[of_text[reaches]]]
    low, high = (grams & np.uint64(0xFFFFFFFF)).astype(np.uint32), (grams >> np.uint64(32)).astype(np.uint32)
    high |= np.uint32(1)
    smallest = np.empty((NUM_HASHES, len(texts)), np.uint32)
    for row in smallest:
        # Double hashing, once mixed, is as good as 128 separate functions (Kirsch and Mitzenmacher 2006).
        hashes = (low ^ (low >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
        np.minimum.reduceat(hashes ^ (hashes >> np.uint32(12)), starts, out=row)
        low += high
    # The smallest hash is not uniform: for long texts, all hashes would start with zeros.
    smallest *= np.uint32(0x297A2D39)
    return np.ascontiguousarray(((smallest ^ (smallest >> np.uint32(15))) >> np.uint32(8)).astype(np.uint16).T)


def jaccard_similarity(first: set[str], second: set[str]) -> float:
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def character_5grams(text: str) -> set[str]:
    text = text.ljust(_SHINGLE, "\0")
    return {text[place : place + _SHINGLE] for place in range(len(text) - _SHINGLE + 1)}


def _mix_bits(values: np.ndarray) -> np.ndarray:
    """Hash 64-bit integers with the finalizer of SplitMix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def cluster_near_duplicates(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """Return the index of the first member of each row's cluster: int64 [rows].

    Rows are joined, also transitively, if they share at least `threshold` of their signature positions.
    """
    count = len(signatures)
    if count < 2:
        return np.arange(count)
    # The widest bands, which cost least, that detect at least 99 % of pairs at the threshold.
    width = next((size for size in (16, 8, 4, 2) if 1 - (1 - threshold**size) ** (NUM_HASHES // size) >= 0.99), 1)
    bands = [slice(start, start + width) for start in range(0, NUM_HASHES, width)]
    pairs = np.concatenate([_find_similar_pairs(signatures, places, threshold) for places in bands], axis=1)
    _, first, inverse = np.unique(_connected_components(pairs, count), return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)


def _find_similar_pairs(signatures: np.ndarray, band: slice, threshold: float) -> np.ndarray:
    """Return index pairs of similar rows whose signatures agree in all columns of `band`: int64 [2, pairs]."""
    of_band = np.ascontiguousarray(signatures[:, band])
    words = of_band.view(f"u{min(8, 2 * of_band.shape[1])}")
    keys = words[:, 0].astype(np.uint64)
    for word in words[:, 1:].T:
        keys = _mix_bits(keys) + word
    order = np.argsort(keys)
    agree = keys[order[1:]] == keys[order[:-1]]
    # Few rows agree with another one, so only these are sorted.
    several = np.sort(order[np.append(agree, False) | np.append(False, agree)])
    # Within a band, rows are sorted by another part of the signature, so that similar rows are neighbours.
    order = several[np.lexsort((signatures[several, band.stop % NUM_HASHES], keys[several]))]
    ordered, pairs = keys[order], [np.zeros((2, 0), np.int64)]
    for distance in range(1, _MAX_ROWS_COMPARED + 1):
        same = np.flatnonzero(ordered[distance:] == ordered[:-distance])
        if not len(same):
            break
        for place in np.array_split(same, 1 + len(same) // _PAIRS_AT_ONCE):
            pair = np.stack([order[place], order[place + distance]])
            equal = (signatures[pair[0]] == signatures[pair[1]]).view(np.uint8)
            pairs.append(pair[:, equal.sum(axis=1, dtype=np.uint8) >= threshold * NUM_HASHES])
    return np.concatenate(pairs, axis=1)


def join_near_duplicates(groups: np.ndarray, signatures: np.ndarray, threshold: float) -> np.ndarray:
    """Merge groups whose first rows' estimated Jaccard similarity reaches `threshold`. Return each row's group number:
    uint64 [rows]."""
    numbers, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    of_number = cluster_near_duplicates(signatures[first], threshold)
    sizes = np.bincount(of_number, minlength=len(numbers))
    # A new number is drawn from the first member, because the smallest of several would put large clusters first.
    shared = np.where(sizes[of_number] > 1, rehash(numbers[of_number]), numbers)
    return np.asarray(shared[inverse], np.uint64)


def rehash(numbers: np.ndarray) -> np.ndarray:
    """Map each number to a pseudo-random number, the same for equal numbers: uint64."""
    return _mix_bits(numbers + _BASE)


def _connected_components(pairs: np.ndarray, num_nodes: int) -> np.ndarray:
    """Return the component number of each node of a graph with the edges `pairs`: int [nodes]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(pairs.shape[1], bool), tuple(pairs)), shape=(num_nodes, num_nodes))
    return np.asarray(connected_components(graph, directed=False)[1])


def join_by_value(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return a group number for each row: uint64 [rows]. Rows with equal groups or values, directly or through other
    rows, get the same number.

    If connected rows all have one value, this value is their number.
    """
    if not len(groups):
        return groups
    numbers, of_value = np.unique(values, return_inverse=True)
    names, of_group = np.unique(groups, return_inverse=True)
    pairs = np.stack([of_value, len(numbers) + of_group])
    labels = _connected_components(pairs, len(numbers) + len(names))[: len(numbers)]
    # Values are sorted, so the first one of a component is its smallest.
    _, first, component, sizes = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    # A new number is drawn from the first value, because the smallest of several would put large components first.
    drawn = np.where(sizes > 1, rehash(numbers[first]), numbers[first])
    return np.asarray(drawn[component][of_value], np.uint64)


def hash_to_number(seed: int, key: str) -> int:
    """Return a pseudo-random number below 2^64 that depends only on `seed` and `key`."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:8], "big")


def sample_by_label(row_labels: Sequence[Sequence[str]], max_rows: int, seed: int) -> list[int]:
    """Return the sorted positions of `max_rows` random rows, with at least three of each label if possible."""
    drawn = np.fromiter(
        (hash_to_number(seed, str(position)) for position in range(len(row_labels))), np.uint64, len(row_labels)
    )
    of_each = min(3, max_rows // max(1, len({label for of_row in row_labels for label in of_row})))
    counts, wanted, others = Counter[str](), list[int](), list[int]()
    for position in np.argsort(drawn, kind="stable").tolist():
        (wanted if any(counts[label] < of_each for label in row_labels[position]) else others).append(position)
        counts.update(row_labels[position])
    return sorted([*wanted, *others][:max_rows])


# ---- the columns of data.group and data.time -------------------------------------------------------------------------

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
_MAX_PLACES = 10
_IS_EMPTY = "is empty"


@dataclass
class RowCounts:
    """Counts rows by a kind (`unusable`) and a name (`too long`), and keeps the first locations of each."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    first: dict[tuple[str, str], list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, kind: str, name: str, location: str, detail: str = "") -> None:
        """Count a row. `location` and `detail` are kept for messages."""
        self.counts[kind, name] += 1
        if self.counts[kind, name] <= _MAX_PLACES:
            self.first.setdefault((kind, name), []).append((location, detail))

    def merge(self, other: RowCounts) -> None:
        """Add the counts of `other`, whose rows come later."""
        self.counts.update(other.counts)
        for key, places in other.first.items():
            shown = self.first.setdefault(key, [])
            shown += places[: _MAX_PLACES - len(shown)]

    def of(self, kind: str) -> Counter[str]:
        """Return {name: count} for a kind."""
        return Counter({what: count for (of, what), count in self.counts.items() if of == kind})


def parse_groups_and_times(
    rows: Sequence[LocatedRow], group_column: str | None, time_column: str | None, seed: int, tally: RowCounts
) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's group hash (uint64 [rows]) and time (float64 [rows]); an array is empty if its column is None.
    Bad cells are counted in `tally`."""
    values, times = np.zeros(len(rows) if group_column else 0, np.uint64), np.zeros(len(rows) if time_column else 0)
    for number, (place, row) in enumerate(rows):
        if group_column:
            try:
                values[number] = hash_to_number(seed, parse_group(row.get(group_column)))
            except ValueError as error:
                tally.add("group", str(error), place)
        if time_column:
            try:
                kind, times[number] = parse_time(cell := row.get(time_column))
                tally.add("kind of time", kind, place)
            except ValueError as error:
                is_shown = str(error) != _IS_EMPTY and not isinstance(cell, BadCell)
                tally.add("time", str(error), place, f": {masked_text(str(cell))[:40]!r}" if is_shown else "")
    return values, times


def parse_group(cell: object) -> str:
    """Return a `data.group` cell as text. Raises `ValueError` if the cell is empty, or neither text nor number."""
    if isinstance(cell, BadCell):
        raise ValueError(f"contains {cell.reason}")
    if isinstance(cell, (list, tuple, dict, bytes)):
        raise ValueError("contains a list, an object or bytes instead of a text or a number")
    if cell is None or (isinstance(cell, float) and math.isnan(cell)) or is_blank(str(cell)):
        raise ValueError(_IS_EMPTY)
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell).strip()


def parse_time(cell: object) -> tuple[str, float]:
    """Return the kind of a time (`number`, `date`, `date-time` or `date-time with a zone`) and its value: the number,
    or seconds since 1970. Raises `ValueError` for anything else."""
    if isinstance(cell, BadCell):
        raise ValueError(f"contains {cell.reason}")
    is_nothing = isinstance(cell, (float, datetime)) and cell != cell  # NaN, or NaT of pandas
    if cell is None or is_nothing or (isinstance(cell, str) and is_blank(cell)):
        raise ValueError(_IS_EMPTY)
    try:
        value = cell
        if isinstance(cell, str):
            is_number, is_day = _NUMBER.fullmatch(text := cell.strip()), _DAY.fullmatch(text)
            value = float(text) if is_number else (date if is_day else datetime).fromisoformat(text)
        if isinstance(value, datetime):
            if value.tzinfo is None:
                return "date-time", (value.replace(tzinfo=UTC) - _EPOCH).total_seconds()
            return "date-time with a zone", (value.astimezone(UTC) - _EPOCH).total_seconds()
        if isinstance(value, date):
            return "date", (datetime(value.year, value.month, value.day, tzinfo=UTC) - _EPOCH).total_seconds()
        if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and math.isfinite(value):
            return "number", float(value)
    except (ValueError, OverflowError):
        pass
    raise ValueError("contains no time")


def format_time(kind: str, time: float) -> str:
    """Format a time for messages; `kind` and `time` are a result of `parse_time`."""
    if kind == "number":
        return str(int(time)) if time.is_integer() else str(time)
    form = "%Y-%m-%d" if kind == "date" else "%Y-%m-%d %H:%M:%S"
    return (_EPOCH + timedelta(seconds=time)).strftime(form) + " UTC" * (kind == "date-time with a zone")


def group_and_time_problems(block: DataBlock, tally: RowCounts, num_rows: int, file_name: str) -> list[str]:
    """Return error messages about bad cells in the `data.group` and `data.time` columns."""
    problems, kinds = [], []
    for (kind, what), count in tally.counts.items():
        if kind not in ("group", "time", "kind of time"):
            continue
        places = ["".join(item) for item in tally.first[kind, what]]
        if kind == "kind of time":
            kinds.append(f"{what} in {counted(count, 'row')} ({places[0]})")
            continue
        more = count - min(3, len(places))
        shown = ", ".join(places[:3]) + (f" and {more:,} more" if more else "")
        problems.append(
            f"{file_name}: column '{getattr(block, kind)}' (data.{kind}) {what} in {count:,} of "
            f"{counted(num_rows, 'row')} ({shown}); {_REMEDIES[kind]}, or remove these rows"
        )
    if len(kinds) > 1:
        problems.append(
            f"{file_name}: column '{block.time}' (data.time) mixes kinds of times that cannot be ordered: "
            f"{listed(kinds)}; write all of them in one format"
        )
    return problems


_REMEDIES = {
    "group": "such rows could end up in the wrong split: write each row's group, or a unique value if a row has none",
    "time": "expected a date such as 2026-11-28, a date-time such as 2026-11-28 14:30:00+01:00, or a number such as "
    "Unix seconds: write a time in each row",
}
