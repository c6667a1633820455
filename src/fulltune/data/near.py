"""Rows whose texts are nearly the same, by MinHash (Broder 1997): clusters that a split must not separate.

A text's *signature* is, for each of 128 hash functions, the smallest hash of its 5-grams of characters. The share of
equal places in two signatures estimates the share of 5-grams that the texts have in common (Jaccard), with a standard
error of at most 4.5 %. Signatures are made where rows are tokenised, in the workers; the parent keeps 256 bytes a row
and compares only rows that agree in a whole band of places. Everything is a function of the texts alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NUM_HASHES = 128
_SHINGLE = 5
_BASE = np.uint64(0x9E3779B97F4A7C15)
_TEXTS_AT_ONCE = 200_000
"""Characters whose 5-grams are hashed at a time: 128 numbers each."""
_NEIGHBOURS = 16
"""In a band that many rows share, each is compared with so many that follow it in the order of their signatures."""


def signatures(texts: Sequence[str]) -> np.ndarray:
    """MinHash of each text's 5-grams: uint16 [texts, 128]. A shorter text is one gram."""
    made = np.empty((len(texts), NUM_HASHES), np.uint16)
    start, size = 0, 0
    for end, text in enumerate(texts, start=1):
        size += max(_SHINGLE, len(text))
        if size >= _TEXTS_AT_ONCE or end == len(texts):
            made[start:end] = _signatures(texts[start:end])
            start, size = end, 0
    return made


def _signatures(texts: Sequence[str]) -> np.ndarray:
    padded = [text.ljust(_SHINGLE, "\0") for text in texts]
    letters = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in padded])
    count = len(letters) - _SHINGLE + 1
    grams = np.zeros(count, np.uint64)
    for place in range(_SHINGLE):
        grams = grams * _BASE + letters[place : place + count]
    grams = _mixed(grams)
    starts = np.cumsum(lengths) - lengths
    # A gram that reaches into the next text is left out, by standing for its text's first one.
    of_text = np.repeat(np.arange(len(texts)), lengths)[:count]
    reaches = np.arange(count) > (starts + lengths - _SHINGLE)[of_text]
    grams[reaches] = grams[starts[of_text[reaches]]]
    low, high = (grams & np.uint64(0xFFFFFFFF)).astype(np.uint32), (grams >> np.uint64(32)).astype(np.uint32)
    high |= np.uint32(1)
    made = np.empty((len(texts), NUM_HASHES), np.uint16)
    for number in range(NUM_HASHES):
        # Double hashing: as good as 128 functions of their own (Kirsch and Mitzenmacher 2006), once mixed.
        hashes = low + high * np.uint32(number)
        hashes ^= hashes >> np.uint32(15)
        hashes *= np.uint32(0x2C1B3C6D)
        hashes ^= hashes >> np.uint32(12)
        # The smallest hash itself is not uniform: of long texts all would begin with zeros.
        smallest = np.minimum.reduceat(hashes, starts) * np.uint32(0x297A2D39)
        made[:, number] = (smallest ^ (smallest >> np.uint32(15))) >> np.uint32(8)
    return made


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def clusters(signed: np.ndarray, threshold: float) -> np.ndarray:
    """The cluster of each row: the place of its first member, int64 [rows].

    Rows are in one cluster when a chain of rows leads from one to the other, each as near to the next as `threshold`.

    Args:
        signed: What `signatures` made of different texts.
        threshold: Least share of equal places, above 0 and at most 1.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(signed)
    if count < 2:
        return np.arange(count)
    found = [_near_pairs(signed, places, threshold) for places in _bands(threshold)]
    one, two = np.concatenate(found, axis=1)
    graph = coo_array((np.ones(len(one), bool), (one, two)), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)


def _bands(threshold: float) -> list[slice]:
    """Few places in a band find more distant rows, many cost less: at least 99 % of pairs at the threshold."""
    width = next(
        (size for size in (16, 8, 4, 2) if 1 - (1 - threshold**size) ** (NUM_HASHES // size) >= 0.99),
        1,
    )
    return [slice(start, start + width) for start in range(0, NUM_HASHES, width)]


def _near_pairs(signed: np.ndarray, places: slice, threshold: float) -> np.ndarray:
    """Rows that agree in these places and are near: int64 [2, pairs]."""
    keys = np.zeros(len(signed), np.uint64)
    for column in np.ascontiguousarray(signed[:, places]).T:
        keys = _mixed(keys * _BASE + column.astype(np.uint64))
    # Within a band by another part of the signature, so that the most similar rows stand side by side.
    further = signed[:, (places.stop) % NUM_HASHES]
    order = np.lexsort((further, keys))
    ordered, found = keys[order], []
    for distance in range(1, _NEIGHBOURS + 1):
        same = np.flatnonzero(ordered[distance:] == ordered[:-distance])
        if not len(same):
            break
        one, two = order[same], order[same + distance]
        near = _shared(signed, one, two) >= threshold
        found.append(np.stack([one[near], two[near]]))
    return np.concatenate(found, axis=1) if found else np.zeros((2, 0), np.int64)


def _shared(signed: np.ndarray, one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Share of equal places, of many pairs in pieces."""
    piece = 100_000
    parts = [
        (signed[one[start : start + piece]] == signed[two[start : start + piece]]).mean(axis=1)
        for start in range(0, len(one), piece)
    ]
    return np.concatenate(parts)


def joined(groups: np.ndarray, signed: np.ndarray, threshold: float) -> np.ndarray:
    """Group numbers in which near rows share one: uint64 [rows]; a row that is near to none keeps its own.

    Args:
        groups: A drawn number of each row; rows with equal texts share one already.
        signed: Their signatures.
        threshold: See `clusters`.
    """
    numbers, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    of_number = clusters(signed[first], threshold)
    sizes = np.bincount(of_number, minlength=len(numbers))
    # Drawn anew from the first member: the smallest of several numbers would put large clusters first.
    shared = np.where(sizes[of_number] > 1, _mixed(numbers[of_number] + _BASE), numbers)
    return np.asarray(shared[inverse], np.uint64)
