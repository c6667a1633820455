"""What the untouched model knows of each item: a row, a word with a tag, a choice, a token that may begin an answer.

One pass over the rows, of pairs three, batch by batch; in memory stays what scikit-learn is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fulltune.inference.run import Share, Watch, autocast, lengths_of, longest_first, mean_hidden, watched
from fulltune.models import evaluating
from fulltune.models.sharding import runs_together
from fulltune.probe.layers import HeadLayers, Seen, see
from fulltune.probe.linear import Items, NoProbe
from fulltune.recipe.tasks import ProblemType, TaskName
from fulltune.records.probe import MOST_ROWS, OTHER_TOKENS, items_per_row, rows_within
from fulltune.system.memory import with_smaller_batches
from fulltune.tasks import Target, Task, question_answering, task_named
from fulltune.tasks.padding import IGNORED
from fulltune.tasks.token_classification import WORD_IDS

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Features:
    """Of items, in the order of their rows; float32 [items, hidden] each."""

    last: np.ndarray | None
    """What the head's last layer reads; None: it was not looked at."""
    dense: np.ndarray | None
    """What its dense layer reads; None: it has none."""
    mean: np.ndarray | None
    """Mean of the last hidden states over tokens, scaled to length 1; None: an item is a token itself, or the body has
    fewer states than there are tokens."""
    labels: np.ndarray
    """Class or number [items]; 0 or 1 for each label [items, labels]; of a choice whether it is right [items]; of a
    token whether the answer begins and ends there [items, 2]."""
    rows: np.ndarray
    """The row of each item [items]."""
    apart: np.ndarray | None = None
    """`compared` of a pair's texts, each read alone, [items, 2 hidden + 1]; None: items are no pairs, or their
    texts are not told apart."""


