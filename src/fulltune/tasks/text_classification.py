"""Text classification: one label, several labels, or a number; encoders and decoders."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.recipe import tasks as recipe_tasks
from fulltune.recipe.data import DataBlock
from fulltune.records.data import Preview, Segment
from fulltune.records.scores import Answer
from fulltune.tasks import LENGTH, Example, LossSettings, Predictions, Refused, Row, Target
from fulltune.tasks.columns import as_text, is_blank, named, normalised, required
from fulltune.tasks.labels import find_target as find_target
from fulltune.tasks.labels import is_beyond, is_broken_list, is_empty, label_list, label_name, parsed_number
from fulltune.tasks.padding import mask, padded

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

FACTS = recipe_tasks.FACTS["text-classification"]

# ---- columns and labels ----------------------------------------------------------------------------------------


def find_columns(columns: Sequence[str], sample: Sequence[Row], data: DataBlock, where: str) -> dict[str, str]:
    """Columns for `text`, `label` and, when there is one, `text_pair`."""
    label = required("label", data.label, columns, where)
    rest = [column for column in columns if column != label]
    if data.text is None and data.text_pair is None and (pair := _usual_pair(rest)) is not None:
        return {"text": pair[0], "text_pair": pair[1], "label": label}
    text = data.text
    if text is None and named("text", None, rest, where) is None:
        text = _longest_text_column(rest, sample)
    found = {"text": required("text", text, rest, where), "label": label}
    if data.text_pair is not None:
        found["text_pair"] = required("text_pair", data.text_pair, rest, where)
    return found


USUAL_PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
    ("query", "passage"),
    ("question", "sentence"),
)
"""Names of two columns that are read together: those of GLUE and its like."""


def _usual_pair(columns: Sequence[str]) -> tuple[str, str] | None:
    by_lower = {column.lower().strip(): column for column in columns} | {column: column for column in columns}
    return next(((by_lower[one], by_lower[two]) for one, two in USUAL_PAIRS if {one, two} <= set(by_lower)), None)


def _longest_text_column(columns: Sequence[str], sample: Sequence[Row]) -> str | None:
    lengths = {
        column: sum(len(row[column]) for row in sample if isinstance(row.get(column), str)) for column in columns
    }
    best = max(lengths, key=lambda column: lengths[column], default=None)
    return best if best is not None and lengths[best] >= 10 * max(1, len(sample)) else None


# ---- rows ------------------------------------------------------------------------------------------------------


def refuse(row: Row, target: Target) -> Refused | None:
    """Rows without text or without a target are left out."""
    for role in ("text", "text_pair"):
        column = target.columns.get(role)
        if column is not None and isinstance(row.get(column), (list, tuple, dict)):
            return Refused("no text", f"column '{column}' holds a list or an object, not text")
    if is_blank(as_text(row.get(target.columns["text"]))):
        return Refused("no text", f"column '{target.columns['text']}' is empty")
    value = row.get(target.columns["label"])
    if target.problem_type != "multi_label" and is_empty(value):
        return Refused("no label", f"column '{target.columns['label']}' is empty")
    if target.problem_type == "multi_label" and value is None:
        return Refused("no label", f"column '{target.columns['label']}' is empty")
    if target.problem_type == "regression" and parsed_number(value) is None:
        expected = "a number of at most 32 bits (up to 3.4e38)" if is_beyond(value) else "a number"
        return Refused(
            "no number", f"column '{target.columns['label']}' holds {str(value)[:60]!r}, expected {expected}"
        )
    if target.problem_type == "multi_label" and is_broken_list(value):
        return Refused(
            "no list", f"column '{target.columns['label']}' holds {str(value)[:60]!r}, expected a whole list"
        )
    return None


def row_labels(row: Row, target: Target) -> list[str]:
    """The class names of a row; empty for regression."""
    value = row.get(target.columns["label"])
    if target.problem_type == "regression":
        return []
    return sorted(set(label_list(value))) if target.problem_type == "multi_label" else [label_name(value)]


def group_key(row: Row, target: Target) -> str:
    return normalised(" \0 ".join(_texts(row, target)))


def _texts(row: Row, target: Target) -> list[str]:
    return [as_text(row.get(target.columns[role])) for role in ("text", "text_pair") if role in target.columns]


def encode(
    rows: Sequence[Row], target: Target, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[list[Example]]:
    """Tokenise texts (or pairs) and turn the label into an id, a 0/1 vector [labels] or a float."""
    texts = [_texts(row, target) for row in rows]
    # Encoded without a limit first: only so can truncation be counted.
    tokens = tokenizer(*map(list, zip(*texts, strict=True)), **_WANTED)
    names = [name for name in tokenizer.model_input_names if name in tokens and _says_something(tokens[name], target)]
    ids = {name: position for position, name in enumerate(target.labels)}
    encoded = []
    for position, row in enumerate(rows):
        features = {name: tokens[name][position] for name in names}
        is_cut = len(features["input_ids"]) > max_length
        if is_cut:
            cut = tokenizer(*texts[position], truncation=True, max_length=max_length, **_WANTED)
            features = {name: cut[name] for name in names}
        features["labels"] = _label_value(row, target, ids)
        encoded.append([Example(features, trained_tokens=1, truncated=is_cut)])
    return encoded


_WANTED: Any = {"return_attention_mask": False, "verbose": False}


def _says_something(values: Sequence[Sequence[int]], target: Target) -> bool:
    """Token types of a single text are 0 everywhere, which is what models assume without them."""
    return "text_pair" in target.columns or any(any(row) for row in values)


def _label_value(row: Row, target: Target, ids: Mapping[str, int]) -> int | float | list[float]:
    if target.problem_type == "regression":
        number = parsed_number(row[target.columns["label"]])
        assert number is not None, "refuse() leaves out rows without a number"
        return number
    names = row_labels(row, target)
    if target.problem_type == "single_label":
        return ids[names[0]]
    chosen = {ids[name] for name in names}
    return [1.0 if position in chosen else 0.0 for position in range(len(ids))]


def preview(features: Mapping[str, Any], target: Target, tokenizer: PreTrainedTokenizerBase) -> Preview:
    text = str(tokenizer.decode(features["input_ids"]))
    return Preview(segments=(Segment(text=text, trained=False),), label=label_words(features["labels"], target))


def label_words(value: Any, target: Target) -> str:
    """A label value in words."""
    if target.problem_type == "regression":
        return f"{float(value):g}"
    if target.problem_type == "single_label":
        return target.labels[int(value)]
    chosen = [name for name, present in zip(target.labels, value, strict=True) if present >= 0.5]
    return ", ".join(chosen) or "(none)"


# ---- model -----------------------------------------------------------------------------------------------------


def check_model(config: PretrainedConfig) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    if config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return None
    return f"a '{config.model_type}' model cannot classify texts; take an encoder (BERT-like) or a decoder (GPT-like)"


def config_changes(target: Target, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Head size, label names and, for decoders, the padding token that finds the last real token."""
    names = target.labels or ("value",)
    kinds = {"single_label": "single_label_classification", "multi_label": "multi_label_classification"}
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: position for position, name in enumerate(names)},
        "problem_type": kinds.get(target.problem_type, "regression"),
        "pad_token_id": tokenizer.pad_token_id,
    }


