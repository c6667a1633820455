from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from fulltune import methods
from fulltune.errors import RecipeError
from fulltune.inference.store import ROW_JSON, make_record_batch
from fulltune.models import packing as model_packing
from fulltune.models.base import Base
from fulltune.models.shapes import position_limit
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.tasks import LENGTH, Target, Task, causal_lm

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Limits:
    """Limits on rows that depend on the model and the methods."""

    max_positions: int | None = None
    """Longest sequence in tokens, or None if unlimited."""
    model_fingerprint: str = ""
    packing_obstacle: Callable[[], str | None] = lambda: "it was not checked"
    """Returns why packed texts would attend to each other, or None if they would not."""
    num_virtual_tokens: int = 0

    @classmethod
    def of(cls, base: Base, recipe: Recipe) -> Limits:
        attention = recipe.model.attn_implementation
        return cls(
            position_limit(base.config) if FACTS[recipe.task].reads == "text" else None,
            base.config_digest(attention),
            lambda: model_packing.why_not_packable(base.config, attention),
            methods.max_virtual_tokens(recipe),
        )


MIN_TEXT_TOKENS = 8


def length_limit(
    recipe: Recipe, task: Task, target: Target, limits: Limits, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, str]:
    """Return the maximum number of tokens per row, and where that limit comes from. Raises `RecipeError` for impossible
    settings."""
    bounds = [limit for limit in (limits.max_positions, tokenizer.model_max_length) if limit and limit < 10**9]
    model_limit = min(bounds, default=10**9)
    cap = causal_lm.BLOCK_LENGTH if target.form.is_raw_text else task.FACTS.length_cap
    if recipe.data.max_length is not None:
        length, why = recipe.data.max_length, "from the recipe"
    elif model_limit <= cap:
        length, why = model_limit, "the model's limit"
    else:
        length, why = cap, f"the default for {recipe.task}"
    if length > model_limit:
        raise RecipeError(
            f"data.max_length: {length} tokens, but the model accepts at most {model_limit}; set data.max_length: "
            f"{model_limit} or less"
        )
    if not limits.num_virtual_tokens:
        return length, why
    if length - limits.num_virtual_tokens < MIN_TEXT_TOKENS:
        raise RecipeError(
            f"data.max_length: {limits.num_virtual_tokens} virtual tokens leave only "
            f"{max(0, length - limits.num_virtual_tokens)} of {length} tokens for the text; expected at "
            f"least {MIN_TEXT_TOKENS}: use fewer virtual tokens, or raise data.max_length"
        )
    return length - limits.num_virtual_tokens, f"{why}, minus {limits.num_virtual_tokens} virtual tokens"


def can_pack(recipe: Recipe, target: Target, limits: Limits, mixed: Collection[Target] = ()) -> tuple[bool, list[str]]:
    """Return whether raw texts share a row, and notes that explain why not. `mixed` holds the targets of mixed-in
    sources; chats and pairs are packed in training. Raises `RecipeError` if packing is required but impossible."""
    wanted, is_raw = recipe.data.packing, target.form.is_raw_text
    if not (wanted or (is_raw and wanted is None)):
        return False, []
    others = sorted({target.form.words for target in mixed if not target.form.is_raw_text})
    if recipe.task != "causal-lm":
        obstacle: str | None = f"only rows of causal-lm are packed, and these are {target.form.words}"
    elif is_raw and others:
        obstacle = f"raw text is packed before training, but rows of another kind are mixed in ({', '.join(others)})"
    else:
        obstacle = "prompt tuning puts virtual tokens before each text" if limits.num_virtual_tokens else None
        obstacle = obstacle or limits.packing_obstacle()
    if obstacle is None:
        return is_raw, []
    if wanted:
        raise RecipeError(f"data.packing: impossible because {obstacle}; remove the setting")
    return False, [f"packing is off because {obstacle}"]


TEXTS_PACKED_TOGETHER = 1_000


def pack_texts(parts: Iterable[pa.RecordBatch], max_length: int) -> Iterator[pa.RecordBatch]:
    """Pack whole tokenised texts into rows of at most `max_length` tokens; yield batches of rows."""
    texts = _iterate_tokenized_texts(parts)
    while several := list(islice(texts, TEXTS_PACKED_TOGETHER)):
        blocks = _fill_rows([len(features["input_ids"]) for features, _ in several], max_length)
        rows = [model_packing.join_texts([several[place][0] for place in block]) for block in blocks]
        lengths = [row | {LENGTH: len(row["input_ids"])} for row in rows]
        yield make_record_batch(lengths, [several[block[0]][1] for block in blocks])


def _fill_rows(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Return the numbers of the texts in each packed row, first-fit decreasing."""
    rows, room = [list[int]() for _ in lengths], [max_length] * len(lengths)
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        at = next(at for at, free in enumerate(room) if free >= lengths[text])
        rows[at].append(text)
        room[at] -= lengths[text]
    return [row for row in rows if row]


def _iterate_tokenized_texts(parts: Iterable[pa.RecordBatch]) -> Iterator[tuple[dict[str, np.ndarray], str]]:
    """Yield each text's input ids and labels, and its source row as JSON."""
    for part in parts:
        ends, columns = part.column("input_ids").offsets.to_numpy(), ("input_ids", "labels")
        flat = {name: part.column(name).values.to_numpy() for name in columns}
        for position, words in enumerate(part.column(ROW_JSON).to_pylist()):
            yield {name: flat[name][ends[position] : ends[position + 1]] for name in columns}, words
