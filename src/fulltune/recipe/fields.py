"""The recipe: every setting a user can give, with its meaning, default and bound on its field.

Layer 0: no torch, no transformers. A validator may refuse a value and never changes one; what is left out is filled in
by the plan, which records why. `docs/recipe.md` is generated from these fields.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fulltune.errors import RecipeError
from fulltune.text import parse_bytes, parse_seconds

TaskName = Literal[
    "text-classification",
    "token-classification",
    "question-answering",
    "multiple-choice",
    "image-classification",
    "causal-lm",
    "seq2seq",
]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
Interval = Literal["epoch", "steps"]
TextRows = Literal["auto", "line", "paragraph", "section"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What a run or a method may be called: it becomes the name of a folder."""
TAKEN = ("footprint", "measured", "shapes", "survey")
"""What a method must not be called: its plan would lie where the run folder's `plan` has another file."""


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
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Attention kernel; left out, transformers chooses."""
    trust_remote_code: bool = False
    """Runs Python files that come with the model. They can do anything your account can do: read them first."""
    allow_pickled_weights: bool = False
    """Reads `pytorch_model.bin`. PyTorch's restricted loader is used, yet pickle has a history of holes: prefer
    safetensors."""

    def in_words(self) -> str:
        """Its name, with every setting that tells it apart from the same model as it usually is."""
        more = [f"{name} {value}" for name, value in self.model_dump(exclude={"name"}, exclude_defaults=True).items()]
        return f"{self.name} ({', '.join(more)})" if more else self.name


class DataBlock(Block):
    """Which rows, which columns, and how they become tokens."""

    train: str | tuple[str, ...]
    """File, list of files or folder: csv, tsv, jsonl, json, parquet, arrow, CoNLL, txt; for images a folder with one
    folder per class. A folder with files named `dev`, `valid` or `test` is refused: name the files. `${NAME}` is taken
    from the environment; a relative path starts at the recipe's folder."""
    eval: str | None = None
    """Rows for choosing: best checkpoint, early stopping, calibration. Left out, they are split off train."""
    test: str | None = None
    """Rows for reporting, never used for choosing. Left out, they are split off train."""
    columns: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of the columns of csv and tsv files that have no header line, from left to right, such as `[text, label]`.
    Left out: the first line holds the names."""
    text: str | None = None
    """Column with the text (text-classification; causal-lm on raw text). Found by itself when left out, like the other
    columns."""
    text_pair: str | None = None
    """Column with a second text, for sentence pairs. Found by itself for the usual pairs of names, such as `premise`
    and `hypothesis`."""
    label: str | None = None
    """Column with the target: a class name, a list of class names, or a number; for multiple-choice the number or the
    text of the right choice."""
    tokens: str | None = None
    """Column with the words of a sentence (token-classification): a list, or words between spaces."""
    tags: str | None = None
    """Column with one BIO tag per word (token-classification)."""
    source: str | None = None
    """Column with the text to read (seq2seq): the document, or the sentence to translate."""
    target: str | None = None
    """Column with the text to write (seq2seq)."""
    source_prefix: str | None = None
    """Text put before each source (seq2seq), such as `"summarize: "` for T5."""
    question: str | None = None
    """Column with the question (question-answering; multiple-choice, where it may be missing)."""
    context: str | None = None
    """Column with the passage that holds the answer (question-answering)."""
    answers: str | None = None
    """Column with the answers (question-answering): `{text: [...], answer_start: [...]}` as in SQuAD, or a text that
    stands in the context."""
    choices: str | None = None
    """Column with a list of possible answers (multiple-choice); columns such as `choice0`, `choice1` ... or `ending0`
    ... are found by themselves."""
    image: str | None = None
    """Column with the path or the bytes of an image (image-classification); not needed for a folder per class."""
    prompt: str | None = None
    """Column with the prompt (causal-lm); not trained."""
    completion: str | None = None
    """Column with the answer (causal-lm); trained."""
    messages: str | None = None
    """Column with a list of chat messages (causal-lm): assistant turns are trained, everything else is not."""
    tools: str | None = None
    """Column with the tool definitions that belong to `messages`."""
    problem_type: Literal["auto", "single_label", "multi_label", "regression"] = "auto"
    """What the label column holds. auto: lists are multi_label, fractional numbers regression, else single_label."""
    chat_template: str | None = None
    """Path of a Jinja file, for models whose tokenizer brings no chat template."""
    max_length: int | None = Field(default=None, ge=8)
    """Longest row in tokens. Left out: the longest row, at most the model's limit and at most 512 (classification)
    or 2048 (causal-lm); 1024 for raw text."""
    text_rows: TextRows = "auto"
    """What is a row in a .txt file: a line, a paragraph (up to a blank line), or a section (paragraphs of together
    about 4,000 characters: for books). auto: sections where blank lines separate paragraphs, else lines."""
    packing: bool | None = None
    """Short texts share a block of `max_length` tokens without seeing each other (causal-lm on raw text). Left out: on
    where the model keeps them apart, which is checked."""
    stride: int | None = Field(default=None, ge=0)
    """Tokens by which the windows of a long context overlap (question-answering). Left out: a third of a window."""
    undecodable_images: Literal["error", "drop"] = "error"
    """What happens when images cannot be decoded: error lists them, drop leaves them out and writes them down."""
    truncation_strategy: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to a longer row. A row whose whole answer would be cut off is always left out and listed."""
    eval_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of the train file that becomes eval rows when `eval` is not given (at most 2,000 rows)."""
    test_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of the train file that becomes test rows when `test` is not given (at most 2,000 rows)."""
    split_seed: int = Field(default=42, ge=0)
    """Seed of that split; independent of `train.seed`, so that trials with other seeds see the same rows."""
    near_duplicates: float = Field(default=1.0, gt=0, le=1)
    """Rows whose texts have so much of their 5-grams of characters in common (Jaccard) stay on one side of the split;
    0.8 finds texts that differ in a word or two. 1: only equal texts."""
    max_rows: int | None = Field(default=None, ge=10)
    """Use only so many rows of each file, drawn at random with `split_seed`: for a quick try."""

    @model_validator(mode="after")
    def _files_must_differ(self) -> DataBlock:
        train = (self.train,) if isinstance(self.train, str) else self.train
        problems = []
        if not train or not all(train):
            problems.append("train: names no file")
        held_out = [(role, path) for role, path in (("eval", self.eval), ("test", self.test)) if path is not None]
        for role, path in held_out:
            if path in train:
                problems.append(f"{role}: is the file of train; rows for scoring must not be trained on")
        if self.test is not None and self.test == self.eval:
            problems.append("test: is the file of eval; rows for reporting must not choose the checkpoint")
        if len(set(self.columns or ())) != len(self.columns or ()):
            problems.append("columns: names a column twice; give each a name of its own")
        problems += [
            f"{role}: {path!r} is an address, and only files here are read; download it (from the Hub: 'hf download "
            "NAME --repo-type dataset --local-dir FOLDER') and name the file"
            for role, path in (*(("train", path) for path in train), *held_out)
            if "://" in path
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self


class _Named(Block):
    """What every method has."""

    name: str | None = Field(default=None, pattern=NAME)
    """Name of the model's folder and of the method in tables. Left out: the kind and what differs from its usual
    settings, such as `lora-r64`."""

    @model_validator(mode="after")
    def _name_must_be_free(self) -> Self:
        if self.name is not None and self.name.lower() in TAKEN:  # some file systems do not tell capitals
            raise ValueError(f"name: '{self.name}' is the name of another file of the run folder; take another name")
        return self

    def differences(self) -> tuple[str, ...]:
        """What tells this method apart from one of the same kind with its usual settings."""
        return ()

    @property
    def arm(self) -> str:
        """The name of the method: of its folder, its trials and its row in tables."""
        return self.name or "-".join((str(getattr(self, "kind", "")), *self.differences()))


class _Trained(_Named):
    """What every method that trains has."""

    learning_rate: float | None = Field(default=None, gt=0, lt=1)
    """Peak learning rate. Left out, chosen by method, model family and size."""
    learning_rates: tuple[float, ...] | None = Field(default=None, min_length=1)
    """Grid of a comparison's rate search. Left out: three rates around the usual one."""

    @model_validator(mode="after")
    def _rates_must_be_usable(self) -> _Trained:
        problems = []
        if self.learning_rate is not None and self.learning_rates is not None:
            problems.append("learning_rate and learning_rates are both given; remove one")
        if any(not 0 < rate < 1 for rate in self.learning_rates or ()):
            problems.append("learning_rates: expected numbers above 0 and below 1")
        if len(set(self.learning_rates or ())) != len(self.learning_rates or ()):
            problems.append("learning_rates: names a rate twice")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class FullMethod(_Trained):
    """Train every parameter."""

    kind: Literal["full"]
    """full: every parameter is trained."""
    layerwise_lr_decay: float = Field(default=1.0, gt=0, le=1)
    """Each layer below the head learns this much slower than the one above it; 0.8 to 0.95 can help encoders with few
    rows. 1: the same rate everywhere."""


class HeadMethod(_Trained):
    """Train the task's head on a frozen body."""

    kind: Literal["head"]
    """head: the task's head is trained, and nothing below it."""


class LoraMethod(_Trained):
    """Train low-rank updates of frozen matrices (Hu et al. 2021), and the task's head."""

    kind: Literal["lora"]
    """lora: two thin matrices beside each chosen one."""
    rank: int = Field(default=16, ge=1)
    """Rank of the updates."""
    alpha: float | None = Field(default=None, gt=0)
    """The update is scaled by alpha / rank. Left out: twice the rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the thin matrices."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), so that high ranks do not learn slower (Kalajdzievski 2023)."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Matrices that get an update, by the ends of their names, such as `[q_proj, v_proj]`. all-linear: all but the
    head; attention alone is known to lose."""

    def differences(self) -> tuple[str, ...]:
        names = () if self.target_modules == "all-linear" else self.target_modules
        return (
            *((f"r{self.rank}",) if self.rank != 16 else ()),
            *((f"a{self.alpha:g}",) if self.alpha not in (None, 2 * self.rank) else ()),
            *((f"d{self.dropout:g}",) if self.dropout else ()),
            *(("rs",) if self.rslora else ()),
            *(name.replace(".", "_") for name in names),
        )

    @model_validator(mode="after")
    def _must_have_targets(self) -> LoraMethod:
        if not self.target_modules or not all(self.target_modules):
            raise ValueError("target_modules: names no matrix; write all-linear, or names such as [q_proj, v_proj]")
        return self


class AdapterMethod(_Trained):
    """Train small bottlenecks inside a frozen body (Houlsby et al. 2019), its layer norms and the task's head."""

    kind: Literal["adapter"]
    """adapter: a bottleneck after attention and one after the feed-forward part of each layer."""
    reduction_factor: int = Field(default=16, ge=1)
    """The bottleneck is the hidden size divided by it."""
    non_linearity: Literal["relu", "gelu"] = "gelu"
    """Between its two matrices."""

    def differences(self) -> tuple[str, ...]:
        return (
            *((f"f{self.reduction_factor}",) if self.reduction_factor != 16 else ()),
            *((self.non_linearity,) if self.non_linearity != "gelu" else ()),
        )


class PromptMethod(_Trained):
    """Train virtual tokens before each text (Lester et al. 2021), and the task's head."""

    kind: Literal["prompt"]
    """prompt: vectors in front of the text's own, which are taken off `data.max_length`."""
    num_virtual_tokens: int = Field(default=20, ge=1)
    """How many of them."""
    init: Literal["vocabulary", "random"] = "vocabulary"
    """What they start as: the vectors of tokens drawn from the vocabulary, or random numbers of their size."""

    def differences(self) -> tuple[str, ...]:
        return (
            *((str(self.num_virtual_tokens),) if self.num_virtual_tokens != 20 else ()),
            *((self.init,) if self.init != "vocabulary" else ()),
        )


class PeftMethod(_Trained):
    """Train whatever another method of PEFT puts into the model's layers, and the task's head."""

    kind: Literal["peft"]
    """peft: any method of the library PEFT that changes layers."""
    type: str = Field(min_length=1)
    """Its name in PEFT, such as `IA3`, `LOHA`, `OFT` or `VERA`."""
    config: dict[str, Any] = {}
    """Fields of its config in PEFT."""

    def differences(self) -> tuple[str, ...]:
        return (self.type.lower(),)


class BaseMethod(_Named):
    """Train nothing: the model as it is, scored like the others."""

    kind: Literal["base"]
    """base: untouched; language models are asked as they are, classifiers answer with the most frequent class."""


Method = Annotated[
    FullMethod | HeadMethod | LoraMethod | AdapterMethod | PromptMethod | PeftMethod, Field(discriminator="kind")
]
"""How the parameters of a run are trained."""
Arm = Annotated[
    FullMethod | HeadMethod | LoraMethod | AdapterMethod | PromptMethod | PeftMethod | BaseMethod,
    Field(discriminator="kind"),
]
"""What a comparison compares."""
RIVALS = ("lora", "adapter", "prompt", "peft")
"""Kinds that full fine-tuning is compared with. `base` and `head` decide nothing: nobody doubts that training more than
a head helps, but how much is worth seeing."""


class TrainBlock(Block):
    """The training loop, by the names of `transformers.TrainingArguments`."""

    num_train_epochs: float | None = Field(default=None, gt=0)
    """Passes over the train rows. Left out, chosen by task and number of rows."""
    max_steps: int | None = Field(default=None, ge=1)
    """Length of the run in optimizer steps, instead of `num_train_epochs`: give one of the two."""
    global_batch_size: int | None = Field(default=None, ge=1)
    """Examples per optimizer step over all devices. Accumulation follows from it."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Examples per device and forward pass; divides the global batch. Smaller needs less memory, same result: when
    memory runs out it is halved and the global batch is kept, also where it is given here."""
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0 to its peak."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """The same as a number of steps; give one of the two."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "cosine_with_min_lr"
    ] = "linear"
    """How the learning rate falls after the warm-up."""
    lr_scheduler_kwargs: dict[str, Any] = {}
    """Further arguments of the schedule, for example `{min_lr_rate: 0.1}`."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's weight decay; norms and biases are left out."""
    optim: str | None = None
    """The optimizer. `adamw_8bit` keeps AdamW's moments in 8 bits (2.1 bytes a parameter instead of 8), `adamw_bf16`
    in bf16; both are fulltune's own and run on CPU and CUDA. Else any name that transformers knows, such as
    `adamw_torch_fused`, `adafactor` or `adamw_bnb_8bit`. Left out: `adamw_torch_fused` for fp32 weights, `adamw_bf16`
    for bf16 weights, `adamw_8bit` where nothing else fits, be it by the plan or because memory ran out. One that is
    given here is kept."""
    bf16_rounding: Literal["stochastic", "kahan", "nearest"] | None = None
    """With bf16 weights (`model.weights_dtype`): how an update smaller than their spacing arrives. stochastic (the
    default): rounded up or down at random, right on average; kahan: what was lost is kept in 2 more bytes a parameter;
    nearest: it is lost, and at usual learning rates most are."""
    optimizer_in_backward: bool = False
    """Update each tensor as soon as its gradient is there, and free the gradient. Needs `max_grad_norm: 0` and no
    accumulation, because both need all gradients."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's running mean of gradients."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of AdamW's running mean of squared gradients."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Keeps AdamW's division away from zero."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this global norm; 0 switches clipping off."""
    label_smoothing_factor: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target's probability spread over the other classes or tokens."""
    class_weights: str | dict[str | int, Any] | tuple[Any, ...] | None = None
    """How much each class counts in the training loss (classification): `balanced`, so that all classes count alike
    in total, or the weight of each, such as `{rare: 5, usual: 1}`, or a list in the order of the labels."""
    seed: int = Field(default=42, ge=0)
    """Seed of a new head's weights, of dropout and of the order of the rows."""
    precision: Precision = "auto"
    """Type of the computations. auto: bf16 where the processor is fast at it, else fp32. fp16 needs a GPU."""
    activation_checkpointing: bool | None = None
    """Recompute activations in the backward pass: about a third more operations, far less memory. Left out: on
    where the run would not fit without, be it by the plan or because memory ran out, or where the larger micro batch
    that it makes room for is faster. false keeps it off."""
    chunked_loss: bool | None = None
    """Compute a language model's logits and loss in pieces, so that they never exist as a whole. Left out: on where the
    model's head allows it, which is checked before step 1. false keeps it off."""
    memory_limit: str | None = None
    """Most memory that each training process may take, such as `6GiB`: of the GPU, or without one of the host, where
    Python and its libraries are part of it (about 0.7 GiB). The plan keeps to it and the process is held to it: what
    goes beyond is treated as memory that ran out. Without a GPU that needs Linux; mapped files do not count."""
    group_by_length: bool | None = None
    """Rows of similar length share a global batch: far less padding. Left out: on, unless the target goes with the
    length (a quarter of its variance or more), for then batches would be one-sided and the result worse."""
    eval_strategy: Interval = "epoch"
    """When the eval rows are scored and a checkpoint is saved: after each epoch or every `eval_steps`."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Steps between two evaluations, with `eval_strategy: steps`."""
    save_steps: int | None = Field(default=None, ge=1)
    """Further checkpoints every so many steps, so that an interrupted run loses less."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints kept besides the best one."""
    load_best_model_at_end: bool = True
    """Keep the weights with the best eval metric, not the last ones."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without a better eval metric."""
    early_stopping_threshold: float = Field(default=0.0, ge=0)
    """How much better counts as better."""
    logging_steps: int | None = Field(default=None, ge=1)
    """Steps between two lines of `metrics.jsonl`. Left out: about 200 lines over the run."""
    report_to: tuple[str, ...] = ()
    """Trackers that transformers knows: `tensorboard`, `wandb`, `mlflow`, `trackio` ... TensorBoard's files lie in
    `RUN/tensorboard`, unless the environment variable `TENSORBOARD_LOGGING_DIR` names another folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. auto: CUDA when there is a GPU, else CPU."""
    num_processes: int = Field(default=1, ge=1)
    """Processes that share each global batch: one per GPU, or several on CPU (gloo)."""
    extra: dict[str, Any] = {}
    """Any other field of `transformers.TrainingArguments`; fields that fulltune sets itself are refused. `deepspeed` is
    a JSON file, named from the recipe's folder, or the settings themselves."""

    @model_validator(mode="after")
    def _pairs_must_agree(self) -> TrainBlock:
        problems = []
        if self.max_steps is not None and self.num_train_epochs is not None:
            problems.append("max_steps and num_train_epochs are both given; remove one")
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            problems.append("warmup_ratio and warmup_steps are both given; remove one")
        if self.eval_strategy == "steps" and self.eval_steps is None:
            problems.append("eval_strategy is 'steps' but eval_steps is missing; add for example 'eval_steps: 100'")
        if self.eval_strategy == "epoch" and self.eval_steps is not None:
            problems.append("eval_steps is given but eval_strategy is 'epoch'; set 'eval_strategy: steps'")
        if self.lr_scheduler_type == "cosine_with_min_lr" and not {"min_lr", "min_lr_rate"} & set(
            self.lr_scheduler_kwargs
        ):
            problems.append("lr_scheduler_kwargs: cosine_with_min_lr needs a floor; add for example {min_lr_rate: 0.1}")
        if self.global_batch_size and self.global_batch_size % ((self.micro_batch_size or 1) * self.num_processes):
            factors = {"micro_batch_size": self.micro_batch_size, "num_processes": self.num_processes}
            named = " x ".join(f"{name} {value}" for name, value in factors.items() if value and value > 1)
            problems.append(f"global_batch_size: {self.global_batch_size} is not a multiple of {named}")
        problems += _wrong_weights(self.class_weights)
        if self.memory_limit is not None:
            try:
                parse_bytes(self.memory_limit)
            except ValueError as error:
                problems.append(f"memory_limit: {error}")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _wrong_weights(given: str | dict[str | int, Any] | tuple[Any, ...] | None) -> list[str]:
    if given is None or given == "balanced":
        return []
    if isinstance(given, str):
        return [f"class_weights: expected balanced, or a weight for each class, {{rare: 5, usual: 1}}, found {given!r}"]
    weights = list(given.values()) if isinstance(given, dict) else list(given)
    numbers = [one for one in weights if isinstance(one, (int, float)) and not isinstance(one, bool)]
    if len(numbers) < len(weights) or not all(math.isfinite(one) and one >= 0 for one in numbers) or not any(numbers):
        return [f"class_weights: expected numbers of 0 or more, not all 0, found {weights}"]
    return []


