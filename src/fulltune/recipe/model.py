"""What all blocks of a recipe have in common, and its smaller blocks: `model`, `preserve`, `evaluate`
and `compare`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from fulltune.text import parse_seconds, parse_share

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What a run or a method may be called: it becomes the name of a folder."""


def read_by(parse: Callable[[str], float]) -> BeforeValidator:
    """Refuse what a function of `fulltune.text` cannot read; the value stays as it is written."""

    def check(value: Any) -> Any:
        if value is not None:
            parse(str(value))
        return value

    return BeforeValidator(check)


Duration = Annotated[str, read_by(parse_seconds)]
"""Such as `30m`, `2h` or `90s`."""


class Block(BaseModel):
    """Base of all blocks: frozen, unknown keys refused, the string under a field is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def refuse(problems: Mapping[str, object]) -> None:
    """Raise a `ValueError` with every problem that is one, a line each."""
    if found := [text for text, is_wrong in problems.items() if is_wrong]:
        raise ValueError("\n".join(found))


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


Share = Annotated[str | float, read_by(parse_share)]
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
    budget is kept, and certified on texts that nothing else has read. For full and lora, in a single run."""
    replay: str | None = AUTO
    """Where the generic text that is replayed comes from: a text file; `auto`, a part of the probe's texts.
    `null`: none is replayed."""

    @property
    def limit(self) -> float | None:
        """The budget as a share."""
        return None if self.budget is None else parse_share(self.budget)


class EvaluateBlock(Block):
    """How the result is measured, on rows that were never used for choosing."""

    metric: str | None = None
    """The metric that chooses the weights to keep and heads the report. Left out: accuracy, f1_micro (multi_label),
    spearman (regression), f1 (entities, answers in a context) or loss (causal-lm, seq2seq)."""
    batch_size: int | None = Field(default=None, ge=1)
    """Rows per forward pass. Left out: twice the micro batch. Halved when memory runs out; the scores stay the same."""
    baselines: bool = True
    """Also score what costs no training: the majority class and frozen embeddings, or the untouched language model."""
    bootstrap_samples: int = Field(default=1000, ge=100)
    """Resamples of the test rows behind each interval; rows with the same text, prompt or passage, or nearly so,
    are drawn together."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Level of the intervals."""
    generate_rows: int = Field(default=100, ge=0)
    """Test rows for which answers are generated and compared (causal-lm, seq2seq), drawn at random with
    `data.split_seed` among those with different prompts; 0: none."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest generated answer, in tokens."""


class CompareBlock(Block):
    """How `fulltune compare` compares methods: on the same rows, each at its best rate, over several seeds."""

    margin: float = Field(default=0.01, gt=0, lt=1)
    """Differences of the metric below this one do not matter to you."""
    seeds: int | None = Field(default=None, ge=1)
    """Seeds of each method at most; fewer where the answer is clear. Left out: 3, below 10,000 train rows 5."""
    sequential: bool = True
    """After each seed, ask the eval rows which methods need another one. False: all seeds for every method."""
    search_share: float = Field(default=0.06, gt=0, le=1)
    """Share of a run's steps that each rate gets in the rate search, at least 10 steps; methods that go on to a second
    seed get whole runs with the best two, and with more while that helps."""
    budget: Duration | None = None
    """Most time that all commands on the comparison may take together, such as `30m` or `2h`. It says beforehand what
    fits; with more time later (`--budget`) an undecided comparison goes on. Of a run with `learning_rate: search` the
    most time of the search, the run at the best rate included."""
