"""The base class of all recipe blocks, and the smaller blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from fulltune.text import parse_seconds, parse_share

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


def read_by(parse: Callable[[str], float]) -> BeforeValidator:
    """Return a pydantic validator that refuses a value if `parse` raises a `ValueError` for it."""

    def check(value: Any) -> Any:
        if value is not None:
            parse(str(value))
        return value

    return BeforeValidator(check)


Duration = Annotated[str, read_by(parse_seconds)]


PlainSettings = dict[str, Any]


class Block(BaseModel):
    """Base class of all blocks: frozen, without unknown keys, documented by docstrings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def refuse(problems: Mapping[str, object]) -> None:
    """Raise a `ValueError` with every message whose condition is true, one per line."""
    if texts := [text for text, is_wrong in problems.items() if is_wrong]:
        raise ValueError("\n".join(texts))


class ModelBlock(Block):
    """Which pretrained model to load, and how."""

    name: str = Field(min_length=1)
    """Hub id, folder, run folder (its trained model), `.gguf` file, or `package:NAME/PATH` for weights in an installed
    package."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    weights_dtype: Literal["fp32", "bf16"] = "fp32"
    """Data type of the stored weights. `bf16` halves their memory (see `train.bf16_rounding`)."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Every dropout probability of the model. Default: the model's own values."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None = None
    """Attention kernel. Default: chosen by transformers, mostly `sdpa`. `flash_attention_2` (package flash-attn) needs
    a GPU of compute capability 8.0 (Ampere), `flash_attention_3` one of 9.0 (Hopper). Both compute in 16 bits.
    fulltune was never run with either."""
    trust_remote_code: bool = False
    """Run Python files that come with the model. Read them first, because they can do anything that your account can
    do."""
    allow_pickled_weights: bool = False
    """Load `pytorch_model.bin`. PyTorch's restricted loader is used, but prefer safetensors: pickle has a history of
    vulnerabilities."""

    def in_words(self) -> str:
        """Return the model's name followed by all settings that are not defaults."""
        more = [f"{name} {value}" for name, value in self.model_dump(exclude={"name"}, exclude_defaults=True).items()]
        return f"{self.name} ({', '.join(more)})" if more else self.name


AUTO = "auto"
BUNDLED = "docstrings of Python's standard library"
"""Name of the generic text that every installation has."""


ShareText = Annotated[str | float, read_by(parse_share)]


class PreserveBlock(Block):
    """Measure and limit forgetting. Full fine-tuning changes every weight, so it can also damage other abilities."""

    drift: bool = True
    """Measure the drift on generic text at each evaluation: the rise of the loss (language models) or the change of the
    hidden states. This costs about 1 % of the training time, more for very short runs."""
    probe: str | None = None
    """Text file, one text per line or paragraph, of what the model should still be able to do. Default: docstrings of
    Python's standard library."""
    budget: ShareText | None = None
    """Most drift to accept on generic text, such as `1%`: how much less likely a token may become (language models), or
    1 - cosine of the mean hidden states. A budget makes the run replay generic text in training. It then keeps the
    best weights between pretrained and trained that stay within the budget, and confirms them on sealed texts. For
    `full` and `lora`, in a single run."""
    replay: str | None = AUTO
    """Text file to replay under a budget. `auto`: a part of the texts of `probe`; `null`: replay nothing."""

    @property
    def limit(self) -> float | None:
        """The budget as a share from 0 to 1, or None if there is no budget."""
        return None if self.budget is None else parse_share(self.budget)


class EvaluateBlock(Block):
    """How to measure the result, on rows that are never used for choosing."""

    metric: str | None = None
    """Metric that chooses the best checkpoint and comes first in the report. Default: accuracy, f1_micro (multi_label),
    spearman (regression), f1 (token-classification, question-answering) or loss (causal-lm, seq2seq)."""
    batch_size: int | None = Field(default=None, ge=1)
    """Rows per forward pass. Default: twice the micro batch. If memory runs out, it is halved, with the same scores."""
    baselines: bool = True
    """Also score baselines that need no training: the majority class and a linear probe, or the untouched language
    model."""
    bootstrap_samples: int = Field(default=1000, ge=100)
    """Number of bootstrap resamples for each interval. Rows with similar text, prompt or passage are drawn together."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Confidence level of the intervals."""
    generate_rows: int = Field(default=100, ge=0)
    """Test rows for which answers are generated and compared (causal-lm, seq2seq), drawn with `data.split_seed` from
    different prompts. 0: none."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest generated answer, in tokens."""


class CompareBlock(Block):
    """How `fulltune compare` compares methods. All use the same rows, each at its best learning rate, over several
    seeds."""

    margin: float = Field(default=0.01, gt=0, lt=1)
    """Smallest difference of the metric that matters to you. Smaller ones count as equivalent."""
    seeds: int | None = Field(default=None, ge=1)
    """Most seeds per method. Default: 3, or 5 below 10,000 train rows."""
    sequential: bool = True
    """Decide after each seed, on the eval rows, which methods need another one. `false`: all seeds for every method."""
    search_share: float = Field(default=0.06, gt=0, le=1)
    """Length of each trial of the learning rate search as a share of a whole run, at least 10 steps. Methods that
    continue also get whole runs at their two best rates, or at more while that helps."""
    budget: Duration | None = None
    """Most time for all commands on a comparison together, such as `30m` or `2h`. A later `--budget` continues an
    undecided comparison. With `learning_rate: search`: most time for the search, including the final run."""
