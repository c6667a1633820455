"""Models that read each text of a row by itself and pool it to one vector, with or without a head on a pair's two
vectors. Their class derives from that of the body's other heads, so it saves, loads and shards as they do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

from fulltune.models.experts import expert_modules

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

TokenPooling = Literal["mean", "cls", "last"]


def is_decoder(config: PretrainedConfig) -> bool:
    """Return True for models that read left to right, such as GPT-2 or Llama."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = config.model_type
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return bool(getattr(config, "is_decoder", False))
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def pool(hidden: torch.Tensor, mask: torch.Tensor, mode: TokenPooling) -> torch.Tensor:
    """Pool hidden states [texts, tokens, hidden] of right-padded texts to [texts, hidden]."""
    import torch

    if mode == "cls":
        return hidden[:, 0]
    if mode == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def join_vectors(vectors: torch.Tensor) -> torch.Tensor:
    """Return what a head reads of [rows, texts, hidden], from the rows' first and last text, at length 1: both, their
    absolute difference and their product [rows, 4 hidden]."""
    import torch

    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    first, second = vectors[:, 0], vectors[:, -1]
    return torch.cat([first, second, (first - second).abs(), first * second], dim=-1)


@cache
def _class_for(config_class: type[PretrainedConfig], has_head: bool) -> type[PreTrainedModel]:
    """Return the model class for a body's config; with `has_head`, its logits are those of pairs."""
    import torch
    from torch import nn
    from transformers import AutoModel
    from transformers.modeling_outputs import SequenceClassifierOutput

    body_class: Any = AutoModel._model_mapping[config_class]
    body_class = body_class[0] if isinstance(body_class, tuple) else body_class  # Funnel: with and without a decoder
    base: Any = body_class.__bases__[0]
    options = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(body_class).parameters else {}

    class TextEncoder(base):
        reads_several_texts = True

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            setattr(self, self.base_model_prefix, body_class(config, **options))
            if has_head:
                self.classifier = nn.Linear(4 * config.hidden_size, int(config.num_labels or 1))
            self.post_init()
            self.by_text = not (has_head or expert_modules(self))  # a step's routing is of one pass

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: torch.Tensor
        ) -> SequenceClassifierOutput:
            """Read `input_ids[rows, texts, tokens]`; return logits [rows, labels] or vectors [rows, texts, hidden]."""
            inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
            rows, texts = input_ids.shape[:2]
            read = {name: one for name, one in inputs.items() if getattr(one, "shape", ())[:2] == (rows, texts)}
            if self.by_text and texts > 1 and type(input_ids) is torch.Tensor and input_ids.device.type == "cpu":
                # Queries are often shorter than documents; on a GPU, the host would wait for their lengths.
                widths = attention_mask.amax(dim=0).sum(dim=-1).tolist()
                cut = [{name: read[name][:, [n], :width] for name in read} for n, width in enumerate(widths)]
                parts = [type(self).forward(self, **inputs | one)[0] for one in cut]
                return SequenceClassifierOutput(logits=torch.cat(parts, dim=1))
            inputs |= {name: value.flatten(0, 1) for name, value in read.items()}
            hidden = getattr(self, self.base_model_prefix)(**inputs).last_hidden_state
            vectors = pool(hidden, inputs["attention_mask"], self.config.pooling).unflatten(0, (rows, texts))
            if has_head:
                return SequenceClassifierOutput(logits=self.classifier(join_vectors(vectors)))
            vectors = nn.functional.normalize(vectors, dim=-1) if self.config.normalize else vectors
            return SequenceClassifierOutput(logits=vectors)

    # Without a head it is saved as what it is: the body.
    name = f"{body_class.__name__.removesuffix('Model')}ForTextPairs" if has_head else body_class.__name__
    TextEncoder.__name__ = TextEncoder.__qualname__ = name
    return TextEncoder


@cache
def _reranker_class(config_class: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """Return a sequence classifier's class that scores the texts of each row, and is saved as that classifier."""
    from transformers import AutoModelForSequenceClassification
    from transformers.modeling_outputs import SequenceClassifierOutput

    base: Any = AutoModelForSequenceClassification._model_mapping[config_class]

    class ListClassifier(base):
        reads_several_texts = True

        def forward(self, input_ids: torch.Tensor, **inputs: torch.Tensor) -> SequenceClassifierOutput:
            """Read `input_ids[rows, texts, tokens]`, each a query with a document; return logits [rows, texts]."""
            rows, texts = input_ids.shape[:2]
            inputs["input_ids"] = input_ids
            read = {name: one for name, one in inputs.items() if getattr(one, "shape", ())[:2] == (rows, texts)}
            inputs |= {name: value.flatten(0, 1) for name, value in read.items()}
            return SequenceClassifierOutput(logits=super().forward(**inputs).logits.view(rows, texts))

    ListClassifier.__name__ = ListClassifier.__qualname__ = base.__name__
    return ListClassifier


@dataclass(frozen=True)
class _OwnClass:
    """Stands where an auto class of transformers does."""

    of_config: Callable[..., type[PreTrainedModel]]
    saved_as: str = "AutoModel"

    def from_config(self, config: PretrainedConfig, *, trust_remote_code: bool = False, **options: object) -> object:
        return self.of_config(type(config))._from_config(config, **options)

    def from_pretrained(self, *names: str, config: PretrainedConfig, **options: object) -> object:
        load: Callable[..., object] = self.of_config(type(config)).from_pretrained
        return load(*names, config=config, **options)


_OWN = {
    "TextPairs": _OwnClass(partial(_class_for, has_head=True)),
    "TextEmbedding": _OwnClass(partial(_class_for, has_head=False)),
    "Reranker": _OwnClass(_reranker_class, "AutoModelForSequenceClassification"),
}


def model_class(name: str) -> Any:
    """Return a task's `auto_class`: one of this module or of transformers."""
    import transformers

    return _OWN[name] if name in _OWN else getattr(transformers, name)


def saved_as(name: str) -> str:
    """Return the auto class of transformers that loads what a task's `auto_class` saves."""
    return _OWN[name].saved_as if name in _OWN else name
