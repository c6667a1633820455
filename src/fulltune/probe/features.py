"""What the untouched model knows of each item: a row, a word with a tag, a choice, a token that may begin an answer.

One pass over the rows, of pairs three, batch by batch; in memory stays what scikit-learn is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.inference.run import Share, Watch, autocast, lengths_of, longest_first, mean_hidden, watched
from fulltune.probe.layers import HeadLayers, NoProbe, Seen, see
from fulltune.probe.pairs import compared, each_alone
from fulltune.recipe.tasks import ProblemType
from fulltune.records.probe import MOST_ROWS, OTHER_TOKENS, items_per_row, rows_within
from fulltune.tasks import Task, question_answering
from fulltune.tasks.padding import IGNORED
from fulltune.tasks.token_classification import WORD_IDS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Features:
    """Of items, in the order of their rows; float32 [items, hidden] each."""

    last: np.ndarray | None
    """What the head's last layer reads; None: it was not looked at."""
    dense: np.ndarray | None
    """What its dense layer reads; None: it has none."""
    mean: np.ndarray | None
    """Mean of the last hidden states (`middle`: of those in the middle) over tokens, scaled to length 1; None: an item
    is a token itself, or the body gives fewer states than there are tokens."""
    labels: np.ndarray
    """Class or number [items]; 0 or 1 for each label [items, labels]; of a choice whether it is right [items]; of a
    token whether the answer begins and ends there [items, 2]."""
    rows: np.ndarray
    """The row of each item [items]."""
    apart: np.ndarray | None = None
    """`pairs.compared` of a pair's texts, each read alone, [items, 2 hidden + 1]; None: items are no pairs, or their
    texts are not told apart."""


def sampled(rows: Any, kind: ProblemType, num_choices: int, width: int, most: int = MOST_ROWS) -> Any:
    """As many rows as may be looked at, drawn at random; the rows themselves where these are all.

    Args:
        rows: Prepared ones.
        kind: What an item is follows from it.
        num_choices: Items of a row, where it has choices.
        width: Values of what is kept of an item.
        most: Rows.
    """
    words = float(lengths_of(rows).mean()) if kind == "tags" else 0.0
    most = rows_within(kind, items_per_row(kind, words, num_choices), width, most)
    if len(rows) <= most:
        return rows
    return Share(rows, np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False)).tolist())


def passes(
    model: Any,
    layers: HeadLayers | None,
    rows: Any,
    task: Task,
    kind: ProblemType,
    pad_token_id: int,
    separators: frozenset[int],
    *,
    batch_size: int,
    precision: str,
    watch: Watch,
    middle: bool = False,
) -> Iterator[Features]:
    """Run the rows through the model, longest first, and give the features of each batch.

    Args:
        model: As it was loaded, on its device.
        layers: Of its head; None: only means are looked at.
        rows: Prepared ones, with labels.
        task: Collates them.
        kind: The problem's type.
        pad_token_id: Fills shorter rows.
        separators: Around the texts of a pair; empty: they are not read apart.
        batch_size: Rows of a pass.
        precision: Of the computations.
        watch: Told how far it is.
        middle: Whether states are those of the layer in the middle, not of the last one.

    Raises:
        NoProbe: When the head does not show what it reads, or a feature is not finite.
    """
    import torch

    lengths = lengths_of(rows)
    was_training = model.training
    model.eval()
    try:
        for positions in watched(longest_first(lengths), batch_size, lengths, watch):
            chosen = [rows[i] for i in positions]
            batch, labels = _on_device(task.collate(chosen, pad_token_id), model.device)
            with torch.no_grad(), autocast(model, precision):
                found = _of_items(see(model, layers, batch, middle), batch, labels, chosen, kind, np.asarray(positions))
                if separators and found.mean is not None:
                    texts, means = each_alone(chosen, separators), list[Any]()
                    for part in (texts[: len(chosen)], texts[len(chosen) :]):  # no pass is larger than the pair's
                        batch, _ = _on_device(task.collate(part, pad_token_id), model.device)
                        means.append(_mean(see(model, None, batch).hidden, batch))
                    found = replace(found, apart=_finite(compared(*means).cpu().numpy()))
            yield found
    finally:
        model.train(was_training)


