"""Rows in, answers out: many rows in bounded memory, and a row that cannot be answered says why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fulltune.errors import DataError
from fulltune.inference.run import generate, run_rows
from fulltune.methods import folder as folders
from fulltune.models.processors import opened
from fulltune.recipe.tasks import FACTS
from fulltune.tasks import Example, Refused, Row, Target, causal_lm, chat, seq2seq, tags, task_named
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
    def target(self) -> Target:
        """What the model learned."""
        return folders.target_of(self.notes)

    @property
    def writes(self) -> bool:
        """Whether answers are generated, token by token."""
        return FACTS[self.notes["task"]].writes

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
        refused = [(number, one.refused) for number, one in enumerate(found, start=1) if one.refused is not None]
        if refused:
            number, first = refused[0]
            raise DataError(f"predict: row {number}: {first.reason} ({len(refused)} such rows); remove or repair them")
        cut = [number for number, one in enumerate(found, start=1) if one.is_cut]
        if cut:
            _log.warning("predict: row %d %s (%d such rows)", cut[0], self.cut_in_words(), len(cut))
        return [one.answer for one in found if one.answer is not None]

    def cut_in_words(self) -> str:
        """What happens to a row that is too long."""
        beyond = (
            "the words beyond are not read and get O"
            if self.notes["task"] == "token-classification"
            else ("what is beyond is not read")
        )
        return f"is longer than {self.notes['max_length']} tokens: {beyond}"

    def answer_each(
        self, rows: Iterable[Mapping[str, Any]], max_new_tokens: int = 128, watch: Watch = lambda done, total: None
    ) -> Iterator[Answered]:
        """Answer rows one after another, in their order; one that cannot be answered says why.

        Only a window of the rows is in memory; within it, rows of similar length are read together.

        Args:
            rows: As for `predict`.
            max_new_tokens: Longest answer of a language model.
            watch: Told how many rows of how many in the window are done.
        """
        # Models that write take long for each row: their first answers shall not wait for two thousand others.
        for window in windows(rows, _WINDOW_PROMPTS) if self.writes else windows(rows):
            yield from self._answered(window, max_new_tokens, watch)

    def _answered(self, rows: Sequence[Row], max_new_tokens: int, watch: Watch) -> list[Answered]:
        filled = [self._filled(row) for row in rows]
        found = [Answered(None, self._refused(row)) for row in filled]
        usable = [number for number, one in enumerate(found) if one.refused is None]
        if self.writes:
            written = self._write([filled[number] for number in usable], max_new_tokens, watch)
            for number, answered in zip(usable, written, strict=True):
                found[number] = answered
            return found
        task = task_named(self.notes["task"])
        encoded: dict[int, list[Example]] = {}
        if usable:
            asked = [filled[number] for number in usable]
            made = task.encode(asked, self.target, self.tokenizer, self.notes["max_length"])
            encoded = dict(zip(usable, made, strict=True))
        for number, examples in list(encoded.items()):
            refused = examples[0].refused or _without_tokens(examples[0])
            if refused is not None:
                found[number] = Answered(None, refused)
                del encoded[number]
        if encoded:
            chosen = [filled[number] for number in encoded]
            answers = self._answers(chosen, list(encoded.values()), watch)
            for (number, examples), answer in zip(encoded.items(), answers, strict=True):
                found[number] = Answered(answer, is_cut=examples[0].truncated)
        return found

    def _filled(self, row: Row) -> Row:
        """The row with something in the place of what is not known yet: the task's checks ask for it, nothing uses
        it."""
        target, columns = self.target, self.target.columns
        match target.problem_type:
            case "tags":
                words = tags.words(row.get(columns["tokens"]))
                given = row.get(columns["tokens"]) if words is None else words
                return {columns["tokens"]: given, columns["tags"]: ["O"] * len(words or ())}
            case "span":
                return {**row, columns["answers"]: None}
            case "prompt_completion":
                return {**row, columns["completion"]: "?"}
            case "source_target":
                return {**row, columns["target"]: "?"}
            case "chat" | "text" | "choice":
                return row
        unused: Any = {"regression": 0.0, "multi_label": []}.get(target.problem_type, (target.labels or ("",))[0])
        return {**row, columns["label"]: unused}

    def _refused(self, row: Row) -> Refused | None:
        """Why there can be no answer, as far as the row alone shows it."""
        from fulltune.tasks import multiple_choice

        if reason := unreadable(row, self.target.columns):
            return Refused("unreadable", reason)
        match self.target.problem_type:
            case "choice":
                return multiple_choice.refuse_choices(row, self.target)
            case "chat":
                try:
                    asked = causal_lm.prompt_text(row, self.target)
                except DataError as error:
                    return Refused("no conversation", str(error))
                return None if asked.strip() else Refused("no text", "no message asks anything")
        return task_named(self.notes["task"]).refuse(row, self.target)

    def _write(self, rows: Sequence[Row], max_new_tokens: int, watch: Watch) -> list[Answered]:
        prompts: list[list[int]] = []
        found: list[Answered | None] = []
        for row in rows:
            try:
                prompts.append(self._prompt(row))
                found.append(None)
            except chat.TemplateRefusal as error:
                found.append(Answered(None, Refused("refused by the chat template", str(error))))
        answers = iter(
            generate(
                self.model,
                self.tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                batch_size=_BATCH_OF_PROMPTS,
                precision="fp32",
                watch=lambda done, total, share: watch(done, total),
            )
        )
        return [Answered({"answer": next(answers)}) if one is None else one for one in found]

    def _prompt(self, row: Row) -> list[int]:
        if self.notes["task"] == "seq2seq":
            return seq2seq.generation_ids(row, self.target, self.tokenizer, self.notes["max_length"])
        return causal_lm.generation_ids(row, self.target, self.tokenizer)

    def _answers(
        self, rows: Sequence[Row], encoded: Sequence[Sequence[Example]], watch: Watch
    ) -> Sequence[dict[str, Any]]:
        """Answers to rows that were tokenised."""
        from fulltune.tasks import question_answering, token_classification

        target = self.target
        features = [dict(example.features) for examples in encoded for example in examples]
        kept = run_rows(
            self.model,
            opened(features, self.tokenizer),
            task_named(self.notes["task"]),
            target,
            self.tokenizer.pad_token_id,
            batch_size=_BATCH,
            precision="fp32",
            watch=lambda done, total, share: watch(done * len(rows) // total, len(rows)),
        )
        match target.problem_type:
            case "tags":
                return token_classification.answers(
                    kept, features, [row[target.columns["tokens"]] for row in rows], target
                )
            case "span":
                # A long context is several windows.
                numbers = [number for number, examples in enumerate(encoded) for _ in examples]
                contexts = [question_answering.context_of(rows[number], target) for number in numbers]
                found = question_answering.find_answers(kept, features, numbers, contexts)
                return [found[number] for number in range(len(rows))]
            case "choice":
                return self._choices(rows, kept["logits"])
        return self._labels(kept["logits"])

    def _choices(self, rows: Sequence[Row], logits: np.ndarray) -> list[dict[str, Any]]:
        from fulltune.tasks import multiple_choice

        return [
            {
                "index": best,
                "text": multiple_choice.choice_texts(row, self.target)[best],
                "probability": chances[best],
                "probabilities": chances,
            }
            for row, best, chances in zip(
                rows, logits.argmax(axis=-1).tolist(), self._calibrated(logits).tolist(), strict=True
            )
        ]

    def _calibrated(self, logits: np.ndarray) -> np.ndarray:
        """Probabilities of single labels or choices, with the fitted temperature."""
        from scipy.special import softmax

        found: np.ndarray = softmax(logits.astype(np.float64) / float(self.notes.get("temperature", 1.0)), axis=-1)
        return found

    def _labels(self, logits: np.ndarray) -> list[dict[str, Any]]:
        from scipy.special import expit

        labels = self.target.labels
        match self.target.problem_type:
            case "regression":
                return [{"value": value} for value in logits[:, 0].tolist()]
            case "multi_label":
                return [
                    {
                        "labels": [name for name, chance in zip(labels, chances, strict=True) if chance > 0.5],
                        "probabilities": dict(zip(labels, chances, strict=True)),
                    }
                    for chances in expit(logits.astype(np.float64)).tolist()
                ]
        return [
            {
                "label": labels[best],
                "probability": chances[best],
                "probabilities": dict(zip(labels, chances, strict=True)),
            }
            for best, chances in zip(logits.argmax(axis=-1).tolist(), self._calibrated(logits).tolist(), strict=True)
        ]


def _without_tokens(example: Example) -> Refused | None:
    """Texts of nothing but characters that the tokenizer leaves out have no token."""
    ids = example.features.get("input_ids")
    return Refused("no token", "the tokenizer makes no token of it") if ids is not None and not len(ids) else None
