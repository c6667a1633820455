"""Language models that learn answers: prompt and completion, or chat messages. Only the answer is trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.errors import DataError, SetupError
from fulltune.recipe import DataBlock
from fulltune.records import Answer, Preview, Segment
from fulltune.tasks import Example, LossSettings, Predictions, Refused, Row, Target, chat
from fulltune.tasks.columns import as_text, named, normalised, required

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

AUTO_CLASS = "AutoModelForCausalLM"
HEAD_IS_NEW = False
LENGTH_CAP = 2048
METRICS = {
    "loss": False,
    "perplexity": False,
    "token_accuracy": True,
    "exact_match": True,
    "rougeL": True,
    "chrf": True,
}
CHOOSING = dict.fromkeys(("text", "prompt_completion", "chat"), ("loss", "perplexity", "token_accuracy"))
IGNORED = -100

# ---- columns ---------------------------------------------------------------------------------------------------


def find_columns(columns: Sequence[str], sample: Sequence[Row], data: DataBlock, where: str) -> dict[str, str]:
    """A `messages` column, or `prompt` and `completion`."""
    wants_pair = data.prompt is not None or data.completion is not None
    if data.messages is not None and wants_pair:
        raise DataError(f"{where}: data.messages and data.prompt/completion are both given; keep one form")
    messages = None if wants_pair else named("messages", data.messages, columns, where)
    if messages is not None:
        tools = named("tools", data.tools, columns, where)
        return {"messages": messages} | ({"tools": tools} if tools else {})
    found = {"prompt": required("prompt", data.prompt, columns, where)}
    rest = [column for column in columns if column != found["prompt"]]
    return found | {"completion": required("completion", data.completion, rest, where)}


def find_target(rows: Sequence[Row], columns: Mapping[str, str], data: DataBlock, where: str) -> Target:
    """Chat or pairs; for pairs, what stands between prompt and completion."""
    if "messages" in columns:
        return Target("chat", columns)
    pairs = [(as_text(row.get(columns["prompt"])), as_text(row.get(columns["completion"]))) for row in rows[:200]]
    glued = any(one and two and not one[-1].isspace() and not two[0].isspace() for one, two in pairs)
    return Target("prompt_completion", columns, joint="\n" if glued else "")


def refuse(row: Row, target: Target) -> Refused | None:
    """Rows without an answer are left out, and conversations that are no conversations."""
    if target.problem_type == "prompt_completion":
        for role in ("prompt", "completion"):
            value = row.get(target.columns[role])
            if isinstance(value, (list, tuple, dict)):
                return Refused(f"no {role}", f"column '{target.columns[role]}' holds a list or an object, not text")
            if not as_text(value).strip():
                return Refused(f"no {role}", f"column '{target.columns[role]}' is empty")
        return None
    try:
        messages = chat.clean(row.get(target.columns["messages"]))
    except DataError as error:
        return Refused("no conversation", str(error))
    said = [message for message in messages if message["role"] == "assistant"]
    if not any(as_text(message.get("content")).strip() or message.get("tool_calls") for message in said):
        return Refused("no answer", "no assistant message with content or tool calls")
    return None


def group_key(row: Row, target: Target) -> str:
    """What is asked: the same question with two answers stays in one split."""
    return normalised(prompt_text(row, target))


def row_labels(row: Row, target: Target) -> list[str]:
    return []


def prompt_text(row: Row, target: Target) -> str:
    """What the model is asked, as text."""
    if target.problem_type == "prompt_completion":
        return as_text(row.get(target.columns["prompt"]))
    return "\n".join(as_text(message["content"]) for message in _question(row, target))


def answer_text(row: Row, target: Target) -> str:
    """What it should answer: the completion, or the last assistant message."""
    if target.problem_type == "prompt_completion":
        return as_text(row.get(target.columns["completion"])).strip()
    messages = chat.clean(row[target.columns["messages"]])
    last = [message for message in messages if message["role"] == "assistant"][-1]
    return as_text(last.get("content") or last.get("tool_calls")).strip()


def _question(row: Row, target: Target) -> list[dict[str, Any]]:
    """The messages before the last assistant message."""
    messages = chat.clean(row[target.columns["messages"]])
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
    return messages[:last]


# ---- tokens ----------------------------------------------------------------------------------------------------


def encode(
    rows: Sequence[Row], target: Target, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[list[Example]]:
    """Tokenise; `labels` repeat the ids where the answer is and hold -100 elsewhere."""
    if target.problem_type == "chat" and not tokenizer.chat_template:
        raise SetupError(
            "the tokenizer has no chat template; take an instruct model, or give data.chat_template (a Jinja file)"
        )
    encoded = []
    for row in rows:
        if target.problem_type == "chat":
            try:
                masked = chat.encode(tokenizer, chat.clean(row[target.columns["messages"]]), _tools(row, target))
            except chat.TemplateRefusal as error:
                nothing: dict[str, list[int]] = {"input_ids": [], "attention_mask": [], "labels": []}
                encoded.append([Example(nothing, 0, refused=Refused("refused by the chat template", str(error)))])
                continue
        else:
            masked = [_encode_pair(row, target, tokenizer)]
        encoded.append([_example(ids, trained, max_length) for ids, trained in masked])
    return encoded


def _tools(row: Row, target: Target) -> Any:
    """The row's tool definitions; an empty list is none."""
    return (chat.parsed(row.get(target.columns["tools"])) or None) if "tools" in target.columns else None


