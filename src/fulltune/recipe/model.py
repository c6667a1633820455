from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from fulltune.recipe.functions import FunctionName, MetricName
from fulltune.text import parse_seconds, parse_share

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


def validated_by(parse: Callable[[str], float]) -> BeforeValidator:
    """Return a pydantic validator that refuses a value if `parse` raises `ValueError` for its text. None is
    accepted."""

    def check_text(value: Any) -> Any:
        if value is not None:
            parse(str(value))
        return value

    return BeforeValidator(check_text)


Duration = Annotated[str, validated_by(parse_seconds)]


PlainSettings = dict[str, Any]


class Block(BaseModel):
    """Base class of recipe blocks, which are frozen and refuse unknown settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def raise_for_problems(problems: Mapping[str, object]) -> None:
    """Raise a `ValueError` that lists the messages (keys) whose value is true, if any."""
    if texts := [text for text, is_wrong in problems.items() if is_wrong]:
        raise ValueError("\n".join(texts))


PairsReading = Literal["joint", "apart"]


class ModelBlock(Block):
    """Settings for loading the pretrained model."""

    name: str = Field(min_length=1)
    """Hub id, folder, run folder (its trained model), `.gguf` file, or `package:NAME/PATH` for weights in an installed
    package."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    random_weights: bool = False
    """Start from random weights instead of the pretrained ones, to measure memory and speed from a configuration alone.
    Such a model knows nothing."""
    weights_dtype: Literal["fp32", "bf16"] = "fp32"
    """Data type of the stored weights. `bf16` halves their memory (see `train.bf16_rounding`)."""
    new_tokens: str | tuple[str, ...] = ()
    """Tokens to add to the vocabulary, such as `["<order>", "</order>"]`, or a text file with one token per line. Each
    new row of the embeddings and of the language model's head starts as the mean of the pieces into which the
    pretrained tokenizer splits the token."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout probability of all dropout layers. Default: the model's own values."""
    pairs: Literal["auto", "joint", "apart"] = "auto"
    """How text-classification reads a row's two texts: `joint` in one sequence, or `apart`, each by itself, with a head
    on the two vectors. `auto` chooses by a linear probe of both ways or, from 1,000 train and 100 eval rows on, by two
    trainings of a third of the steps."""
    pooling: Literal["mean", "cls", "last"] | None = None
    """How a text's token states become one vector, if each text is read by itself. Default: as the model's
    `1_Pooling/config.json` says, else `mean` (encoders) or `last` (decoders)."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None = None
    """Attention kernel. Default: chosen by transformers, usually `sdpa`. `flash_attention_2` (package flash-attn) needs
    a GPU with compute capability 8.0 (Ampere), `flash_attention_3` one with 9.0 (Hopper). Both compute in 16 bits
    and have not been tested with fulltune."""
    trust_remote_code: bool = False
    """Run Python files that come with the model. Read these files first, because they can do anything that your account
    can do."""
    allow_pickled_weights: bool = False
    """Load `pytorch_model.bin` with PyTorch's restricted loader. Prefer safetensors, because pickle has a history of
    vulnerabilities."""

    def describe(self) -> str:
        """Return the model's name and, in parentheses, all settings that are not defaults."""
        more = [f"{name} {value}" for name, value in self.model_dump(exclude={"name"}, exclude_defaults=True).items()]
        return f"{self.name} ({', '.join(more)})" if more else self.name


AUTO = "auto"
BUNDLED = "docstrings of Python's standard library"


ShareText = Annotated[str | float, validated_by(parse_share)]


class PreserveBlock(Block):
    """Settings for measuring and limiting forgetting. Full fine-tuning changes every weight, so it can damage other
    abilities."""

    drift: bool = True
    """Measure at each evaluation how far outputs on generic text drift, as the rise in loss (language models) or the
    change in hidden states. Measuring takes about 1 % of the training time, more in very short runs."""
    probe: str | None = None
    """File with texts that the model should still handle well, one text per line or paragraph. Default: docstrings of
    Python's standard library."""
    budget: ShareText | None = None
    """Maximum drift on generic text, such as `1%`: how much less likely a token may become (language models), or 1 -
    cosine of the mean hidden states. With a budget, generic text is replayed in training. Afterwards, fulltune saves
    the best interpolation between pretrained and trained weights that stays within the budget, and confirms its
    drift on held-out texts. A budget needs a single run with `full` or `lora`."""
    replay: str | None = AUTO
    """Text file to replay if there is a budget. `auto` replays some texts of `probe`, and `null` replays nothing."""

    @property
    def limit(self) -> float | None:
        """The budget as a share from 0 to 1, or None if there is no budget."""
        return None if self.budget is None else parse_share(self.budget)