def collate(features: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    import torch

    batch = {
        name: padded([row[name] for row in features], pad_token_id if name == "input_ids" else 0)
        for name in features[0]
        if name not in ("labels", "attention_mask", LENGTH)
    }
    batch["attention_mask"] = mask([row["input_ids"] for row in features])
    values = [row["labels"] for row in features]
    kind = np.int64 if isinstance(values[0], (int, np.integer)) else np.float32
    batch["labels"] = torch.from_numpy(np.array(values, dtype=kind))
    return batch


def loss(logits: torch.Tensor, labels: torch.Tensor, target: Target, settings: LossSettings) -> torch.Tensor:
    """Cross entropy, binary cross entropy averaged over labels, or squared error; summed over rows."""
    import torch.nn.functional as F

    return row_losses(logits, labels, target, settings, F).sum()


def row_losses(logits: Any, labels: Any, target: Target, settings: LossSettings, F: Any) -> Any:
    """Loss of each row, [batch]."""
    logits = logits.float()
    weights = None if settings.class_weights is None else logits.new_tensor(list(settings.class_weights))
    match target.problem_type:
        case "regression":
            return F.mse_loss(logits.squeeze(-1), labels, reduction="none")
        case "multi_label":
            smooth = settings.label_smoothing
            soft = labels * (1 - smooth) + smooth / 2
            return F.binary_cross_entropy_with_logits(logits, soft, pos_weight=weights, reduction="none").mean(dim=-1)
        case _:
            return F.cross_entropy(
                logits, labels, weight=weights, label_smoothing=settings.label_smoothing, reduction="none"
            )


def count_items(labels: torch.Tensor) -> int:
    return labels.shape[0]


# ---- evaluation ------------------------------------------------------------------------------------------------


def reduce(logits: torch.Tensor, labels: torch.Tensor, target: Target) -> dict[str, torch.Tensor]:
    """Keep `logits` [batch, labels] as float32, `labels` and the plain `loss` [batch]: small whatever the length."""
    import torch.nn.functional as F

    losses = row_losses(logits, labels, target, LossSettings(), F)
    return {"logits": logits.float(), "labels": labels, "loss": losses}


def metrics(kept: Predictions, target: Target) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews' coefficient; or F1 over labels; or R² and rank correlations."""
    predicted = predict_labels(kept["logits"], target)
    values = label_metrics(kept["labels"], predicted, target)
    if "loss" in kept:
        values["loss"] = float(np.mean(kept["loss"]))
    return values


def label_metrics(true: np.ndarray, predicted: np.ndarray, target: Target) -> dict[str, float]:
    """The metrics that need only labels, so that baselines without probabilities have them too.

    A bootstrap computes them a thousand times: those of classes come from counts, with scikit-learn's values at a
    hundredth of its time. A class that nothing was found of and nothing expected of is left out of the macro mean of
    single labels, and counts as 0 in that of several labels, as in scikit-learn.

    Args:
        true: Class ids [rows], a 0/1 matrix [rows, labels], or numbers [rows].
        predicted: The same, of the model.
        target: Says which of the three.
    """
    match target.problem_type:
        case "regression":
            both = true.astype(np.float64), predicted.astype(np.float64)
            return {name: metric(*both) for name, metric in NUMBER_METRICS.items()}
        case "multi_label":
            counts = np.stack([(true * predicted).sum(axis=0), predicted.sum(axis=0), true.sum(axis=0)])
            return {
                "f1_micro": float(_f1(counts.sum(axis=1))),
                "f1_macro": float(_f1(counts).mean()),
                "accuracy": float((true == predicted).all(axis=1).mean()),
            }
        case _:
            classes = int(max(true.max(), predicted.max())) + 1
            right, found, expected = (
                np.bincount(ids, minlength=classes).astype(np.float64)
                for ids in (true[true == predicted], predicted, true)
            )
            present = found + expected > 0
            return {
                "accuracy": float(right.sum() / len(true)),
                "f1_macro": float(_f1(np.stack([right, found, expected])[:, present]).mean()),
                "mcc": _matthews(right, found, expected),
            }


def _f1(counts: np.ndarray) -> np.ndarray:
    """Of right, found and expected ones, [3, ...]; 0 where there is neither."""
    both = counts[1] + counts[2]
    return np.divide(2 * counts[0], both, out=np.zeros(both.shape), where=both != 0)


def _matthews(right: np.ndarray, found: np.ndarray, expected: np.ndarray) -> float:
    """Matthews' coefficient of several classes (Gorodkin 2004), each array [classes]; 0 where only one class occurs."""
    rows = expected.sum()
    scale = (rows**2 - (found**2).sum()) * (rows**2 - (expected**2).sum())
    return float((right.sum() * rows - (found * expected).sum()) / math.sqrt(scale)) if scale > 0 else 0.0


def _r2(true: np.ndarray, predicted: np.ndarray) -> float:
    """As scikit-learn has it: where all targets are equal, 1 for the right answer and 0 for any other."""
    if len(true) < 2:
        return math.nan
    error, spread = ((true - predicted) ** 2).sum(), ((true - true.mean()) ** 2).sum()
    return float(1 - error / spread) if spread > 0 else float(error == 0)


def _spearman(true: np.ndarray, predicted: np.ndarray) -> float:
    from scipy.stats import rankdata

    ranks = rankdata(true), rankdata(predicted)
    one, two = (rank - rank.mean() for rank in ranks)
    scale = math.sqrt((one**2).sum() * (two**2).sum())
    return float((one * two).sum() / scale) if scale > 0 else 0.0


def _kendall(true: np.ndarray, predicted: np.ndarray) -> float:
    from scipy.stats import kendalltau

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a constant prediction
        found = float(kendalltau(true, predicted).statistic)
    return found if math.isfinite(found) else 0.0


def _rmse(true: np.ndarray, predicted: np.ndarray) -> float:
    return math.sqrt(((true - predicted) ** 2).mean())


NUMBER_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "r2": _r2,
    "spearman": _spearman,
    "kendall": _kendall,
    "rmse": _rmse,
}
"""Of targets and predictions, float64 [rows]. A constant prediction has no rank correlation: it counts as 0."""


def predict_labels(logits: np.ndarray, target: Target) -> np.ndarray:
    """Class ids [rows], a 0/1 matrix [rows, labels], or numbers [rows]."""
    match target.problem_type:
        case "regression":
            return logits[:, 0]
        case "multi_label":
            return (logits > 0).astype(np.int64)
        case _:
            return logits.argmax(axis=-1)


def worst(kept: Predictions, texts: Sequence[str], target: Target, count: int) -> Iterable[Answer]:
    """The wrong rows (regression: all rows) with the highest loss."""
    predicted = predict_labels(kept["logits"], target)
    true = kept["labels"]
    everything = np.ones(len(true), bool)
    wrong: Any = everything if target.problem_type == "regression" else np.asarray(predicted != true)
    wrong = wrong.any(axis=-1) if wrong.ndim > 1 else wrong
    order = [position for position in np.argsort(-kept["loss"], kind="stable") if wrong[position]][:count]
    for position in order:
        yield Answer(
            text=texts[position],
            expected=label_words(true[position], target),
            predicted=label_words(predicted[position], target),
            loss=float(kept["loss"][position]),
        )
