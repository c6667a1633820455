"""What all blocks of a recipe have in common, and its blocks `model` and `preserve`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from fulltune.text import parse_share

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What a run or a method may be called: it becomes the name of a folder."""


class Block(BaseModel):
    """Base of all blocks: frozen, unknown keys refused, the string under a field is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelBlock(Block):
    """Which pretrained model, and how its weights are read."""

    name: str = Field(min_length=1)
    """A Hub id, a folder, a run's folder (its trained model), a `.gguf` file, or `package:NAME/PATH` for weights that
    an installed package carries."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    weights_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which the weights are kept and updated. bf16 halves the memory; `train.bf16_rounding` says how updates
    that are smaller than bf16's spacing still arrive."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Sets every dropout probability in the model's config; left out, the config's own values stay."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None = None
    """Attention kernel; left out, transformers chooses, mostly sdpa. flash_attention_2 is the package flash-attn and
    needs a GPU from compute capability 8.0 on (Ampere), flash_attention_3 one of 9.0 (Hopper); both compute in 16 bits
    alone, with weights in fp32 as well. Neither was ever run here."""
    trust_remote_code: bool = False
    """Runs Python files that come with the model. They can do anything your account can do: read them first."""
    allow_pickled_weights: bool = False
    """Reads `pytorch_model.bin`. PyTorch's restricted loader is used, yet pickle has a history of holes: prefer
    safetensors."""

    def in_words(self) -> str:
        """Its name, with every setting that tells it apart from the same model as it usually is."""
        more = [f"{name} {value}" for name, value in self.model_dump(exclude={"name"}, exclude_defaults=True).items()]
        return f"{self.name} ({', '.join(more)})" if more else self.name


AUTO = "auto"
BUNDLED = "docstrings of Python's standard library"
"""Generic text that every installation has."""


def _a_share(value: Any) -> Any:
    """A share as `text.parse_share` reads it; other types are left to pydantic."""
    if isinstance(value, bool):
        raise ValueError(f"expected a share such as 1% or 0.01, found {value}")
    if isinstance(value, (str, int, float)):
        parse_share(value)
    return value


Share = Annotated[str | float, BeforeValidator(_a_share)]
"""Such as `1%` or `0.01`."""


class PreserveBlock(Block):
    """What the model could do before training is watched, and with a budget kept: full fine-tuning moves every weight,
    also those that other abilities rest on."""

    drift: bool = True
    """At each evaluation, measure how far the model has moved away on generic text: for language models by how much
    its loss rose, for others how far its hidden states have changed. Costs about 1 % of the training, more of a very
    short one: at least 8 texts are read."""
    probe: str | None = None
    """A text file of what the model could do before: one text a line, or paragraphs. Left out: docstrings of Python's
    standard library."""
    budget: Share | None = None
    """How far generic text may move at most, such as `1%`: a token of it gets so much less likely (language models),
    or the mean hidden state turns by so much, 1 - cosine (others). Generic text is replayed with a weight that is
    raised as the budget is spent; of the points between the untouched and the trained model the best one within the
    budget is kept, and certified on texts that nothing else has read. For full and lora, also in a comparison."""
    replay: str | None = AUTO
    """Where the generic text that is replayed comes from: a text file; `auto`, a part of the probe's texts.
    `null`: none is replayed."""

    @property
    def limit(self) -> float | None:
        """The budget as a share."""
        return None if self.budget is None else parse_share(self.budget)
