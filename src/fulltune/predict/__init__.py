"""Answer with a finished model: find it, load it, give it texts or rows, many of them in bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fulltune.errors import DataError, SetupError
from fulltune.inference.run import Batching, generate, run_rows
from fulltune.methods import folder as folders
from fulltune.models.base import Base, opened
from fulltune.models.load import load as load_model
from fulltune.recipe.model import ModelBlock
from fulltune.system.run_folder import comparison_of
from fulltune.tasks import Refused, Row, Target, Task, task_named, token_classification
from fulltune.tasks.columns import unreadable, windows

_log = logging.getLogger(__name__)

Watch = Callable[[int, int], None]
"""Told how many rows are done, of how many."""
_WINDOW_PROMPTS = 64
_BATCH, _BATCH_OF_PROMPTS = 32, 8


@dataclass(frozen=True)
class Answered:
    """What became of a row."""

    answer: dict[str, Any] | None
    """As `Predictor.predict` gives it; None: there is none."""
    refused: Refused | None = None
    """Why there is none."""
    is_cut: bool = False
    """The model read only the beginning of the row."""


@dataclass(frozen=True)
class Predictor:
    """A loaded model and what it needs to answer."""

    model: Any
    tokenizer: Any
    notes: Mapping[str, Any]

    @cached_property
    def task(self) -> Task:
        """The model's task."""
        return task_named(self.notes["task"])

    @cached_property
    def target(self) -> Target:
        """What the model learned."""
        return Target.from_notes(self.notes)

    def predict(self, rows: Sequence[Mapping[str, Any]], max_new_tokens: int = 128) -> list[dict[str, Any]]:
        """Answer rows in the columns that the model was trained on.

        Args:
            rows: For classifiers the text column(s), or the image's path or bytes; for multiple choice the choices
                and what is asked; for language models `prompt` or `messages`; for encoder-decoders `source`; for
                taggers the column with the words; for question answering `question` and `context`.
            max_new_tokens: Longest answer of a language model.

        Returns:
            One dictionary a row. Classifiers: `label` with its `probability` and the `probabilities` of all labels
            (several labels: `labels` and `probabilities`; numbers: `value`); those of a single label use the fitted
            temperature. Multiple choice: `index` and `text` of the choice, `probability`, `probabilities` of all in
            their order. Language models: `answer`. Taggers: `tokens`, their `tags`, and `entities` with `type`,
            `start` and `end` (numbers of words, `end` excluded), `text` and `probability` (that of the least certain
            word). Question answering: `answer` (empty: there is none), its first character `start` in the context,
            `probability`.

        Raises:
            DataError: When a row cannot be answered; `answer_each` goes on with the next one.
        """
        found = list(self.answer_each(rows, max_new_tokens))
        refused = [(number, row.refused) for number, row in enumerate(found, start=1) if row.refused is not None]
        if refused:
            number, first = refused[0]
            raise DataError(f"predict: row {number}: {first.reason} ({len(refused)} such rows); remove or repair them")
        cut = [number for number, row in enumerate(found, start=1) if row.is_cut]
        if cut:
            _log.warning("predict: row %d %s (%d such rows)", cut[0], self.cut_in_words(), len(cut))
        return [row.answer for row in found if row.answer is not None]

    def cut_in_words(self) -> str:
        """What happens to a row that is too long."""
        words = "the words beyond are not read and get O"
        beyond = words if self.target.form.tags_words else "what is beyond is not read"
        return f"is longer than {self.notes['max_length']} tokens: {beyond}"

    def answer_each(
        self, rows: Iterable[Mapping[str, Any]], max_new_tokens: int = 128, watch: Watch = lambda done, total: None
    ) -> Iterator[Answered]:
        """Answer rows in their order, a window of them in memory; one that cannot be answered says why."""
        writes = self.task.FACTS.writes
        # Models that write take long for each row: their first answers shall not wait for two thousand others.
        for window in windows(rows, _WINDOW_PROMPTS) if writes else windows(rows):
            asked = [self.task.as_question(row, self.target) for row in window]
            found = [Answered(None, self._refused(row)) for row in asked]
            usable = [number for number, row in enumerate(found) if row.refused is None]
            rest = [asked[number] for number in usable]
            answers = self._write(rest, max_new_tokens, watch) if writes else self._read(rest, watch)
            for number, answered in zip(usable, answers, strict=True):
                found[number] = answered
            yield from found

    def _refused(self, row: Row) -> Refused | None:
        """Why there can be no answer, as far as the row alone shows it."""
        if reason := unreadable(row, self.target.columns):
            return Refused("unreadable", reason)
        return self.task.refuse_question(row, self.target)

    def _write(self, rows: Sequence[Row], max_new_tokens: int, watch: Watch) -> list[Answered]:
        """Answers that the model generates."""
        prompts = []
        refused: list[Refused | None] = []
        for row in rows:
            try:
                prompts.append(self.task.generation_ids(row, self.target, self.tokenizer, self.notes["max_length"]))
                refused.append(None)
            except DataError as error:
                refused.append(Refused("refused by the chat template", str(error)))
        answers = iter(
            generate(
                self.model,
                self.tokenizer,
                prompts,
                max_new_tokens,
                Batching(_BATCH_OF_PROMPTS, watch=lambda done, total, share: watch(done, total)),
            )
        )
        return [Answered(None, why) if why else Answered({"answer": next(answers)}) for why in refused]

    def _read(self, rows: Sequence[Row], watch: Watch) -> list[Answered]:
        """Answers from what a head gives."""
        if not rows:  # tokenizers take no empty list
            return []
        encoded = self.task.encode(rows, self.target, self.tokenizer, self.notes["max_length"])
        no_token = Refused("no token", "the tokenizer makes no token of it")  # it leaves out all its characters
        refused = [
            one.refused or (no_token if "input_ids" in one.features and not len(one.features["input_ids"]) else None)
            for one, *_ in encoded
        ]
        asked = [row for row, why in zip(rows, refused, strict=True) if why is None]
        usable = [examples for examples, why in zip(encoded, refused, strict=True) if why is None]
        answers: Iterator[dict[str, Any]] = iter(())
        if asked:
            features = [dict(example.features) for examples in usable for example in examples]
            batching = Batching(_BATCH, watch=lambda done, total, _: watch(done * len(asked) // total, len(asked)))
            opened_rows, pad = opened(features, self.tokenizer), self.tokenizer.pad_token_id
            kept = run_rows(self.model, opened_rows, self.task, self.target, pad, batching)
            temperature = float(self.notes.get("temperature", 1.0))
            answers = iter(self.task.answers(kept, asked, usable, self.target, temperature))
        return [
            Answered(None, why) if why else Answered(next(answers), is_cut=examples[0].truncated)
            for why, examples in zip(refused, encoded, strict=True)
        ]


# ---- which model ----------------------------------------------------------------------------------------------


def load(run: Path, method: str | None = None) -> Predictor:
    """Load the model of a run folder (by default its only or its recommended one), or of a model folder."""
    folder = choose(run, method)[0]
    notes = folders.notes_of(folder)
    base = Base.of(ModelBlock(name=str(folder.resolve())), notes["task"])
    if folders.is_partial(folder):
        model = folders.load(folder, base.processor).model
    else:
        model = load_model(base, {}, head_is_new=False)
    return Predictor(model.eval(), base.processor, notes)


def choose(run: Path, method: str | None = None) -> tuple[Path, str]:
    """The folder of the model that is named, the only one, or the one that a comparison recommends, and why."""
    there = models_of(run)
    names = ", ".join(there)
    if method is not None:
        if method not in there:
            known = f"; here are: {names}" if there else ""
            raise SetupError(f"{run}: no finished model of method '{method}'{known}")
        return there[method], ""
    if (run / folders.NOTES).exists():
        return run, ""
    if not there:
        raise SetupError(f"{run}: no finished model here; expected a run folder with models/full, or a model folder")
    if len(there) == 1:
        return next(iter(there.values())), ""
    found = comparison_of(run)
    if found is None or found.decision.verdict == "UNDECIDED":
        why = "there is no verdict yet" if found is None else "the verdict is UNDECIDED"
        raise SetupError(f"{run}: has several models and {why}; name one with --method: {names}")
    taken, reason = found.decision.recommended, f"the verdict is {found.decision.verdict}"
    if taken not in there:
        raise SetupError(
            f"{run}: {reason} and recommends '{taken}', which is not here; name one with --method: {names}"
        )
    return there[taken], reason


def models_of(run: Path) -> dict[str, Path]:
    """Folders of a run's finished models, by method."""
    return {path.parent.name: path.parent for path in sorted(run.glob(f"models/*/{folders.NOTES}"))}


def row_from_text(text: str, notes: Mapping[str, Any]) -> dict[str, Any]:
    """A plain text as a row in the model's columns."""
    columns, read = notes["columns"], columns_read(notes)
    if len(read) > 1:
        raise DataError(f"this model reads several columns of a row, give a file with them: {', '.join(read)}")
    role = next(role for role in ("messages", "tokens", "prompt", "source", "image", "text") if role in columns)
    forms = {"messages": [{"role": "user", "content": text}], "tokens": token_classification.WORD.findall(text)}
    return {columns[role]: forms.get(role, text)}


NOT_READ = ("label", "completion", "tools", "tags", "target", "answers")
"""Roles of columns that only training reads."""


def columns_read(notes: Mapping[str, Any]) -> list[str]:
    """Columns that each row must have to be answered."""
    return [column for role, column in notes["columns"].items() if role not in NOT_READ]
