from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from fulltune.recipe.address import HubDataset, expand_short_form
from fulltune.recipe.functions import FunctionName
from fulltune.recipe.model import Block, raise_for_problems
from fulltune.recipe.selection import Where

TextRows = Literal["auto", "line", "paragraph", "section"]
Packing = Annotated[
    Literal["auto", True, False] | None, BeforeValidator(lambda value: None if value == "auto" else value)
]
UTF_8 = "utf-8-sig"
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".feather", ".conll", ".iob", ".bio")

_MAX_WEIGHT_SUM = 0.999
"""Maximum sum of the weights: 999 mixed-in rows per row of the task."""


def codec_for_encoding(encoding: str) -> str:
    """Return the name of Python's codec for an encoding (for UTF-8, one that skips a byte order mark). Raise
    `ValueError` if the encoding is unknown."""
    try:
        "a".encode(encoding)
    except (LookupError, ValueError):
        raise ValueError(f"expected a name such as utf-8, cp1252 or utf-16, found '{encoding}'") from None
    return UTF_8 if codecs.lookup(encoding).name == "utf-8" else encoding


class MixedFile(Block):
    """A file whose rows are mixed into the training data but never scored."""

    path: str = Field(min_length=1)
    """File, folder or address, as for `data.train`. `hub: OWNER/NAME` with its settings is accepted instead."""
    weight: float = Field(gt=0, lt=1)
    """Share of each epoch's rows that come from this file, such as 0.05. Rows are drawn at random, and none is repeated
    before all have been used. For raw text, packed rows are counted."""


# pydantic inserts these names, which no setting can have, into an error's location; `file.py` removes them.
_TrainEntry = Annotated[
    Annotated[str, Tag("one path")] | Annotated[MixedFile, Tag("mixed file")],
    Discriminator(lambda value: "mixed file" if isinstance(value, (dict, MixedFile)) else "one path"),
    BeforeValidator(expand_short_form, json_schema_input_type=str | MixedFile | HubDataset),
]
_Train = Annotated[
    Annotated[_TrainEntry, Tag("one entry")] | Annotated[tuple[_TrainEntry, ...], Tag("several entries")],
    Discriminator(lambda value: "several entries" if isinstance(value, (list, tuple)) else "one entry"),
]


def _expand_held_out(value: object) -> object:
    if isinstance(expanded := expand_short_form(value), Mapping) and "weight" in expanded:
        raise ValueError("expected rows without a weight, which only data.train has; remove it")
    return expanded


_HeldOut = Annotated[str | None, BeforeValidator(_expand_held_out, json_schema_input_type=str | HubDataset | None)]


