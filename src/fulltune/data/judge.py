"""Rows as the untouched model sees them, and what that says about their labels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fulltune import plan, probe
from fulltune.inference.run import Share
from fulltune.inference.store import Rows, texts
from fulltune.models.base import Base
from fulltune.models.load import load
from fulltune.models.processors import opened
from fulltune.probe.features import sampled
from fulltune.probe.label_errors import Suspected, suspected
from fulltune.probe.layers import NoProbe
from fulltune.probe.linear import Items
from fulltune.probe.part_errors import suspected_parts, word_shapes
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary, SplitName
from fulltune.records.events import Listener, RowsRead
from fulltune.system import hardware
from fulltune.system.out_of_memory import is_out_of_memory
from fulltune.tasks import Target, task_named
from fulltune.tasks.tags import words_and_tags
from fulltune.tasks.token_classification import seen_words

BATCH = 32
OUT_OF_MEMORY = "memory ran out while the untouched model read the rows"


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
    def looker(self) -> probe.Looker:
        """How rows go through the model."""
        import torch

        task, target = task_named(self.recipe.task), Target.of(self.summary)
        device, precision = plan.device_and_precision(self.recipe, hardware.here())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(probe.SEED)  # what the head lacks is drawn, and not read
            changes = task.config_changes(target, self.base.processor)
            model: Any = load(self.base, changes, head_is_new=task.FACTS.head_is_new, block=self.recipe.model)
        return probe.Looker(
            model.to(device),
            self.recipe.task,
            target,
            self.base.processor.pad_token_id,
            BATCH,
            precision,
            watch=self._tell,
            middle=target.form.tags_words,  # see bench/part_noise.py
        )

    def _tell(self, done: int, total: int, share: float | None) -> None:
        self.listener(RowsRead(name="reading rows with the untouched model", done=done, total=total, share=share))

    def items(self, split: SplitName) -> tuple[Items, np.ndarray]:
        """Mean hidden states and labels of a split's rows, or of some drawn at random; and their positions.

        Raises:
            NoProbe: When this model's states say nothing, or memory runs out.
        """
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
            width = getattr(self.looker.model.config.get_text_config(), "hidden_size", None) or 0  # none: convolutions
            if self.looker.kind == "tags":
                width = -(-width // 2)  # one vector of each word is kept, where `sampled` reckons with two
            chosen = sampled(rows, self.looker.kind, self.looker.target.num_choices, width)
            found = self.looker.features(chosen, None)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise NoProbe(OUT_OF_MEMORY) from error
        if found.mean is None:
            raise NoProbe("this model gives fewer states than there are tokens")
        positions = np.array(chosen.positions if isinstance(chosen, Share) else range(len(rows)))
        return self.looker.items(found.mean, found), positions


def judge(reader: Reader) -> tuple[np.ndarray, Suspected] | str:
    """Which train rows have a label that is probably wrong.

    Args:
        reader: Of rows that have a label each, several labels, or words with tags.

    Returns:
        Positions of the rows that were judged, and what is known of their labels; or why they cannot be judged.
    """
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
    folder, columns, wanted = reader.folder / "train", reader.looker.target.columns, {*positions.tolist()}
    prepared = Rows(folder)
    numbers = [seen_words(prepared[position]) for position in positions.tolist()]
    sentences = (words_and_tags(row, columns)[0] for at, row in enumerate(texts(folder)) if at in wanted)
    words = [sentence[at] for sentence, seen in zip(sentences, numbers, strict=True) for at in seen]
    features = np.concatenate([items.features, word_shapes(words, items.rows)], axis=1)
    return replace(items, features=features), numbers
