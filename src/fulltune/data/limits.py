"""How long a row may be, and short texts packed into rows of full length, so that nothing is spent on padding."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune import methods
from fulltune.errors import RecipeError
from fulltune.inference.store import WORDS, record_batch
from fulltune.models.base import Base
from fulltune.models.packing import obstacle as packing_obstacle
from fulltune.models.shapes import position_limit
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.tasks import LENGTH, Target, Task, causal_lm

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Limits:
    """What the model says about the rows it can take."""

    positions: int | None = None
    """Longest sequence in tokens."""
    identity: str = ""
    """What tells apart two models that would make other rows of the same files with the same tokenizer."""
    keeps_texts_apart: Callable[[], str | None] = lambda: "it was not checked"
    """Why texts in one row would see each other, or None: asked only for raw text."""
    virtual: int = 0
    """Tokens that prompt tuning puts before each row, out of the same length."""

    @classmethod
    def of(cls, base: Base, recipe: Recipe) -> Limits:
        """What a recipe's model says."""
        attention = recipe.model.attn_implementation
        return cls(
            position_limit(base.config) if FACTS[recipe.task].reads == "text" else None,
            base.identity(attention),
            lambda: packing_obstacle(base.config, attention),
            methods.virtual_tokens(recipe),
        )


LEAST_LENGTH = 8
"""Tokens that virtual ones must leave of a row."""


def longest_row(
    recipe: Recipe, task: Task, target: Target, limits: Limits, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, str]:
    """Longest row in tokens, and why; a shorter longest row makes it smaller afterwards."""
    known = [limit for limit in (limits.positions, tokenizer.model_max_length) if limit and limit < 10**9]
    model_limit = min(known, default=10**9)
    cap = causal_lm.BLOCK_LENGTH if target.form.is_raw_text else task.FACTS.length_cap
    if recipe.data.max_length is not None:
        length, why = recipe.data.max_length, "from the recipe"
    elif model_limit <= cap:
        length, why = model_limit, "the model's limit"
    else:
        length, why = cap, f"the usual bound for {recipe.task}"
    if length > model_limit:
        raise RecipeError(
            f"data.max_length: {length} tokens, but the model takes at most {model_limit}; set data.max_length: "
            f"{model_limit} or less"
        )
    if not limits.virtual:
        return length, why
    if length - limits.virtual < LEAST_LENGTH:
        raise RecipeError(
            f"data.max_length: {limits.virtual} virtual tokens leave {max(0, length - limits.virtual)} of {length} for "
            f"the text; expected at least {LEAST_LENGTH}: take fewer, or set a longer data.max_length"
        )
    return length - limits.virtual, f"{why}, less {limits.virtual} virtual tokens"


def packing(recipe: Recipe, target: Target, limits: Limits, mixed: Collection[Target] = ()) -> tuple[bool, list[str]]:
    """Whether texts share rows, and what is worth knowing about it."""
    wanted, is_raw = recipe.data.packing, target.form.is_raw_text
    if wanted is False:
        return False, []
    others = sorted({one.form.words for one in mixed if not one.form.is_raw_text})
    if not is_raw:
        obstacle: str | None = f"only raw text is packed, and these rows are {target.form.words}"
    elif others:
        obstacle = f"only raw text is packed, and rows of another kind are mixed in ({', '.join(others)})"
    else:
        obstacle = "prompt tuning puts virtual tokens before each text" if limits.virtual else None
        obstacle = obstacle or limits.keeps_texts_apart()
    if obstacle is None:
        return True, []
    if wanted:
        raise RecipeError(f"data.packing: {obstacle}; remove the setting")
    return False, [f"packing is off: {obstacle}"] if is_raw else []


OPEN_BLOCKS = 64
"""Blocks that are filled at the same time: a text goes where it leaves the smallest gap (best fit)."""
_BLOCKS_PER_BATCH = 256


Text = tuple[np.ndarray, np.ndarray, str]
"""Ids, labels and words."""


def pack(parts: Iterable[pa.RecordBatch], max_length: int) -> Iterator[pa.RecordBatch]:
    """Put texts together into blocks of at most `max_length` tokens, with the first one's words; no text is cut."""
    blocks = _fill(parts, max_length)
    while full := list(islice(blocks, _BLOCKS_PER_BATCH)):
        yield record_batch(list(map(_features, full)), [block[0][2] for block in full])


def _features(block: list[Text]) -> dict[str, Any]:
    ids, labels = (np.concatenate([text[of] for text in block]) for of in (0, 1))
    # Position ids that begin again are what tells transformers' models where a text ends.
    positions = np.concatenate([np.arange(len(text[0]), dtype=np.int32) for text in block])
    return {"input_ids": ids, "labels": labels, "position_ids": positions, LENGTH: len(ids)}


def _fill(parts: Iterable[pa.RecordBatch], max_length: int) -> Iterator[list[Text]]:
    """Best fit among the open blocks; when none fits and there are many, the fullest one is closed."""
    opened, room = list[list[Text]](), list[int]()
    for text in _texts(parts):
        at = min((at for at, free in enumerate(room) if free >= len(text[0])), key=room.__getitem__, default=None)
        if at is None:
            if len(opened) == OPEN_BLOCKS:
                fullest = room.index(min(room))
                del room[fullest]
                yield opened.pop(fullest)
            at = len(opened)
            opened.append([])
            room.append(max_length)
        opened[at].append(text)
        room[at] -= len(text[0])
        if not room[at]:
            del room[at]
            yield opened.pop(at)
    yield from opened


def _texts(parts: Iterable[pa.RecordBatch]) -> Iterator[Text]:
    for part in parts:
        ids, labels = (part.column(name) for name in ("input_ids", "labels"))
        ends = ids.offsets.to_numpy()
        flat_ids, flat_labels = ids.values.to_numpy(), labels.values.to_numpy()
        for position, words in enumerate(part.column(WORDS).to_pylist()):
            place = slice(ends[position], ends[position + 1])
            yield flat_ids[place], flat_labels[place], words
