"""Rows as the untouched model sees them: what that says about their labels, and which are outliers.

A row's distance is the mean of 1 - cosine to its nearest train rows, of its mean hidden states (arXiv 2207.03061).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fulltune import plan, probe
from fulltune.audit.labels import Suspected, suspected, suspected_parts, word_shapes
from fulltune.inference.run import Share
from fulltune.inference.store import Rows, texts
from fulltune.models.base import Base, opened
from fulltune.models.load import load
from fulltune.probe.features import sampled
from fulltune.probe.linear import Items, NoProbe
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary, SplitName
from fulltune.records.events import Listener, RowsRead
from fulltune.system import hardware
from fulltune.system.memory import is_out_of_memory
from fulltune.tasks import Target, task_named
from fulltune.tasks.tags import words_and_tags
from fulltune.tasks.token_classification import seen_words

BATCH = 32
OUT_OF_MEMORY = "memory ran out while the untouched model read the rows"
NEIGHBOURS = 20
SPREADS = 2.5
"""Between the quartiles: so many of them the fence lies above the upper one (Tukey 1977: 1.5, and 3 for far out)."""
LEAST_TEXTS = 200
MOST_FAR = 0.1
"""Share of the texts that may be far from the others: where more are, the rows are of several kinds."""
_ROUNDS = 10
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Reader:
    """Reads prepared rows with the untouched model; it is loaded when the first row is."""

    recipe: Recipe
    base: Base
    summary: DataSummary
    folder: Path
    """The run's `data` folder."""
    listener: Listener
    _read: dict[SplitName, tuple[Items, np.ndarray] | NoProbe] = field(default_factory=dict, repr=False, compare=False)
    """What was read already, or why it cannot be: several checks look at it."""

    @cached_property
    def extractor(self) -> probe.Extractor:
        """How rows go through the model."""
        import torch

        task, target = task_named(self.recipe.task), Target.of(self.summary)
        device, precision = plan.device_and_precision(self.recipe, hardware.here())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(probe.SEED)  # what the head lacks is drawn, and not read
            changes = task.config_changes(target, self.base.processor)
            model: Any = load(self.base, changes, head_is_new=task.FACTS.head_is_new, block=self.recipe.model)
        return probe.Extractor(
            model.to(device),
            self.recipe.task,
            target,
            self.base.processor.pad_token_id,
            BATCH,
            precision,
            watch=lambda done, total, share: self.listener(
                RowsRead(name="reading rows with the untouched model", done=done, total=total, share=share)
            ),
            middle=target.form.tags_words,  # see bench/part_noise.py
        )

    def items(self, split: SplitName) -> tuple[Items, np.ndarray]:
        """Mean hidden states, labels and positions of a split's rows, or of some drawn at random; raises NoProbe."""
        if split not in self._read:
            try:
                self._read[split] = self._items(split)
            except NoProbe as no:
                self._read[split] = no
        found = self._read[split]
        if isinstance(found, NoProbe):
            raise found
        return found

    def _items(self, split: SplitName) -> tuple[Items, np.ndarray]:
        try:
            rows = opened(Rows(self.folder / split), self.base.processor)
            config = self.extractor.model.config.get_text_config()
            width = getattr(config, "hidden_size", None) or 0  # none: convolutions
            if self.extractor.kind == "tags":
                width = -(-width // 2)  # one vector of each word is kept, where `sampled` reckons with two
            chosen = sampled(rows, self.extractor.kind, self.extractor.target.num_choices, width)
            found = self.extractor.features(chosen, None)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise NoProbe(OUT_OF_MEMORY) from error
        if found.mean is None:
            raise NoProbe("this model gives fewer states than there are tokens")
        positions = np.array(chosen.positions if isinstance(chosen, Share) else range(len(rows)))
        return self.extractor.items(found.mean, found), positions


def judge(reader: Reader) -> tuple[np.ndarray, Suspected] | str:
    """Positions of the train rows that were judged, and what is known of their labels; or why they cannot be judged."""
    try:
        items, positions = reader.items("train")
        match items.kind:
            case "tags":
                items, numbers = with_shapes(reader, items, positions)
                found = suspected_parts(items)
                places = np.concatenate([numbers[row] for row in np.unique(found.row_of_each)])
                return positions, replace(found, places=places)
            case "multi_label":
                return positions, suspected_parts(items)
            case _:
                return positions, suspected(items)
    except NoProbe as no:
        return str(no)


def with_shapes(reader: Reader, items: Items, positions: np.ndarray) -> tuple[Items, list[np.ndarray]]:
    """The words, described also by how they are written; and their numbers in each row: some have no token."""
    folder, columns, wanted = reader.folder / "train", reader.extractor.target.columns, {*positions.tolist()}
    prepared = Rows(folder)
    numbers = [seen_words(prepared[position]) for position in positions.tolist()]
    sentences = (words_and_tags(row, columns)[0] for at, row in enumerate(texts(folder)) if at in wanted)
    words = [sentence[at] for sentence, seen in zip(sentences, numbers, strict=True) for at in seen]
    features = np.concatenate([items.features, word_shapes(words, items.rows)], axis=1)
    return replace(items, features=features), numbers


@dataclass(frozen=True)
class FarRows:
    """What a look for outliers found."""

    distances: Mapping[SplitName, Mapping[int, float]]
    """Split to the position of each such row to its distance from the nearest train rows."""
    usual: float
    """Distance that three texts in four do not exceed, outliers left out."""
    left_out: int
    """Rows that were not read: of each split some are drawn at random where they are many."""


def outliers(reader: Reader, keys: Mapping[SplitName, np.ndarray]) -> FarRows | str:
    """Rows far from all train rows, or why nothing can be said; `keys` has a number of each row's text or image."""
    try:
        return _outliers(reader, keys)
    except NoProbe as no:
        return str(no)


def _outliers(reader: Reader, keys: Mapping[SplitName, np.ndarray]) -> FarRows:
    items, positions = reader.items("train")
    train_keys = keys["train"][positions]
    different, first, inverse = np.unique(train_keys, return_index=True, return_inverse=True)
    if len(different) < LEAST_TEXTS:
        raise NoProbe(
            f"{len(different):,} different texts or images in train are too few: expected at least {LEAST_TEXTS}"
        )
    states = items.features[first]
    distances, is_far, usual, fence = far_out(states, different)
    if is_far.mean() > MOST_FAR:
        raise NoProbe(f"{is_far.mean():.0%} of the train rows are far from the others: these are of several kinds")
    left_out = len(keys["train"]) - len(positions)
    found: dict[SplitName, dict[int, float]] = {
        "train": {
            int(position): float(distances[at]) for position, at in zip(positions, inverse, strict=True) if is_far[at]
        }
    }
    for split in ("eval", "test"):
        if split not in keys or not len(keys[split]):
            continue
        held_out, places = reader.items(split)
        left_out += len(keys[split]) - len(places)
        theirs, _ = nearest(held_out.features, keys[split][places], states[~is_far], different[~is_far])
        found[split] = {int(places[at]): float(theirs[at]) for at in np.flatnonzero(theirs > fence)}
    return FarRows(found, usual, left_out)


def far_out(states: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
    """The rows' distances, whether each is far out, the upper quartile of those that are not, and the fence."""
    distances, neighbours = nearest(states, keys, states, keys)
    is_far = np.zeros(len(states), bool)
    for _ in range(_ROUNDS):
        lower, upper = np.quantile(distances[~is_far], [0.25, 0.75])
        fence = float(upper + SPREADS * (upper - lower))
        further = (distances > fence) & ~is_far
        is_far |= further
        if not further.any() or is_far.mean() > MOST_FAR:
            break
        changed, kept = np.flatnonzero(further[neighbours].any(axis=1)), np.flatnonzero(~is_far)
        distances[changed], places = nearest(states[changed], keys[changed], states[kept], keys[kept])
        neighbours[changed] = kept[places]
    return distances, is_far, float(upper), fence


def nearest(
    states: np.ndarray,
    keys: np.ndarray,
    others: np.ndarray,
    other_keys: np.ndarray,
    count: int = NEIGHBOURS,
    rows_at_once: int = _ROWS_AT_ONCE,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of 1 - cosine to the nearest `count` of the rows with other keys, float64 [rows]; and these rows' places."""
    distances, places = np.zeros(len(states)), np.zeros((len(states), count), np.int64)
    for start in range(0, len(states), rows_at_once):
        part = slice(start, start + rows_at_once)
        best = np.full((len(states[part]), count), -np.inf, np.float32)
        at = np.zeros(best.shape, np.int64)
        for first in range(0, len(others), rows_at_once):
            cosines = states[part] @ others[first : first + rows_at_once].T
            cosines[keys[part, None] == other_keys[None, first : first + rows_at_once]] = -np.inf
            both = np.concatenate([best, cosines], axis=1)
            of_both = np.concatenate([at, np.broadcast_to(first + np.arange(cosines.shape[1]), cosines.shape)], axis=1)
            chosen = np.argpartition(both, -count, axis=1)[:, -count:]
            best, at = np.take_along_axis(both, chosen, axis=1), np.take_along_axis(of_both, chosen, axis=1)
        distances[part], places[part] = 1.0 - best.mean(axis=1, dtype=np.float64), at
    return distances, places
