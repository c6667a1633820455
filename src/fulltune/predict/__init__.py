from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fulltune.errors import DataError, SetupError
from fulltune.inference.run import Batching, ProgressCallback, generate_answers, run_rows
from fulltune.methods import folder as folders
from fulltune.models.base import Base, with_decoded_images
from fulltune.recipe.model import ModelBlock
from fulltune.recipe.tasks import FACTS
from fulltune.records.plan import Plan
from fulltune.system.hardware import BF16_FROM
from fulltune.system.memory import T, explain_out_of_memory, run_with_smaller_batches
from fulltune.system.run_folder import load_comparison
from fulltune.tasks import Refused, Row, RowAnswer, Target, Task, task_named, token_classification
from fulltune.tasks.columns import in_batches, why_unreadable
from fulltune.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

RowProgress = Callable[[int, int], None]
_WINDOW_PROMPTS = 64
_BATCH, _BATCH_OF_PROMPTS = 32, 8
_REMEDY = "free memory; on a GPU, start the command with CUDA_VISIBLE_DEVICES= to use the CPU instead"


@dataclass(frozen=True)
class PredictedRow:
    """A row's answer, or the reason why there is none."""

    answer: RowAnswer | None
    refused: Refused | None = None
    is_cut: bool = False
    """True if the model read only the beginning of the row."""