class EvaluateBlock(Block):
    """Settings for measuring the result on test rows, which are never used to select anything."""

    metric: MetricName | None = None
    """Metric that comes first in the report and selects the best checkpoint (by default, the loss does for text-pairs).
    Default: accuracy, f1_micro (multi_label), spearman (regression), ndcg@10 (embedding, reranking), f1 (tags, spans)
    or loss (causal-lm, seq2seq). Your own function, named as in `metrics`, also needs `greater_is_better`."""
    metrics: tuple[FunctionName, ...] = ()
    """Your own metrics beside the task's, as `module:function`. `function(answers, expected, rows)` gets generated
    texts, names of labels or numbers, and your rows. It returns one number, or a list with one number per row, whose
    intervals are faster and which a comparison needs."""
    greater_is_better: bool | None = None
    """Whether more is better, for an own function as `metric`."""
    positive_label: str | None = Field(default=None, coerce_numbers_to_str=True)
    """Class that counts as positive (scikit-learn's `pos_label`), such as a rare one (single label). It is scored
    against the rest by `f1`, `precision`, `recall`, `roc_auc` and `average_precision`; each can be the `metric`."""
    threshold: Literal["fit"] | None = None
    """`fit` predicts `positive_label` from the calibrated probability on that maximises its F1 on the eval rows. It is
    stored in the model folder's `fulltune.json`. Default: the most probable class is predicted."""
    batch_size: int | None = Field(default=None, ge=1)
    """Number of rows per forward pass. Default: twice the micro batch size. If scoring runs out of memory, the batch
    size is halved, which does not change the scores."""
    baselines: bool = True
    """Also score baselines that need no training: the majority class and a linear probe, BM25, or the pretrained
    encoder or language model."""
    bootstrap_samples: int = Field(default=1000, ge=100)
    """Number of bootstrap resamples for each interval. Rows with similar text, prompt or passage are resampled
    together."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Confidence level of the intervals."""
    generate_rows: int = Field(default=100, ge=0)
    """Number of test rows for which answers are generated (causal-lm, seq2seq). The rows have different prompts and are
    sampled with `data.split_seed`. 0 generates none."""
    choose_rows: int | None = Field(default=None, ge=0)
    """Number of eval rows with different prompts for which answers are generated at each evaluation (causal-lm,
    seq2seq). Default: 100 if `metric` compares answers, else 0."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Maximum length of a generated answer in tokens."""
    slice_by: str | None = None
    """Column by whose values the report shows all metrics, worst first. It need not be a column that the model reads.
    Values with fewer than 10 test rows, and those beyond the 30 most frequent, are joined."""


class CompareBlock(Block):
    """Settings of `fulltune compare`. All methods use the same rows and several seeds, and each is trained at its best
    learning rate."""

    margin: float = Field(default=0.01, gt=0, lt=1)
    """Smallest difference in the metric that matters to you. Smaller differences count as equivalent."""
    seeds: int | None = Field(default=None, ge=1)
    """Maximum number of seeds per method. Default: 3, or 5 below 10,000 train rows."""
    sequential: bool = True
    """After each seed, decide from the eval rows which methods need another one. With `false`, every method gets all
    seeds."""
    search_share: float = Field(default=0.06, gt=0, le=1)
    """Length of each short trial in the learning rate search, as a share of a whole run (at least 10 steps). Methods
    that get a second seed also get whole runs at their two best rates, or at more while the metric improves."""
    budget: Duration | None = None
    """Time limit for all commands on a comparison together, such as `30m` or `2h`. A later `--budget` continues an
    undecided comparison. With `learning_rate: search`, the budget limits the search, including the final run."""