class EvaluateBlock(Block):
    """How the result is measured, on rows that were never used for choosing."""

    metric: str | None = None
    """The metric that chooses the best checkpoint and heads the report. Left out: accuracy, f1_micro (multi_label),
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
    budget: str | None = None
    """Most time that all commands on the comparison may take together, such as `30m` or `2h`. It says beforehand what
    fits; with more time later (`--budget`) an undecided comparison goes on."""
    side_by_side: int = Field(default=1, ge=1)
    """Trials at a time on a CPU, each with its share of the cores: with small models and short texts that is faster
    in all, and each one's time in the table is longer. On a GPU one at a time."""
    generic_text: str | None = None
    """A text file of what the model could do before, to see how far each method moves it away: one text a line, or
    paragraphs. Left out: docstrings of Python's standard library."""
    near_duplicates: float = Field(default=0.8, gt=0, le=1)
    """Rows whose texts share so much of their 5-grams (Jaccard) stay on one side of the split. 1: only equal
    ones."""

    @model_validator(mode="after")
    def _budget_must_be_a_time(self) -> CompareBlock:
        if self.budget is not None:
            try:
                parse_seconds(self.budget)
            except ValueError as error:
                raise ValueError(f"budget: {error}") from None
        return self


class Recipe(Block):
    """A whole run: model, task, data, method, training, evaluation, output."""

    model: ModelBlock
    """The pretrained model; a plain string is short for `{name: ...}`."""
    task: TaskName
    """What is learned."""
    data: DataBlock
    method: Method = FullMethod(kind="full")
    """How the parameters are trained; a plain `lora` is short for `{kind: lora}`, and without `kind` it is full."""
    methods: tuple[Arm, ...] = ()
    """What `fulltune compare` compares, in place of `method`: each as there, or its kind alone."""
    train: TrainBlock = TrainBlock()
    evaluate: EvaluateBlock = EvaluateBlock()
    compare: CompareBlock = CompareBlock()
    output: str = "runs"
    """Folder in which each run gets a folder of its own; relative to the recipe's folder."""
    name: str | None = Field(default=None, pattern=NAME)
    """Beginning of the run folder's name; left out, the recipe file's name."""

    @model_validator(mode="before")
    @classmethod
    def _expand_short_forms(cls, values: Any) -> Any:
        """`model: NAME` is short for `model: {name: NAME}`, `lora` for `{kind: lora}`; without `kind` it is full."""
        if not isinstance(values, dict):
            return values
        expanded = dict(values)
        if isinstance(values.get("model"), str):
            expanded["model"] = {"name": values["model"]}
        if isinstance(values.get("method"), str):
            expanded["method"] = {"kind": values["method"]}
        elif isinstance(values.get("method"), dict):
            expanded["method"] = {"kind": "full", **values["method"]}
        if isinstance(values.get("methods"), (list, tuple)):
            expanded["methods"] = [{"kind": one} if isinstance(one, str) else one for one in values["methods"]]
        return expanded

    @model_validator(mode="after")
    def _methods_must_make_a_comparison(self) -> Recipe:
        if not self.methods:
            return self
        problems = []
        kinds = [one.kind for one in self.methods]
        if (count := kinds.count("full")) != 1:
            to_do = "keep one of them" if count else "add it"
            problems.append(
                f"methods: a comparison has 'full' exactly once, because the others are compared with it; found "
                f"{count}: {to_do}"
            )
        if not set(kinds) & set(RIVALS):
            problems.append(
                f"methods: names nothing to compare full fine-tuning with ('base' and 'head' are only shown for "
                f"orientation); add one of {', '.join(RIVALS)}"
            )
        names = [one.arm for one in self.methods if one.kind != "full" or count == 1]
        twice = sorted({name for name in names if names.count(name) > 1})
        problems += [f"methods: two are called '{name}'; give one of them another 'name'" for name in twice]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def fingerprint(self) -> str:
        """Hash of all settings that shape a run: two recipes with the same one continue each other's run."""
        return hashlib.sha256(json.dumps(self.shaping(), sort_keys=True).encode()).hexdigest()[:16]

    def shaping(self) -> dict[str, Any]:
        """All settings that shape a run."""
        settings = self.model_dump(mode="json", exclude={"output", "name"})
        settings["compare"]["budget"] = None  # more time goes on with the same comparison
        return settings

    def train_files(self) -> tuple[str, ...]:
        return (self.data.train,) if isinstance(self.data.train, str) else self.data.train


