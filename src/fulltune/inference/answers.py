from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from fulltune.tasks import Row, RowFeatures, Target, Task, Tokenizer


def draw_rows(rows: Iterable[Row], task: Task, target: Target, count: int, seed: int) -> dict[int, Row]:
    """Sample up to `count` rows with different prompts, and return them by their position, in order."""
    first: dict[str, tuple[int, Row]] = {}
    for position, row in enumerate(rows):
        # A conversation may give several examples; a row without a question cannot be answered.
        if task.prompt_text(row, target).strip():
            first.setdefault(task.group_key(row, target), (position, row))
    order = sorted(first, key=lambda prompt: hashlib.sha256(f"{seed}\0{prompt}".encode()).digest())
    return dict(sorted(first[prompt] for prompt in order[:count]))


def tokenised_prompts(
    rows: Mapping[int, Row], encoded: Sequence[RowFeatures], task: Task, target: Target, tokenizer: Tokenizer
) -> list[list[int]]:
    """Return the token ids from which answers to the rows, given by position, are generated."""
    if "source" in target.columns:  # one example per row, truncated as in training
        return [list(map(int, encoded[position]["input_ids"])) for position in rows]
    return [task.generation_ids(row, target, tokenizer) for row in rows.values()]