class DataBlock(Block):
    """Settings for reading, splitting and tokenizing the rows."""

    train: _Train
    """File, list of files, or folder with csv, tsv, jsonl, json, parquet, arrow, CoNLL or txt files (also `.gz`,
    `.bz2`, `.xz`, `.zst` or `.zip`), a data set on the Hub (`{hub: OWNER/NAME}`), or an address: `hf://datasets/...`,
    `s3://`, `gs://`, `abfs://`, `https://`, `sqlite:///FILE?table=NAME` or another database. For images, a folder with
    one subfolder per class. Files without a weight hold the task's rows, from which eval and test are
    split off. To reduce forgetting, mix in other rows by weight: `[task.jsonl, {path: generic.jsonl, weight:
    0.05}]`. Mixed-in rows need the task's columns, but causal-lm also accepts other kinds of rows, such as raw text.
    Images cannot be mixed in."""
    eval: _HeldOut = Field(default=None, coerce_numbers_to_str=True)
    """Rows for selecting the best checkpoint, early stopping and calibration. Default: split off from train."""
    test: _HeldOut = Field(default=None, coerce_numbers_to_str=True)
    """Rows for the final scores, never used to select anything. Default: split off from train."""
    columns: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of the columns of csv and tsv files without a header line, such as `[text, label]`. Default: the names in
    the first line."""
    encoding: Annotated[str, AfterValidator(lambda name: codec_for_encoding(name) and name)] = "utf-8"
    """Character encoding of all text files, such as `utf-8`, `cp1252` (Excel's csv in Western Europe), `latin-1`,
    `utf-16` or `shift_jis`."""
    text: str | None = None
    """Column with the text (text-classification, causal-lm on raw text, labelled candidates of reranking). By default,
    all columns are recognised by their names."""
    text_pair: str | None = None
    """Column with the second text of a pair. Default: recognised by common names, such as `premise` and `hypothesis`,
    unless `text` is set."""
    label: str | None = None
    """Column with the target: a class name, a list of class names, or a number. For multiple-choice: the number or text
    of the right choice. For reranking: 0, or a grade from 1 of the `text`'s relevance."""
    label_columns: tuple[str, ...] | None = Field(default=None, min_length=2)
    """Columns of 0 and 1, one for each label. The names of those with 1 become a list, in a new column whose name is
    `label`."""
    query: str | None = None
    """Column with the query (embedding, reranking). Without queries, texts with the same `label` are each other's
    positives (embedding)."""
    positive: str | None = None
    """Column with the text that the query should find (embedding, reranking)."""
    negative: str | None = None
    """Column with a text that the query should not find (embedding, reranking). `negative1`, `negative2` ... are found
    too. Each row needs all of them."""
    hard_negatives: int = Field(default=0, ge=0, le=10)
    """Number of negatives added to each query (embedding): positives of other rows that the untouched model finds
    nearest to the query. Likely false negatives (cosines above 95 % of the positive's) come last."""
    candidates: int = Field(default=16, ge=2, le=100)
    """Texts among which a query's positive is ranked (reranking): the positive, the row's negatives, and those of other
    rows that BM25 ranks highest for the query."""
    tokens: str | None = None
    """Column with the words of a sentence (token-classification), as a list or as text with spaces."""
    tags: str | None = None
    """Column with one BIO tag per word (token-classification)."""
    tag_names: tuple[str, ...] | None = Field(default=None, min_length=2)
    """Names of tags that are numbers, in the order of the numbers from 0, such as `[O, B-PER, I-PER]`."""
    source: str | None = None
    """Column with the input text (seq2seq), such as the text to summarise or translate."""
    target: str | None = None
    """Column with the output text (seq2seq)."""
    source_prefix: str | None = None
    """Text added before each source (seq2seq), such as `"summarize: "` for T5."""
    question: str | None = None
    """Column with the question (question-answering, and optionally multiple-choice)."""
    context: str | None = None
    """Column with the passage that contains the answer (question-answering)."""
    answers: str | None = None
    """Column with the answers (question-answering): `{text: [...], answer_start: [...]}` as in SQuAD, or a text that
    occurs in the context."""
    choices: str | None = None
    """Column with a list of possible answers (multiple-choice). Separate columns, such as `choice0` and `choice1`, are
    recognised too."""
    image: str | None = None
    """Column with the path or bytes of an image (image-classification), not needed if each class has its own folder."""
    prompt: str | None = None
    """Column with the prompt (causal-lm), on which no loss is computed."""
    input: str | None = None
    """Column with an instruction's input (causal-lm), added after the prompt and a blank line unless empty. Default:
    `input` or `context` if the prompt column is called `instruction`."""
    completion: str | None = None
    """Column with the answer (causal-lm), on which the loss is computed."""
    messages: str | None = None
    """Column with a list of chat messages (causal-lm). The loss covers only the assistant's messages."""
    train_on: Literal["all", "last"] = "all"
    """Which of the assistant's messages are trained: all, or only the last of each conversation. Messages with `train:
    false` or `weight: 0` are never trained, and `last` passes over them."""
    tools: str | None = None
    """Column with the tool definitions for `messages`."""
    problem_type: Literal["auto", "single_label", "multi_label", "regression"] = "auto"
    """Type of label. With `auto`, lists are `multi_label`, fractional numbers `regression`, and anything else
    `single_label`."""
    chat_template: str | None = None
    """Jinja file with a chat template, for tokenizers without one."""
    max_length: int | None = Field(default=None, ge=8)
    """Maximum length of a row in tokens. Lower values save memory. Default: the longest row's length, up to the model's
    limit and at most 512 (classification), 2048 (causal-lm) or 1024 (raw text)."""
    text_rows: TextRows = "auto"
    """How a .txt file is split into rows: by line, by paragraph (up to a blank line), or by sections of whole
    paragraphs with about 4,000 characters (for books). `auto` means sections if blank lines separate paragraphs,
    otherwise lines."""
    packing: Packing = None
    """Pack several short rows into one sequence, without attention between them (causal-lm). `auto`: for raw text, on
    if a check shows that the model keeps texts separate; for chats and pairs, off unless `fulltune plan --measure`
    finds it faster. Raw text fills sequences of `max_length` tokens; chats and pairs are packed within each micro
    batch, so that a step has the same rows and the same loss as without (if `train.group_by_length`, which packing
    turns off by default, is the same)."""
    stride: int | None = Field(default=None, ge=0)
    """Number of tokens by which windows of a long context overlap (question-answering). Default: a third of a
    window."""
    undecodable_images: Literal["error", "drop"] = "error"
    """What to do with images that cannot be decoded: `error` lists them and stops, `drop` lists and drops them."""
    truncation_strategy: Literal["truncate", "drop", "error"] = "truncate"
    """What to do with rows longer than `max_length`. Rows whose whole answer would be cut off are always dropped and
    listed."""
    eval_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of train, at most 2,000 rows, that becomes eval rows if `eval` is not set."""
    test_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of train, at most 2,000 rows, that becomes test rows if `test` is not set."""
    folds: int | None = Field(default=None, ge=2, le=20)
    """Number of folds for cross-validation. `fulltune run` trains one model per fold; its test rows are one of this
    many parts of train, stratified by label, with groups kept together."""
    fold: int | None = Field(default=None, ge=1)
    """Train only this fold, from 1 to `folds`, as a single run."""
    split_seed: int = Field(default=42, ge=0)
    """Random seed of the split. It is separate from `train.seed`, so that runs with other seeds use the same rows."""
    near_duplicates: float = Field(default=1.0, gt=0, le=1)
    """Minimum similarity (Jaccard index of 5-character sequences) at which two rows are put into the same split. 1
    matches only equal texts. 0.8 also matches texts that differ in a word or two."""
    group: str | None = None
    """Column that identifies a row's customer, patient or document. Rows of one group are never divided between splits.
    Every row of the task needs a value. Groups that eval or test files share with train are reported. Mixed-in rows
    are dropped if their group is in eval or test."""
    time: str | None = None
    """Column with each row's time: ISO dates (`2026-11-28`), date-times, or numbers such as Unix seconds. The newest
    rows become the test rows, and the next newest the eval rows. Rows with the same time stay together. A later row
    is dropped and listed if its text or `group` occurs in an earlier split. Only train files are split."""
    contamination: str | None = Field(default=None, coerce_numbers_to_str=True)
    """File or folder of texts that must not be trained on, such as benchmarks (txt: one text per line or paragraph;
    tables: every text column). Train rows that equal such a text, or share half of the shorter text's 8-word
    sequences, are reported but not dropped. Case, white space, answers under 8 words and sequences in over 100 texts
    are ignored. Images are not supported."""
    patch: str | None = Field(default=None, coerce_numbers_to_str=True)
    """Patch file, written by `fulltune data --review`, that lists rows to drop and texts or labels to replace. A patch
    written for other rows is refused."""
    preprocess: FunctionName | None = None
    """Your own function, as `module:function`, that gets each row as a dictionary and returns the changed row."""
    where: Where | None = None
    """Condition that train, eval and test rows must fulfil, such as `lang == 'de' and year >= 2020`. Columns, in
    backticks if their names are not identifiers, are compared by `==`, `!=`, `<`, `in ('a', 'b')` or `is None`, joined
    by `and`, `or` and `not`. As in SQL, only `is None` is true of a missing value. Mixed-in rows are not tested."""
    max_rows: int | None = Field(default=None, ge=10)
    """Maximum number of rows from each file, for a quick try. Rows are sampled with `split_seed` and include up to
    three of each label."""

    @property
    def entries(self) -> tuple[str | MixedFile, ...]:
        return self.train if isinstance(self.train, tuple) else (self.train,)

    @property
    def task_files(self) -> tuple[str, ...]:
        return tuple(one for one in self.entries if isinstance(one, str))

    @property
    def mixed_files(self) -> tuple[MixedFile, ...]:
        return tuple(one for one in self.entries if isinstance(one, MixedFile))

    @model_validator(mode="after")
    def _settings_must_agree(self) -> DataBlock:
        mixed, weights = [one.path for one in self.mixed_files], [one.weight for one in self.mixed_files]
        train = (*self.task_files, *mixed)
        held_out = {role: path for role, path in (("eval", self.eval), ("test", self.test)) if path is not None}
        pairs = {
            "train: all files have a weight, but the task's rows, from which eval and test are split, need a file "
            "without a weight; remove one of the weights": weights and not self.task_files,
            f"train: the weights add up to {sum(weights):g}, expected at most {_MAX_WEIGHT_SUM:g}, because each "
            "epoch needs rows of the task; lower the weights": sum(weights) > _MAX_WEIGHT_SUM,
            "train: no file given; write the path of a data file": not train or not all(train),
            **{
                f"train: {path} is listed twice, once with a weight; keep one entry": train.count(path) > 1
                for path in mixed
            },
            **{
                f"{role}: also in train, but a model must not be scored on train rows; use another file": path in train
                for role, path in held_out.items()
            },
            "test: the file is the same as eval, but test rows must not select the checkpoint; use another file": (
                self.test is not None and self.test == self.eval
            ),
            "time: has no effect if both eval and test are files; remove time, or one of the files": (
                self.time is not None and len(held_out) == 2
            ),
            f"fold: expected at most {self.folds}, the number of folds, found {self.fold}": (
                self.folds is not None and (self.fold or 1) > self.folds
            ),
            "label_columns: their labels need a column; set label to its name, such as labels": (
                self.label_columns is not None and self.label is None
            ),
            "columns: two columns have the same name; give each a different name": (
                len(set(self.columns or ())) != len(self.columns or ())
            ),
        }
        raise_for_problems(pairs)
        return self


def rows_per_epoch(task_rows: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Return how many rows each mixed-in file contributes to an epoch, so that its share of all rows equals its
    weight."""
    return tuple(round(task_rows * weight / (1 - sum(weights))) for weight in weights)
