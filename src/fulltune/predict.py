"""Answer with a finished model: a text, many texts, or rows of a file. Stage: imports layers 0 and 1 only."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fulltune import model as models
from fulltune.errors import DataError, SetupError
from fulltune.inference import generate, run_rows
from fulltune.methods import folder as folders
from fulltune.processors import load_processor, opened
from fulltune.recipe import ModelBlock
from fulltune.run_folder import comparison_of
from fulltune.tasks import Example, Target, causal_lm, seq2seq, tags, task_named

_log = logging.getLogger(__name__)

NOTES = folders.NOTES


@dataclass(frozen=True)
class Predictor:
    """A loaded model and what it needs to answer."""

    model: Any
    tokenizer: Any
    notes: Mapping[str, Any]

    @property
    def target(self) -> Target:
        return folders.target_of(self.notes)

    def predict(self, rows: Sequence[Mapping[str, Any]], max_new_tokens: int = 128) -> list[dict[str, Any]]:
        """Answer rows in the columns that the model was trained on.

        Args:
            rows: For classifiers the text column(s), or the image's path or bytes; for multiple choice the choices
                and what is asked; for language models `prompt` or `messages`; for encoder-decoders `source`; for
                taggers the column with the words; for question answering `question` and `context`.
            max_new_tokens: Longest answer of a language model.

        Returns:
            One dictionary a row. Classifiers: `label` (or `labels`, `value`), `probability`, `logits`; probabilities
            use the fitted temperature, logits are the model's own. Multiple choice: `index` and `text` of the choice,
            `probability`, `logits` of all. Language models: `answer`. Taggers: `tokens`, their
            `tags`, and `entities` with `type`, `start` and `end` (numbers of words, `end` excluded), `text` and
            `probability` (that of the least certain word). Question answering: `answer` (empty: there is none), its
            first character `start` in the context, `probability`.
        """
        if not rows:
            return []
        columns = self.target.columns
        column = next((columns[role] for role in ("text", "prompt", "source") if role in columns), None)
        empty = [
            number for number, row in enumerate(rows, start=1) if column and not str(row.get(column) or "").strip()
        ]
        if empty:
            raise DataError(f"predict: row {empty[0]} has no text ({len(empty)} such rows); remove or fill them")
        if self.notes["task"] in ("causal-lm", "seq2seq"):
            prompts = [self._prompt(row) for row in rows]
            made = generate(
                self.model, self.tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=8, precision="fp32"
            )
            return [{"answer": answer} for answer in made]
        if self.notes["task"] == "token-classification":
            return self._tag(rows)
        if self.notes["task"] == "multiple-choice":
            return self._choose(rows)
        if self.notes["task"] == "question-answering":
            return self._find(rows)
        return self._classify(rows)

    def _prompt(self, row: Mapping[str, Any]) -> list[int]:
        if self.notes["task"] == "seq2seq":
            return seq2seq.generation_ids(row, self.target, self.tokenizer, self.notes["max_length"])
        return causal_lm.generation_ids(row, self.target, self.tokenizer)

    def _tag(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        from fulltune.tasks import token_classification

        target, column = self.target, self.target.columns["tokens"]
        sentences = [tags.words(row.get(column)) or [] for row in rows]
        empty = [number for number, words in enumerate(sentences, start=1) if not words]
        if empty:
            raise DataError(f"predict: row {empty[0]} has no words ({len(empty)} such rows); remove or fill them")
        # Tags are not known here; any make `encode` happy and are not used.
        filled = [{column: words, target.columns["tags"]: ["O"] * len(words)} for words in sentences]
        encoded = token_classification.encode(filled, target, self.tokenizer, self.notes["max_length"])
        cut = [number for number, examples in enumerate(encoded, start=1) if examples[0].truncated]
        if cut:
            _log.warning(
                "predict: row %d is longer than %d tokens (%d such rows): the words beyond are not read and get O",
                *(cut[0], self.notes["max_length"], len(cut)),
            )
        features = [dict(examples[0].features) for examples in encoded]
        kept = run_rows(
            self.model,
            features,
            task_named("token-classification"),
            target,
            self.tokenizer.pad_token_id,
            batch_size=32,
            precision="fp32",
        )
        return token_classification.answers(kept, features, sentences, target)

    def _choose(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        from scipy.special import softmax

        from fulltune.tasks import multiple_choice

        target = self.target
        choices = [multiple_choice.choice_texts(row, target) for row in rows]
        wrong = [number for number, texts in enumerate(choices, start=1) if len(texts) != target.num_choices]
        if wrong:
            raise DataError(
                f"predict: row {wrong[0]} has {len(choices[wrong[0] - 1])} choices, expected {target.num_choices} "
                f"({len(wrong)} such rows)"
            )
        logits = self._logits(multiple_choice.encode(rows, target, self.tokenizer, self.notes["max_length"]))
        chances = softmax(logits / float(self.notes.get("temperature", 1.0)), axis=-1)
        return [
            {
                "index": int(row.argmax()),
                "text": texts[int(row.argmax())],
                "probability": float(chance.max()),
                "logits": [float(value) for value in row],
            }
            for row, texts, chance in zip(logits, choices, chances, strict=True)
        ]

    def _find(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        from fulltune.tasks import question_answering

        target = self.target
        # Answers are not known here; a question without one makes `encode` happy.
        filled = [{**row, target.columns["answers"]: None} for row in rows]
        encoded = question_answering.encode(filled, target, self.tokenizer, self.notes["max_length"])
        problems = [
            f"predict: row {number}: {problem.check}: {problem.reason}"
            for number, (row, examples) in enumerate(zip(filled, encoded, strict=True), start=1)
            if (problem := question_answering.refuse(row, target) or examples[0].refused) is not None
        ]
        if problems:
            raise DataError(problems)
        windows = [dict(example.features) for examples in encoded for example in examples]
        numbers = [number for number, examples in enumerate(encoded) for _ in examples]
        kept = run_rows(
            self.model,
            windows,
            task_named("question-answering"),
            target,
            self.tokenizer.pad_token_id,
            batch_size=32,
            precision="fp32",
        )
        contexts = [question_answering.context_of(rows[number], target) for number in numbers]
        found = question_answering.find_answers(kept, windows, numbers, contexts)
        return [found[number] for number in range(len(rows))]

    def _logits(self, encoded: Sequence[Sequence[Example]]) -> np.ndarray:
        """The model's logits [rows, labels or choices] of encoded rows."""
        refused = [examples[0].refused.reason for examples in encoded if examples[0].refused is not None]
        if refused:
            raise DataError([f"predict: {reason}" for reason in refused])
        features = opened([dict(examples[0].features) for examples in encoded], self.tokenizer)
        kept = run_rows(
            self.model,
            features,
            task_named(self.notes["task"]),
            self.target,
            self.tokenizer.pad_token_id,
            batch_size=32,
            precision="fp32",
        )
        return kept["logits"]

    def _classify(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        target, task = self.target, task_named(self.notes["task"])
        # The label column is not known here; any label makes `encode` happy and is not used.
        unused: Any = {"regression": 0.0, "multi_label": []}.get(target.problem_type, (target.labels or ("",))[0])
        filled = [{**row, target.columns["label"]: unused} for row in rows]
        encoded = task.encode(filled, target, self.tokenizer, self.notes["max_length"])
        return [self._answer(logits) for logits in self._logits(encoded)]

    def _answer(self, logits: np.ndarray) -> dict[str, Any]:
        from scipy.special import expit, softmax

        target, temperature = self.target, float(self.notes.get("temperature", 1.0))
        plain = [float(value) for value in logits]
        match target.problem_type:
            case "regression":
                return {"value": plain[0], "logits": plain}
            case "multi_label":
                chances = expit(logits)
                chosen = {name: float(p) for name, p in zip(target.labels, chances, strict=True) if p > 0.5}
                return {"labels": list(chosen), "probabilities": chosen, "logits": plain}
            case _:
                best = int(logits.argmax())
                chance = float(softmax(logits / temperature)[best])
                return {"label": target.labels[best], "probability": chance, "logits": plain}


def load(run: Path, method: str | None = None) -> Predictor:
    """Load the model of a run folder, or a model folder that fulltune wrote.

    Args:
        run: The folder.
        method: Which of a run's models; left out, the only one, or what a comparison's verdict recommends.

    Raises:
        SetupError: When there is no such model.
    """
    return _loaded(folder_of(run, method), None)


def load_side_by_side(runs: Mapping[str, Path], method: str | None = None) -> dict[str, Predictor]:
    """Load what LoRA, adapters, prompts or heads trained for several tasks over one base, which is in memory once.

    While one is loaded, a second copy of the base is in memory for a moment.

    Args:
        runs: Run folders, or model folders that fulltune wrote, by the names that they get.
        method: Which of the runs' models; left out, the only one of each, or what its verdict recommends.

    Raises:
        SetupError: When one is a whole model, or they are not of the same base.
    """
    found = {name: folder_of(run, method) for name, run in runs.items()}
    whole = [name for name, folder in found.items() if not folders.is_partial(folder)]
    if whole:
        raise SetupError(
            f"{whole[0]}: is a whole model ({found[whole[0]]}), which shares nothing with others; name another --method"
        )
    bases = {name: folders.notes_of(folder)["base_model"] for name, folder in found.items()}
    if any(base != next(iter(bases.values())) for base in bases.values()):
        said = ", ".join(f"{name} on {ModelBlock(**base).in_words()}" for name, base in bases.items())
        raise SetupError(f"these models are not of one base: {said}")
    shared: dict[str, Any] = {}
    return {name: _loaded(folder, shared) for name, folder in found.items()}


def _loaded(folder: Path, shared: dict[str, Any] | None) -> Predictor:
    notes = folders.notes_of(folder)
    block = ModelBlock(name=str(folder.resolve()))
    if folders.is_partial(folder):
        model = folders.load(folder, shared=shared).model
    else:
        model = models.load(block, task_named(notes["task"]).AUTO_CLASS, {}, head_is_new=False)
    return Predictor(model.eval(), load_processor(block, notes["task"]), notes)


@dataclass(frozen=True)
class Chosen:
    """The folder of one model."""

    folder: Path
    reason: str = ""
    """Why this one of several; empty: it was named, or is the only one."""


def folder_of(run: Path, method: str | None = None) -> Path:
    """The folder of a run's model, as `choose` chooses it."""
    return choose(run, method).folder


def choose(run: Path, method: str | None = None) -> Chosen:
    """The model that is named, the only one, or the one that a comparison's verdict recommends.

    Raises:
        SetupError: When there is no such model, or several and no verdict that recommends one.
    """
    there = models_of(run)
    names = ", ".join(there)
    if method is not None:
        if method not in there:
            known = f"; here are: {names}" if there else ""
            raise SetupError(f"{run}: no finished model of method '{method}'{known}")
        return Chosen(there[method])
    if (run / NOTES).exists():
        return Chosen(run)
    if not there:
        raise SetupError(f"{run}: no finished model here; expected a run folder with models/full, or a model folder")
    if len(there) == 1:
        return Chosen(next(iter(there.values())))
    found = comparison_of(run)
    if found is None or found.decision.verdict == "UNDECIDED":
        why = "there is no verdict yet" if found is None else "the verdict is UNDECIDED"
        raise SetupError(f"{run}: has several models and {why}; name one with --method: {names}")
    taken, reason = found.decision.recommended, f"the verdict is {found.decision.verdict}"
    if taken not in there:
        raise SetupError(
            f"{run}: {reason} and recommends '{taken}', which is not here; name one with --method: {names}"
        )
    return Chosen(there[taken], reason)


def models_of(run: Path) -> dict[str, Path]:
    """Folders of a run's finished models, by method."""
    return {path.parent.name: path.parent for path in sorted(run.glob(f"models/*/{NOTES}"))}


def rows_from_texts(texts: Sequence[str], notes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Plain texts as rows in the model's columns."""
    columns = notes["columns"]
    if "text_pair" in columns:
        raise DataError("this model reads pairs of texts; give a file with both columns")
    if "messages" in columns:
        return [{columns["messages"]: [{"role": "user", "content": text}]} for text in texts]
    if "tokens" in columns:
        return [{columns["tokens"]: tags.split_text(text)} for text in texts]
    if notes["task"] == "question-answering":
        raise DataError("this model finds answers in a passage; give a file with the columns of question and context")
    if notes["task"] == "multiple-choice":
        raise DataError("this model chooses among texts; give a file with the columns of its choices")
    column = next(columns[role] for role in ("prompt", "source", "image", "text") if role in columns)
    return [{column: text} for text in texts]


def check_columns(rows: Sequence[Mapping[str, Any]], notes: Mapping[str, Any], where: str) -> None:
    """Refuse a file that lacks a column the model reads.

    Raises:
        DataError: Naming the column.
    """
    not_read = ("label", "completion", "tools", "tags", "target", "answers")
    needed = [column for role, column in notes["columns"].items() if role not in not_read]
    missing = [column for column in needed if rows and column not in rows[0]]
    if missing:
        raise DataError(
            f"{where}: no column '{missing[0]}', which the model reads (columns here: {', '.join(rows[0])})"
        )