def _on_device(batch: Mapping[str, torch.Tensor], device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the model reads, and the labels, which stay on the host."""
    return {name: one.to(device) for name, one in batch.items() if name != "labels"}, batch["labels"].cpu()


def joined(parts: Iterable[Features]) -> Features:
    """The features of several batches, in the order of their rows."""
    several = list(parts)
    order = np.argsort(np.concatenate([part.rows for part in several]), kind="stable")

    def whole(name: str) -> Any:
        found = [getattr(part, name) for part in several]
        return None if any(one is None for one in found) else np.concatenate(found)[order]

    return Features(*(whole(field.name) for field in fields(Features)))


def _of_items(
    seen: Seen,
    batch: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    chosen: Sequence[Mapping[str, Any]],
    kind: ProblemType,
    positions: np.ndarray,
) -> Features:
    """What `see` has seen, item by item."""
    import torch

    picked: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    match kind:
        case "tags":
            picked = labels != IGNORED
            mean, found = _words(seen.hidden, chosen), labels[picked].numpy()
            counts = picked.sum(dim=1).numpy()
        case "choice":
            mean = _mean(seen.hidden, {name: one.flatten(0, 1) for name, one in batch.items()})
            counts = np.full(len(positions), len(seen.hidden) // len(positions))
            found = np.zeros((len(positions), counts[0]), np.int64)
            found[np.arange(len(positions)), labels.numpy()] = 1
            found = found.ravel()
        case "span":
            places, found = _tokens(labels.numpy(), positions)
            picked = torch.zeros(seen.hidden.shape[:2], dtype=torch.bool)
            picked[places] = True
            counts = picked.sum(dim=1).numpy()
        case _:
            mean, found = _mean(seen.hidden, batch), labels.numpy()
            counts = np.ones(len(positions), np.int64)

    def items(values: torch.Tensor | None) -> np.ndarray | None:
        if values is None:
            return None
        flat = values[picked.to(values.device)] if picked is not None else values.reshape(-1, values.shape[-1])
        return _finite(flat.cpu().numpy())

    return Features(
        items(seen.last),
        items(seen.dense),
        None if mean is None else _finite(mean.cpu().numpy()),
        found,
        np.repeat(positions, counts),
    )


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise NoProbe("features of the untouched model are not finite")
    return values


def _mean(hidden: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Over real tokens, scaled to length 1; None: a body that pools, such as Funnel's, has fewer states than tokens."""
    import torch.nn.functional as F

    mask = batch.get("attention_mask")
    if mask is not None and hidden.shape[:2] != mask.shape:
        return None
    return F.normalize(mean_hidden(hidden, mask), dim=-1)


def _words(hidden: torch.Tensor, chosen: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """Mean over the sub-words of each word that has one, scaled to length 1: [words of all rows, hidden]."""
    import torch
    import torch.nn.functional as F

    found = []
    for row, states in zip(chosen, hidden, strict=True):
        word_ids = torch.from_numpy(np.array(row[WORD_IDS], np.int64)).to(states.device)
        inside = word_ids >= 0
        words, places = word_ids[inside].unique(return_inverse=True)
        # Scaled to length 1, the sum of a word's sub-words is their mean.
        total = torch.zeros(len(words), states.shape[-1], device=states.device)
        found.append(total.index_add_(0, places, states[: len(inside)][inside]))
    return F.normalize(torch.cat(found), dim=-1)


def _tokens(labels: np.ndarray, positions: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Which tokens of each window are looked at, and whether the answer begins and ends there, [tokens, 2].

    Args:
        labels: labels[windows, 5], as `question_answering` has them.
        positions: Numbers of the windows, from which the other tokens are drawn.
    """
    start, end, first, last = (
        labels[:, getattr(question_answering, name)] for name in ("START", "END", "FIRST", "LAST")
    )
    windows, tokens = [], []
    for number, position in enumerate(positions):
        others = np.random.default_rng(int(position)).integers(first[number], last[number] + 1, OTHER_TOKENS)
        looked_at = np.unique(np.concatenate([others, [start[number], end[number], question_answering.NOWHERE]]))
        windows.append(np.full(len(looked_at), number))
        tokens.append(looked_at)
    window, token = np.concatenate(windows), np.concatenate(tokens)
    return (window, token), np.stack([token == start[window], token == end[window]], axis=1).astype(np.int64)
