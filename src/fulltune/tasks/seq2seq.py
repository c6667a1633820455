"""Encoder-decoder models that read a source and write a target: summaries, translations, rewritten texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.recipe import tasks as recipe_tasks
from fulltune.recipe.data import DataBlock
from fulltune.records.data import Preview, Segment
from fulltune.records.scores import Answer
from fulltune.tasks import LENGTH, Example, LossSettings, Predictions, Refused, Row, Target, causal_lm
from fulltune.tasks.causal_lm import IGNORED
from fulltune.tasks.columns import as_text, is_blank, normalised, required
from fulltune.tasks.padding import mask, padded

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FACTS = recipe_tasks.FACTS["seq2seq"]
_LANGUAGE_CODES = {"m2m_100", "mbart", "nllb-moe", "plbart", "seamless_m4t", "seamless_m4t_v2"}
"""Models that write the language of a code which the tokenizer is told and generation must be forced to begin with."""

# ---- columns ---------------------------------------------------------------------------------------------------


def find_columns(columns: Sequence[str], sample: Sequence[Row], data: DataBlock, where: str) -> dict[str, str]:
    """Columns for `source` and `target`."""
    source = required("source", data.source, columns, where)
    return {"source": source, "target": required("target", data.target, columns, where, [source])}


def find_target(rows: Iterable[Row], columns: Mapping[str, str], data: DataBlock, where: str) -> Target:
    """The text that is put before each source comes from the recipe; the rows decide nothing."""
    for _ in rows:
        pass
    return Target("source_target", columns, joint=data.source_prefix or "")


def refuse(row: Row, target: Target) -> Refused | None:
    """Rows without a source or without a target are left out."""
    for role in ("source", "target"):
        value, column = row.get(target.columns[role]), target.columns[role]
        if isinstance(value, (list, tuple, dict)):
            return Refused(f"no {role}", f"column '{column}' holds a list or an object, not text")
        if is_blank(as_text(value)):
            return Refused(f"no {role}", f"column '{column}' is empty")
    return None


def group_key(row: Row, target: Target) -> str:
    """What is read: the same source with two targets stays in one split."""
    return normalised(as_text(row.get(target.columns["source"])))


def row_labels(row: Row, target: Target) -> list[str]:
    return []


def prompt_text(row: Row, target: Target) -> str:
    """What the model reads, without the prefix."""
    return as_text(row.get(target.columns["source"]))


def answer_text(row: Row, target: Target) -> str:
    """What it should write."""
    return as_text(row.get(target.columns["target"])).strip()


# ---- tokens ----------------------------------------------------------------------------------------------------


def encode(
    rows: Sequence[Row], target: Target, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[list[Example]]:
    """Tokenise; source and target are each cut at `max_length`.

    A cut source keeps its end token, as when the model answers. A cut target loses it, so that the model does not
    learn to stop in the middle.
    """
    sources = _tokenised([target.joint + prompt_text(row, target) for row in rows], tokenizer)
    written = tokenizer(text_target=[as_text(row.get(target.columns["target"])) for row in rows], verbose=False)
    encoded = []
    for source, ids in zip(sources, written["input_ids"], strict=True):
        labels = list(ids)
        end = end_of(tokenizer)
        if end is not None and labels[-1:] != [end]:
            labels.append(end)
        truncated = len(source) > max_length or len(labels) > max_length
        source, labels = _cut(source, max_length, tokenizer), labels[:max_length]
        features = {"input_ids": source, "labels": labels, LENGTH: len(source) + len(labels)}
        # A target of nothing but special tokens, such as one of unknown spaces, teaches nothing.
        count = len(labels) if any(token not in tokenizer.all_special_ids for token in labels) else 0
        encoded.append([Example(features, count, truncated, longest=max(len(source), len(labels)))])
    return encoded


def end_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token after which the model stops: BERT-like tokenizers end with their separator."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id


def _tokenised(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Without a limit: only so can truncation be counted."""
    return list(tokenizer(texts, truncation=False, verbose=False)["input_ids"])