def _encode_pair(row: Row, target: Target, tokenizer: PreTrainedTokenizerBase) -> chat.Masked:
    """Prompt and completion tokenised apart, exactly as they are when the model answers; the end token is trained."""
    asked = prompt_ids(as_text(row.get(target.columns["prompt"])) + target.joint, tokenizer)
    said = tokenizer(as_text(row.get(target.columns["completion"])), add_special_tokens=False, verbose=False)
    answer = list(said["input_ids"])
    if tokenizer.eos_token_id is not None and answer[-1:] != [tokenizer.eos_token_id]:
        answer.append(tokenizer.eos_token_id)
    return asked + answer, [False] * len(asked) + [True] * len(answer)


def prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt's tokens, with the opening special tokens of the tokenizer and without closing ones."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    while ids and ids[-1] in {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}:
        ids.pop()
    return ids


def generation_ids(row: Row, target: Target, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens after which the model shall answer."""
    if target.problem_type == "prompt_completion":
        return prompt_ids(prompt_text(row, target) + target.joint, tokenizer)
    text = chat.render(tokenizer, _question(row, target), _tools(row, target), add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _example(ids: list[int], trained: list[bool], max_length: int) -> Example:
    labels = [token if is_trained else IGNORED for token, is_trained in zip(ids, trained, strict=True)]
    # The first token is never predicted, so a label on it would count a target that the loss does not have.
    labels[:1] = [IGNORED] * len(labels[:1])
    cut = labels[:max_length]
    features = {"input_ids": ids[:max_length], "attention_mask": [1] * len(cut), "labels": cut}
    count = sum(label != IGNORED for label in cut)
    return Example(features, trained_tokens=count, truncated=len(ids) > max_length)


def end_token(features: Mapping[str, Any]) -> int | None:
    """The last trained token: after it the model must stop."""
    return next((label for label in reversed(features["labels"]) if label != IGNORED), None)


def preview(features: Mapping[str, Any], target: Target, tokenizer: PreTrainedTokenizerBase) -> Preview:
    """Runs of trained and untrained tokens, decoded."""
    segments: list[Segment] = []
    ids, labels = features["input_ids"], features["labels"]
    start = 0
    for position in range(1, len(ids) + 1):
        if position == len(ids) or (labels[position] == IGNORED) != (labels[start] == IGNORED):
            text = str(tokenizer.decode(ids[start:position]))
            segments.append(Segment(text=text, trained=labels[start] != IGNORED))
            start = position
    return Preview(segments=tuple(segments))


# ---- model -----------------------------------------------------------------------------------------------------


def check_model(config: PretrainedConfig) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from fulltune.model import is_decoder

    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and is_decoder(config):
        return None
    return f"a '{config.model_type}' model does not write text from left to right; take a decoder (GPT-, Llama-like)"


def config_changes(target: Target, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {}


def collate(features: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    import torch

    length = max(len(row["input_ids"]) for row in features)
    fills = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED}
    return {
        name: torch.tensor([[*row[name], *[fill] * (length - len(row[name]))] for row in features])
        for name, fill in fills.items()
    }


def loss(logits: torch.Tensor, labels: torch.Tensor, target: Target, settings: LossSettings) -> torch.Tensor:
    """Cross entropy of the trained tokens, summed. Untrained positions are left out before the float32 copy."""
    import torch.nn.functional as F

    wanted = labels[:, 1:]
    chosen = wanted != IGNORED
    return F.cross_entropy(
        logits[:, :-1][chosen].float(),
        wanted[chosen],
        label_smoothing=settings.label_smoothing,
        reduction="sum",
    )


def count_items(labels: torch.Tensor) -> int:
    return int((labels[:, 1:] != IGNORED).sum())


# ---- evaluation ------------------------------------------------------------------------------------------------


def reduce(logits: torch.Tensor, labels: torch.Tensor, target: Target) -> dict[str, torch.Tensor]:
    """Keep three numbers a row: summed `nll` (nats), number of `tokens`, number of `right` greedy tokens."""
    import torch
    import torch.nn.functional as F

    wanted = labels[:, 1:]
    chosen = wanted != IGNORED
    picked = logits[:, :-1][chosen].float()
    rows = chosen.nonzero()[:, 0]
    empty = torch.zeros(len(labels), dtype=torch.float64, device=logits.device)
    losses = F.cross_entropy(picked, wanted[chosen], reduction="none").double()
    right = (picked.argmax(dim=-1) == wanted[chosen]).double()
    return {
        "nll": empty.index_add(0, rows, losses),
        "tokens": empty.index_add(0, rows, torch.ones_like(losses)),
        "right": empty.index_add(0, rows, right),
    }


def metrics(kept: Predictions, target: Target) -> dict[str, float]:
    """Loss per token in nats, perplexity, accuracy of the next token; each token counts the same.

    With `exact_match`, `rougeL` and `chrf` columns (scores of generated answers), their means as well.
    """
    values = {}
    if "tokens" in kept:
        tokens = max(1.0, float(kept["tokens"].sum()))
        loss_per_token = float(kept["nll"].sum()) / tokens
        values = {
            "loss": loss_per_token,
            "perplexity": math.exp(min(loss_per_token, 700.0)),
            "token_accuracy": float(kept["right"].sum()) / tokens,
        }
    return values | {name: float(np.mean(kept[name])) for name in ("exact_match", "rougeL", "chrf") if name in kept}


def worst(kept: Predictions, texts: Sequence[str], target: Target, count: int) -> Iterable[Answer]:
    """None: a row of text is not simply wrong; the report shows generated answers instead."""
    return ()


def score_answers(answers: Sequence[str], expected: Sequence[str]) -> dict[str, np.ndarray]:
    """Exact match, ROUGE-L (0 to 1) and chrF (0 to 100) of each generated answer.

    Raises:
        SetupError: When sacrebleu or rouge-score are not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise SetupError(
            f"scoring generated answers needs the package '{error.name}'; pip install 'fulltune[text-metrics]', "
            "or set evaluate.generate_rows: 0"
        ) from None
    rouge, chrf = RougeScorer(["rougeL"]), CHRF()
    pairs = list(zip(answers, expected, strict=True))
    return {
        "exact_match": np.array([float(normalised(one) == normalised(two)) for one, two in pairs]),
        "rougeL": np.array([rouge.score(two, one)["rougeL"].fmeasure for one, two in pairs]),
        "chrf": np.array([chrf.sentence_score(one, [two]).score for one, two in pairs]),
    }