@dataclass(frozen=True)
class Extractor:
    """Runs prepared rows through the untouched model, and gives the features of their items."""

    model: Any
    """As it was loaded, on its device, before a method was applied."""
    task_name: TaskName
    target: Target
    pad_token_id: int
    batch_size: int
    precision: str
    class_weights: Sequence[float] | None = None
    separators: frozenset[int] = frozenset()
    """Around the texts of a pair; empty: rows are no pairs."""
    watch: Watch = lambda done, total, share: None

    @property
    def task(self) -> Task:
        return task_named(self.task_name)

    @property
    def kind(self) -> ProblemType:
        return self.target.form.name

    @property
    def num_outputs(self) -> int:
        """Logits of an item."""
        return self.target.form.num_outputs or len(self.target.labels)

    def features(self, rows: Any, layers: HeadLayers | None) -> Features:
        """Of all these rows, in smaller batches when memory runs out."""
        return self.within_memory(lambda size: joined(self.passes(rows, layers, size)))

    def within_memory(self, run: Callable[[int], T]) -> T:
        """Call `run` with a number of rows per batch, with fewer when memory runs out. Processes that shard the weights
        run the same batches: one of them cannot take fewer alone, and ends the others with it."""
        if runs_together(self.model):
            return run(self.batch_size)
        return with_smaller_batches("linear probe", self.batch_size, run)

    def items(self, features: np.ndarray, of: Features) -> Items:
        """What a classifier is fitted on."""
        return Items(self.kind, features, of.labels, of.rows, self.num_outputs, self.class_weights)

    def passes(self, rows: Any, layers: HeadLayers | None, batch_size: int, apart: bool = True) -> Iterator[Features]:
        """The features of each batch, longest rows first; without `layers` the means alone, with `apart` also those of
        a pair's texts, each read alone.

        Raises:
            NoProbe: When the head does not show what it reads, or a feature is not finite.
        """
        import torch

        model, lengths = self.model, lengths_of(rows)
        with evaluating(model):
            for positions in watched(longest_first(lengths), batch_size, lengths, self.watch):
                chosen = [rows[i] for i in positions]
                batch, labels = self._collated(chosen)
                with torch.no_grad(), autocast(model, self.precision):
                    seen = see(model, layers, batch)
                    found = _of_items(seen, batch, labels, chosen, self.kind, np.asarray(positions))
                    if apart and self.separators and found.mean is not None:
                        found = replace(found, apart=self._apart(chosen))
                yield found

    def _apart(self, chosen: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """How the texts of pairs differ, each read alone; no pass is larger than the pairs'."""
        texts, means = each_alone(chosen, self.separators), list[Any]()
        for part in (texts[: len(chosen)], texts[len(chosen) :]):
            batch, _ = self._collated(part)
            means.append(_mean(see(self.model, None, batch)[0], batch))
        return _finite(compared(*means).cpu().numpy())

    def _collated(self, rows: Sequence[Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What the model reads, and the labels, which stay on the host."""
        batch = self.task.collate(rows, self.pad_token_id)
        labels = batch["labels"].cpu()
        return {name: one.to(self.model.device) for name, one in batch.items() if name != "labels"}, labels


def sampled(rows: Any, kind: ProblemType, num_choices: int, width: int, most: int = MOST_ROWS) -> Any:
    """As many rows as may be looked at, at most `most`, drawn at random; the rows themselves where these are all. An
    item has `width` values, and a row of choices `num_choices` items."""
    words = float(lengths_of(rows).mean()) if kind == "tags" else 0.0
    most = rows_within(kind, items_per_row(kind, words, num_choices), width, most)
    if len(rows) <= most:
        return rows
    return Share(rows, np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False)).tolist())


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

    hidden, last, dense = seen
    picked: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    match kind:
        case "tags":
            picked = labels != IGNORED
            mean, found = _words(hidden, chosen), labels[picked].numpy()
            counts = picked.sum(dim=1).numpy()
        case "choice":
            mean = _mean(hidden, {name: one.flatten(0, 1) for name, one in batch.items()})
            counts = np.full(len(positions), len(hidden) // len(positions))
            found = np.zeros((len(positions), counts[0]), np.int64)
            found[np.arange(len(positions)), labels.numpy()] = 1
            found = found.ravel()
        case "span":
            places, found = _tokens(labels.numpy(), positions)
            picked = torch.zeros(hidden.shape[:2], dtype=torch.bool)
            picked[places] = True
            counts = picked.sum(dim=1).numpy()
        case _:
            mean, found = _mean(hidden, batch), labels.numpy()
            counts = np.ones(len(positions), np.int64)

    def items(values: torch.Tensor | None) -> np.ndarray | None:
        if values is None:
            return None
        flat = values.reshape(-1, values.shape[-1])
        flat = flat if picked is None else flat[picked.flatten().to(flat.device)]
        return _finite(flat.cpu().numpy())

    return Features(
        items(last),
        items(dense),
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
    """Which tokens of each window are looked at, drawn by the windows' positions, and whether the answer begins and
    ends there, [tokens, 2]."""
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


# ---- the two texts of a pair, each read alone: what models of sentence embeddings compare ------------------------


def separators(tokenizer: Any, target: Target) -> frozenset[int]:
    """Numbers of the tokens that stand around the texts of a pair.

    Returns:
        Empty where rows are no pairs, and where these tokens do not tell the texts apart: a decoder's tokenizer may put
        nothing between two texts.
    """
    if "text_pair" not in target.columns:
        return frozenset()
    names = ("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id")
    found = frozenset(number for name in names if (number := getattr(tokenizer, name, None)) is not None)
    one, other = (half["input_ids"] for half in each_alone([{**tokenizer("a", "a"), "labels": 0}], found))
    return found if len(one) and np.array_equal(one, other) and not found.issuperset(one.tolist()) else frozenset()


def each_alone(rows: Sequence[Mapping[str, Any]], separators: frozenset[int]) -> list[dict[str, Any]]:
    """The first texts of all pairs, then the second ones, each between the tokens that stood around the pair. Where no
    separator stands between words the second text is empty."""
    firsts: list[dict[str, Any]] = []
    seconds: list[dict[str, Any]] = []
    for row in rows:
        ids = np.asarray(row["input_ids"])
        is_word = ~np.isin(ids, tuple(separators))
        begin, end = (int(is_word.argmax()), len(ids) - int(is_word[::-1].argmax())) if is_word.any() else (0, 0)
        inside = is_word[begin:end]
        border = begin + int(inside.argmin()) if not inside.all() else end
        second = border + int(is_word[border:end].argmax()) if border < end else end
        # Some models want as many of their last tokens in each row; without a border those of both texts stand there.
        after = ids[end:] if border < end else ids[-1:]
        for found, text in ((firsts, ids[begin:border]), (seconds, ids[second:end])):
            found.append({"input_ids": np.concatenate([ids[:begin], text, after]), "labels": row["labels"]})
    return [*firsts, *seconds]


def compared(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Difference and product of each dimension of two means of length 1, and their cosine: [rows, 2 hidden + 1]."""
    import torch

    product = first * second
    return torch.cat([(first - second).abs(), product, product.sum(dim=1, keepdim=True)], dim=1)