def _cut(ids: Sequence[int], max_length: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """At most so many tokens; an end token stays the last one."""
    if len(ids) <= max_length:
        return list(ids)
    keeps_end = ids[-1] in tokenizer.all_special_ids
    return [*ids[: max_length - 1], ids[-1]] if keeps_end else list(ids[:max_length])


def generation_ids(row: Row, target: Target, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    """The source's tokens, as in training."""
    return _cut(_tokenised([target.joint + prompt_text(row, target)], tokenizer)[0], max_length, tokenizer)


def preview(features: Mapping[str, Any], target: Target, tokenizer: PreTrainedTokenizerBase) -> Preview:
    """The source, and the target that is trained."""
    read, written = (str(tokenizer.decode(features[name])) for name in ("input_ids", "labels"))
    return Preview(segments=(Segment(text=f"{read}\n", trained=False), Segment(text=written, trained=True)))


# ---- model -----------------------------------------------------------------------------------------------------


def check_model(config: PretrainedConfig) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    kind = config.model_type
    if kind in _LANGUAGE_CODES:
        return (
            f"a '{kind}' model writes in the language of a code, which a recipe cannot name yet; take a T5, BART, "
            "Pegasus or Marian model"
        )
    # The list also names models that listen; those are no encoder-decoders.
    if kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and config.is_encoder_decoder:
        return None
    return f"a '{kind}' model does not read one text and write another; take an encoder-decoder (T5, BART, Marian)"


def config_changes(target: Target, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {}


def decoder_input_ids(model: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """What the decoder reads: at each position the label before it, first the model's start token.

    Models make this themselves only when they are given the labels, which fulltune's own loss keeps.
    """
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        return shift(labels=labels)
    start = getattr(model.config, "decoder_start_token_id", None)
    start = model.generation_config.decoder_start_token_id if start is None else start
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = start
    return shifted.masked_fill(shifted == IGNORED, model.config.pad_token_id or 0)


def collate(features: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Without `decoder_input_ids`, for which the model is needed: see `fulltune.inference.run.model_batch`."""
    ids = [row["input_ids"] for row in features]
    labels = padded([row["labels"] for row in features], IGNORED)
    return {"input_ids": padded(ids, pad_token_id), "attention_mask": mask(ids), "labels": labels}


def places(labels: torch.Tensor) -> torch.Tensor:
    """Where the target's tokens stand: bool [batch, length]."""
    return labels != IGNORED


def loss(logits: torch.Tensor, labels: torch.Tensor, target: Target, settings: LossSettings) -> torch.Tensor:
    """Cross entropy of the target's tokens, summed. Padding is left out before the float32 copy.

    `logits` may be those of `places` only, [tokens, vocabulary], or their pieces.
    """
    from fulltune.models.chunked_loss import summed_loss

    chosen = places(labels)
    return summed_loss(causal_lm.picked(logits, chosen), labels[chosen], settings.label_smoothing)


def count_items(labels: torch.Tensor) -> int:
    return int((labels != IGNORED).sum())


# ---- evaluation ------------------------------------------------------------------------------------------------


def reduce(logits: torch.Tensor, labels: torch.Tensor, target: Target) -> dict[str, torch.Tensor]:
    """Keep three numbers a row: summed `nll` (nats), number of `tokens`, number of `right` greedy tokens."""
    import torch

    from fulltune.models.chunked_loss import token_scores

    chosen = places(labels)
    rows = chosen.nonzero()[:, 0]
    empty = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    losses, right = token_scores(causal_lm.picked(logits, chosen), labels[chosen])
    return {
        "nll": empty.index_add(0, rows, losses.double()),
        "tokens": chosen.sum(dim=1).double(),
        "right": empty.index_add(0, rows, right.double()),
    }


def metrics(kept: Predictions, target: Target) -> dict[str, float]:
    """Loss per token in nats, perplexity, accuracy of the next token; of generated answers what `score_answers` kept.

    BLEU is that of the whole corpus, made from the sum of the rows' counts as sacrebleu makes it: an order of n-grams
    without a match is smoothed (`exp`), so that few or short answers do not all get 0.
    """
    values = causal_lm.metrics(kept, target)
    if "bleu_counts" in kept:
        from sacrebleu.metrics.bleu import BLEU

        orders = BLEU().max_ngram_order
        sums = kept["bleu_counts"].sum(axis=0).tolist()
        counts, totals, lengths = sums[:orders], sums[orders : 2 * orders], sums[2 * orders :]
        written, expected = lengths
        values["bleu"] = BLEU.compute_bleu(counts, totals, written, expected, smooth_method="exp").score
    return values


def score_answers(answers: Sequence[str], expected: Sequence[str]) -> dict[str, np.ndarray]:
    """What `causal_lm.score_answers` gives, and with sacrebleu the counts that BLEU is made of [rows, 10]: matching
    n-grams and n-grams of each order, then the lengths of answer and target."""
    scores = causal_lm.score_answers(answers, expected)
    if not causal_lm.can_score("bleu"):
        return scores
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(effective_order=True)  # the counts do not depend on it; without it each short row would be warned of
    rows = [bleu.sentence_score(one, [two]) for one, two in zip(answers, expected, strict=True)]
    counts = [[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows]
    return scores | {"bleu_counts": np.array(counts, np.int64)}


def worst(kept: Predictions, texts: Sequence[str], target: Target, count: int) -> Iterable[Answer]:
    """None: a text is not simply wrong; the report shows generated answers instead."""
    return ()
