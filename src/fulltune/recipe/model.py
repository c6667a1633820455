"""The base of all recipe blocks, and the smaller blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from fulltune.text import parse_seconds, parse_share

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Pattern for names of runs and methods, which become names of folders."""


def read_by(parse: Callable[[str], float]) -> BeforeValidator:
    """Refuse a value that `parse` cannot read."""

    def check(value: Any) -> Any:
        if value is not None:
            parse(str(value))
        return value

    return BeforeValidator(check)


Duration = Annotated[str, read_by(parse_seconds)]
"""A duration such as `30m`, `2h` or `90s`."""


PlainSettings = dict[str, Any]
"""Settings by name, as in the file."""


class Block(BaseModel):
    """Base of all blocks: frozen, unknown keys refused, fields documented by their docstrings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def refuse(problems: Mapping[str, object]) -> None:
    """Raise a `ValueError` with the messages whose value is true, one per line."""
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
    """Type of the stored weights. `bf16` halves their memory; see `train.bf16_rounding`."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Sets every dropout probability of the model. Default: the model's own values."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None = None
    """Attention kernel. Default: chosen by transformers, mostly `sdpa`. `flash_attention_2` (package flash-attn) needs
    a GPU of compute capability 8.0 (Ampere), `flash_attention_3` 9.0 (Hopper); both compute in 16 bits. Neither was
    ever run here."""
    trust_remote_code: bool = False
    """Run Python files that come with the model. They can do anything that your account can do: read them first."""
    allow_pickled_weights: bool = False
    """Load `pytorch_model.bin`. PyTorch's restricted loader is used, but prefer safetensors: pickle has a history of
    vulnerabilities."""

    def in_words(self) -> str:
        """Return the name with all settings that are not defaults."""
        more = [f"{name} {value}" for name, value in self.model_dump(exclude={"name"}, exclude_defaults=True).items()]
        return f"{self.name} ({', '.join(more)})" if more else self.name


AUTO = "auto"
BUNDLED = "docstrings of Python's standard library"
"""Generic text of every installation."""


ShareText = Annotated[str | float, read_by(parse_share)]
"""A share such as `1%` or `0.01`."""


class PreserveBlock(Block):
    """Measure and limit forgetting: full fine-tuning changes every weight, also those behind other abilities."""

    drift: bool = True
    """Measure the drift on generic text at each evaluation: the rise of the loss (language models) or the change of
    hidden states. Costs about 1 % of training time, more for very short runs."""
    probe: str | None = None
    """Text file of what the model should still be able to do, one text per line or paragraph. Default: docstrings of
    Python's standard library."""
    budget: ShareText | None = None
    """Most drift on generic text, such as `1%`: how much less likely a token may become (language models), or 1 -
    cosine of the mean hidden states. Generic text is then replayed in training, and the best weights between pretrained
    and trained that stay within the budget are kept, confirmed on sealed texts. For `full` and `lora`, in a single
    run."""
    replay: str | None = AUTO
    """Text file to replay under a budget. `auto`: a part of the probe's texts; `null`: replay nothing."""

    @property
    def limit(self) -> float | None:
        """The budget as a share, 0 to 1."""
        return None if self.budget is None else parse_share(self.budget)


class EvaluateBlock(Block):
    """How to measure the result, on rows never used for choosing."""

    metric: str | None = None
    """Metric that chooses the best checkpoint and leads the report. Default: accuracy, f1_micro (multi_label), spearman
    (regression), f1 (token-classification, question-answering) or loss (causal-lm, seq2seq)."""
    batch_size: int | None = Field(default=None, ge=1)
    """Rows per forward pass. Default: twice the micro batch. If memory runs out it is halved, with the same scores."""
    baselines: bool = True
    """Also score baselines that cost no training: the majority class and a linear probe, or the untouched language
    model."""
    bootstrap_samples: int = Field(default=1000, ge=100)
    """Bootstrap resamples behind each interval. Rows with similar text, prompt or passage are drawn together."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Confidence level of the intervals."""
    generate_rows: int = Field(default=100, ge=0)
    """Test rows for which answers are generated and compared (causal-lm, seq2seq), drawn with `data.split_seed` from
    different prompts. 0: none."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest generated answer, in tokens."""


class CompareBlock(Block):
    """How `fulltune compare` compares methods: on the same rows, each at its best learning rate, over several seeds."""

    margin: float = Field(default=0.01, gt=0, lt=1)
    """Smallest difference of the metric that matters to you; smaller ones count as equivalent."""
    seeds: int | None = Field(default=None, ge=1)
    """Most seeds per method. Default: 3, or 5 below 10,000 train rows."""
    sequential: bool = True
    """After each seed, decide on the eval rows which methods need another. `false`: all seeds for every method."""
    search_share: float = Field(default=0.06, gt=0, le=1)
    """Length of each trial of the rate search as a share of a whole run, at least 10 steps. Methods that continue also
    get whole runs at their two best rates, or more while that helps."""
    budget: Duration | None = None
    """Most time for all commands on a comparison, such as `30m` or `2h`; a later `--budget` continues an undecided one.
    With `learning_rate: search`: most time of the search, the final run included."""
