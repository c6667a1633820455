"""Answer with a finished model: a text, many texts, or rows of a file. Stage: imports layers 0 and 1 only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fulltune import model as models
from fulltune.errors import DataError, SetupError
from fulltune.inference import generate, run_rows
from fulltune.recipe import ModelBlock
from fulltune.tasks import Target, causal_lm, task_named

NOTES = "fulltune.json"
"""What a model folder must say besides what transformers keeps: task, columns, longest row, temperature."""


@dataclass(frozen=True)
class Predictor:
    """A loaded model and what it needs to answer."""

    model: Any
    tokenizer: Any
    notes: Mapping[str, Any]

    @property
    def target(self) -> Target:
        notes = self.notes
        return Target(notes["problem_type"], notes["columns"], tuple(notes["labels"]), notes["joint"])

    def predict(self, rows: Sequence[Mapping[str, Any]], max_new_tokens: int = 128) -> list[dict[str, Any]]:
        """Answer rows in the columns that the model was trained on.

        Args:
            rows: For classifiers the text column(s); for language models `prompt` or `messages`.
            max_new_tokens: Longest answer of a language model.

        Returns:
            One dictionary a row. Classifiers: `label` (or `labels`, `value`), `probability`, `logits`; probabilities
            use the fitted temperature, logits are the model's own. Language models: `answer`.
        """
        if not rows:
            return []
        column = self.target.columns.get("text") or self.target.columns.get("prompt")
        empty = [
            number for number, row in enumerate(rows, start=1) if column and not str(row.get(column) or "").strip()
        ]
        if empty:
            raise DataError(f"predict: row {empty[0]} has no text ({len(empty)} such rows); remove or fill them")
        if self.notes["task"] == "causal-lm":
            prompts = [causal_lm.generation_ids(row, self.target, self.tokenizer) for row in rows]
            made = generate(
                self.model, self.tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=8, precision="fp32"
            )
            return [{"answer": answer} for answer in made]
        return self._classify(rows)

    def _classify(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        target, task = self.target, task_named("text-classification")
        # The label column is not known here; any label makes `encode` happy and is not used.
        unused: Any = {"regression": 0.0, "multi_label": []}.get(target.problem_type, (target.labels or ("",))[0])
        filled = [{**row, target.columns["label"]: unused} for row in rows]
        encoded = task.encode(filled, target, self.tokenizer, self.notes["max_length"])
        features = [dict(examples[0].features) for examples in encoded]
        kept = run_rows(
            self.model, features, task, target, self.tokenizer.pad_token_id, batch_size=32, precision="fp32"
        )
        return [self._answer(logits) for logits in kept["logits"]]

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


def load(run: Path) -> Predictor:
    """Load the model of a run folder, or a model folder that fulltune wrote.

    Raises:
        SetupError: When there is no such model.
    """
    folders = [run, *sorted((run / "models").glob("*"))] if run.is_dir() else [run]
    folder = next((folder for folder in folders if (folder / NOTES).exists()), None)
    if folder is None:
        raise SetupError(f"{run}: no finished model here; expected a run folder with models/full, or a model folder")
    try:
        notes = json.loads((folder / NOTES).read_text(encoding="utf-8"))
    except ValueError:
        raise SetupError(
            f"{folder / NOTES}: is damaged (not valid JSON); train again, or copy the model again"
        ) from None
    block = ModelBlock(name=str(folder.resolve()))
    model = models.load(block, task_named(notes["task"]).AUTO_CLASS, {}, head_is_new=False)
    return Predictor(model.eval(), models.load_tokenizer(block), notes)


def rows_from_texts(texts: Sequence[str], notes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Plain texts as rows in the model's columns."""
    columns = notes["columns"]
    if "text_pair" in columns:
        raise DataError("this model reads pairs of texts; give a file with both columns")
    if "messages" in columns:
        return [{columns["messages"]: [{"role": "user", "content": text}]} for text in texts]
    column = columns["prompt"] if "prompt" in columns else columns["text"]
    return [{column: text} for text in texts]


def check_columns(rows: Sequence[Mapping[str, Any]], notes: Mapping[str, Any], where: str) -> None:
    """Refuse a file that lacks a column the model reads.

    Raises:
        DataError: Naming the column.
    """
    needed = [column for role, column in notes["columns"].items() if role not in ("label", "completion", "tools")]
    missing = [column for column in needed if rows and column not in rows[0]]
    if missing:
        raise DataError(
            f"{where}: no column '{missing[0]}', which the model reads (columns here: {', '.join(rows[0])})"
        )