def with_attention(recipe: Recipe, attn_implementation: str | None) -> Recipe:
    """The recipe with the attention kernel that a plan found to be the fastest; None leaves it as it is."""
    if attn_implementation is None:
        return recipe
    block = recipe.model.model_copy(update={"attn_implementation": attn_implementation})
    return recipe.model_copy(update={"model": block})


def is_address(path: str) -> bool:
    """`https://...`, `s3://...`: nothing that a file's path begins with."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


# The functions of pathlib raise where a name is no user's (`~$draft.csv`), links go in a circle or a name is too long:
# of these the readers say more.
def _expanded(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111


def resolve_paths(recipe: Recipe, base: Path) -> Recipe:
    """Make the recipe's relative paths absolute; a Hub id or a `package:` name stays as it is.

    Args:
        recipe: A recipe as read from a file.
        base: The recipe's folder.

    Raises:
        RecipeError: For each path that no file can have.
    """
    problems: list[str] = []

    def absolute(path: str, setting: str) -> str:
        if path.startswith("package:"):
            return path
        if "\0" in path:
            problems.append(f"{setting}: {path!r} holds a NUL character, expected a path; write one without it")
        elif is_address(path):
            problems.append(
                f"{setting}: '{path}' is an address, expected a path; nothing is downloaded here: download it, and "
                "give the file's path"
            )
        else:
            whole = os.path.realpath(base / _expanded(path))
            if (shown := whole.encode("utf-8", "backslashreplace").decode()) == whole:
                return whole
            problems.append(f"{setting}: {shown} is not UTF-8, expected a path that is; rename the file or folder")
        return path

    data = recipe.data
    update: dict[str, Any] = {"train": tuple(absolute(path, "data.train") for path in recipe.train_files())}
    for key in ("eval", "test", "chat_template"):
        if (value := getattr(data, key)) is not None:
            update[key] = absolute(value, f"data.{key}")
    block = recipe.compare
    if block.generic_text is not None:
        block = block.model_copy(update={"generic_text": absolute(block.generic_text, "compare.generic_text")})
    train = recipe.train
    if isinstance(file := train.extra.get("deepspeed"), str):
        train = train.model_copy(
            update={"extra": {**train.extra, "deepspeed": absolute(file, "train.extra.deepspeed")}}
        )
    name = recipe.model.name
    local = os.path.exists(base / _expanded(name))  # noqa: PTH110
    looks_like_path = name.startswith((".", "/", "~")) or name.endswith(".gguf") or local
    model = recipe.model
    if looks_like_path and not name.startswith("package:"):
        model = model.model_copy(update={"name": absolute(name, "model.name")})
    output = absolute(recipe.output, "output")
    if problems:
        raise RecipeError(problems)
    return recipe.model_copy(
        update={
            "data": data.model_copy(update=update),
            "model": model,
            "train": train,
            "compare": block,
            "output": output,
        }
    )