@dataclass(eq=False)
class Predictor:
    """A trained model that answers rows."""

    model: PreTrainedModel
    tokenizer: Any
    """The tokenizer, or the `ImageReader` of a model for images."""
    notes: Mapping[str, Any]
    batch_size: int
    """Rows per batch, halved each time memory runs out."""
    precision: str
    streamer: Any = None

    @cached_property
    def task(self) -> Task:
        return task_named(self.notes["task"])

    @cached_property
    def target(self) -> Target:
        return Target.from_notes(self.notes)

    def predict(self, rows: Sequence[Mapping[str, Any] | str], max_new_tokens: int = 128) -> list[RowAnswer]:
        """Answer rows with the columns that the model was trained on; labels are not needed.

        Args:
            rows: Dictionaries, or texts if the model reads one text. Language models read `prompt` or `messages`, image
                classifiers an image's path or bytes.
            max_new_tokens: Maximum length of a generated answer.

        Returns:
            One dictionary per row. Single label: `label`, calibrated `probability`, `probabilities` of all labels.
            Several labels: `labels`, `probabilities`. Numbers: `value`. Multiple choice: `index`, `text`,
            `probability`, and `probabilities` in the order of the choices. Generated text: `answer`. Taggers: `tokens`,
            `tags`, and `entities` with `type`, `start` and `end` (word positions, `end` excluded), `text`,
            `probability` (of the least certain word). Question answering: `answer` (empty if the context has none), its
            first character `start` in the context, `probability`. Embedding: `embedding`. Reranking: `score`.

        Raises:
            DataError: When a row cannot be answered; `answer_each` continues instead.
        """
        if isinstance(rows, str):
            raise DataError("predict: expected a list of rows, found a text; write predict([text])")
        predicted = list(self.answer_each(rows, max_new_tokens))
        refused = [(number, row.refused) for number, row in enumerate(predicted, start=1) if row.refused is not None]
        if refused:
            number, first = refused[0]
            of = f"{counted(len(refused), 'row')} cannot be answered; the first is row {number}"
            raise DataError(f"predict: {of}: {first.reason}. Remove or repair such rows")
        cut = [number for number, row in enumerate(predicted, start=1) if row.is_cut]
        if cut:
            _log.warning(
                "predict: %s truncated; the first, row %d, %s",
                counted(len(cut), "row"),
                cut[0],
                self.describe_truncation(),
            )
        return [row.answer for row in predicted if row.answer is not None]

    def describe_truncation(self) -> str:
        """Return the end of a sentence about a long row: "is longer than ... tokens: the rest is not read"."""
        words = "the remaining words are not read and get the tag O"
        beyond = words if self.target.form.tags_words else "the rest is not read"
        return f"is longer than {self.notes['max_length']} tokens: {beyond}"

    def answer_each(
        self,
        rows: Iterable[Mapping[str, Any] | str],
        max_new_tokens: int = 128,
        report: RowProgress = lambda done, total: None,
    ) -> Iterator[PredictedRow]:
        """Yield each row's answer, or the reason why there is none, reading few rows at a time."""
        writes = self.task.FACTS.writes
        whole = (row_from_text(row, self.notes) if isinstance(row, str) else row for row in rows)
        # Generation is slow: the first answers must not wait for two thousand others.
        for window in in_batches(whole, _WINDOW_PROMPTS) if writes else in_batches(whole):
            questions = [self.task.with_placeholder_answer(row, self.target) for row in window]
            predicted = []
            for row in questions:
                unreadable = why_unreadable(row, self.target.columns)
                why = Refused("unreadable", unreadable) if unreadable else self.task.why_unanswerable(row, self.target)
                predicted.append(PredictedRow(None, why))
            usable = [number for number, row in enumerate(predicted) if row.refused is None]
            rest = [questions[number] for number in usable]
            answers = self._generate_answers(rest, max_new_tokens, report) if writes else self._classify(rest, report)
            for number, answered in zip(usable, answers, strict=True):
                predicted[number] = answered
            yield from predicted

    def _generate_answers(self, rows: Sequence[Row], max_new_tokens: int, report: RowProgress) -> list[PredictedRow]:
        """Generate an answer to each row; if its chat template refuses a row, return the reason instead."""
        prompts = []
        refused: list[Refused | None] = []
        for row in rows:
            try:
                prompts.append(self.task.generation_ids(row, self.target, self.tokenizer, self.notes["max_length"]))
                refused.append(None)
            except DataError as error:
                refused.append(Refused("refused by the chat template", str(error)))
        answers = iter(
            self._run_in_batches(
                lambda batching: generate_answers(self.model, self.tokenizer, prompts, max_new_tokens, batching),
                lambda done, total, share: report(done, total),
            )
        )
        return [PredictedRow(None, why) if why else PredictedRow({"answer": next(answers)}) for why in refused]

    def _classify(self, rows: Sequence[Row], report: RowProgress) -> list[PredictedRow]:
        if not rows:  # tokenizers take no empty list
            return []
        encoded = self.task.encode(rows, self.target, self.tokenizer, self.notes["max_length"])
        no_token = Refused("no token", "the tokenizer returns no tokens")  # it ignores all characters
        refused = [
            first.refused or (no_token if len(first.features.get("input_ids", "?")) == 0 else None)
            for first, *_ in encoded
        ]
        questions = [row for row, why in zip(rows, refused, strict=True) if why is None]
        usable = [examples for examples, why in zip(encoded, refused, strict=True) if why is None]
        answers: Iterator[RowAnswer] = iter(())
        if questions:
            features = [dict(example.features) for examples in usable for example in examples]
            opened_rows, pad = with_decoded_images(features, self.tokenizer), self.tokenizer.pad_token_id
            outputs = self._run_in_batches(
                lambda batching: run_rows(self.model, opened_rows, self.task, self.target, pad, batching),
                lambda done, total, _: report(done * len(questions) // total, len(questions)),
            )
            temperature = float(self.notes.get("temperature", 1.0))
            answers = iter(self.task.answers(outputs, questions, usable, self.target, temperature))
        return [
            PredictedRow(None, why) if why else PredictedRow(next(answers), is_cut=examples[0].truncated)
            for why, examples in zip(refused, encoded, strict=True)
        ]

    def _run_in_batches(self, run: Callable[[Batching], T], on_progress: ProgressCallback) -> T:
        def run_batches(batch_size: int) -> T:
            self.batch_size = batch_size  # later rows start with the size that fits
            return run(Batching(batch_size, self.precision, on_progress=on_progress, streamer=self.streamer))

        with explain_out_of_memory("predict", _REMEDY):
            return run_with_smaller_batches("predict", self.batch_size, run_batches)


# ---- which model ----------------------------------------------------------------------------------------------


def load_predictor(run: Path, method: str | None = None) -> Predictor:
    """Load a model folder, or a run's model. `method` selects a model; default: the only or the recommended one."""
    from fulltune.stream.skeleton import load_within

    folder = choose_model_folder(run, method)[0]
    notes = folders.read_notes(folder)
    usual_batch_size = _BATCH_OF_PROMPTS if FACTS[notes["task"]].writes else _BATCH
    device, batch_size, precision, weights_dtype = _choose_settings(folder, usual_batch_size)
    base = Base.from_block(ModelBlock(name=str(folder.resolve()), weights_dtype=weights_dtype), notes["task"])
    with explain_out_of_memory("predict", _REMEDY):
        if folders.has_only_trained_parameters(folder):
            model = folders.load_method_folder(folder, base.processor).model.to(device)  # type: ignore[arg-type]  # wrapped
        else:
            model = load_within(base, {}, head_is_new=False, device=device)
        return Predictor(model.eval(), base.processor, notes, batch_size, precision)


def _choose_settings(folder: Path, batch_size: int) -> tuple[str, int, str, Literal["fp32", "bf16"]]:
    """Return device, batch size, precision and dtype of the weights: on a GPU, those of the run's plan."""
    import torch

    if not torch.cuda.is_available():
        return "cpu", batch_size, "fp32", "fp32"
    plans = folder.resolve().parent.parent / "plan"
    if not (paths := [*plans.glob(f"{folder.name}.json"), *plans.glob(f"{folder.name}-seed*.json")]):
        return "cuda", batch_size, "fp32", "fp32"
    plan = Plan.load(paths[0])
    is_emulated = plan.precision == "bf16" and torch.cuda.get_device_capability() < BF16_FROM
    precision = "fp32" if is_emulated else plan.precision
    return "cuda", plan.eval_batch_size, precision, plan.weights_dtype


def choose_model_folder(run: Path, method: str | None = None) -> tuple[Path, str]:
    """Return a model's folder, and the reason if a comparison's verdict chose the model, else "". Raise `SetupError` if
    no single model matches."""
    there = {path.parent.name: path.parent for path in sorted(run.glob(f"models/*/{folders.NOTES}"))}
    names = ", ".join(there)
    if method is not None:
        if method not in there:
            here = f"; this folder has: {names}" if there else ""
            raise SetupError(f"{run}: no finished model of method '{method}'{here}")
        return there[method], ""
    if (run / folders.NOTES).exists():
        return run, ""
    if not there and (folds := sorted(run.glob(f"folds/*/models/*/{folders.NOTES}"))):
        raise SetupError(
            f"{run}: has a model for each fold ({len(folds)}); name a fold, such as {run}/folds/1, or train a model on "
            "all rows: fulltune run RECIPE --set data.folds=null"
        )
    if not there:
        what = "no finished model here" if run.is_dir() else "no such folder"
        raise SetupError(
            f"{run}: {what}; expected a run folder with models/full, or a model folder with {folders.NOTES}"
        )
    if len(there) == 1:
        return next(iter(there.values())), ""
    comparison = load_comparison(run)
    decision = comparison.decision if comparison else None
    if decision is None or decision.verdict == "UNDECIDED" or decision.recommended not in there:
        why = f"the verdict {decision.verdict} chooses none of them" if decision else "there is no verdict yet"
        raise SetupError(f"{run}: has several models and {why}; name one with --method: {names}")
    return there[decision.recommended], f"the verdict is {decision.verdict}"


def row_from_text(text: str, notes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with the text in the column that the model reads, or raise `DataError` if the model reads several.
    `notes` come from the model folder."""
    columns, read = notes["columns"], columns_read(notes).values()
    names = ("messages", "tokens", "prompt", "source", "image", "query", "text")
    role = next((name for name in names if name in columns), None)
    if len(read) > 1 or role is None:
        raise DataError(f"this model reads several columns; give rows (or a file) with the columns {', '.join(read)}")
    forms = {"messages": [{"role": "user", "content": text}], "tokens": token_classification.WORD.findall(text)}
    return {columns[role]: forms.get(role, text)}


NOT_READ = ("label", "completion", "tools", "tags", "target", "answers", "negative")


def columns_read(notes: Mapping[str, Any]) -> dict[str, str]:
    read = {role: column for role, column in notes["columns"].items() if role.rstrip("0123456789") not in NOT_READ}
    return dict([*read.items()][:1]) if FACTS[notes["task"]].contrasts else read  # a vector is of one text
