"""The recipe's block `data`."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from fulltune.recipe.model import Block, refuse

TextRows = Literal["auto", "line", "paragraph", "section"]
UTF_8 = "utf-8-sig"


_MAX_WEIGHT_SUM = 0.999
"""Largest allowed sum of weights: 999 mixed-in rows for each row of the task."""


def codec_of(encoding: str) -> str:
    """Return the name of the codec that opens text in `encoding`; raise `ValueError` if Python does not know it."""
    try:
        "a".encode(encoding)
    except (LookupError, ValueError):
        raise ValueError(f"expected a name such as utf-8, cp1252 or utf-16, found '{encoding}'") from None
    return UTF_8 if codecs.lookup(encoding).name == "utf-8" else encoding


class MixedFile(Block):
    """A file whose rows are mixed into the training data but never scored."""

    path: str = Field(min_length=1)
    """File or folder, as in `data.train`."""
    weight: float = Field(gt=0, lt=1)
    """Share of each epoch's rows that come from this file, such as 0.05. They are drawn at random, none twice before
    all have been used. For raw text, packed rows are counted."""


# pydantic inserts these names, which no setting can have, into an error's location; `file.py` removes them.
_TrainEntry = Annotated[
    Annotated[str, Tag("one path")] | Annotated[MixedFile, Tag("mixed file")],
    Discriminator(lambda value: "mixed file" if isinstance(value, (dict, MixedFile)) else "one path"),
]
_Train = Annotated[
    Annotated[str, Tag("one path")] | Annotated[tuple[_TrainEntry, ...], Tag("several paths")],
    Discriminator(lambda value: "several paths" if isinstance(value, (list, tuple)) else "one path"),
]


class DataBlock(Block):
    """Which rows and columns to use, and how to tokenize them."""

    train: _Train
    """File, list of files or folder: csv, tsv, jsonl, json, parquet, arrow, CoNLL or txt; for images, a folder with one
    folder per class. Files without a weight hold the task's rows, from which eval and test are split. To reduce
    forgetting, mix in other rows by weight: `[task.jsonl, {path: generic.jsonl, weight: 0.05}]`. Mixed-in rows need
    the task's columns, but causal-lm also accepts other kinds of rows, such as raw text. Images cannot be mixed in."""
    eval: str | None = Field(default=None, coerce_numbers_to_str=True)
    """Rows for choosing: best checkpoint, early stopping, calibration. Default: split off train."""
    test: str | None = Field(default=None, coerce_numbers_to_str=True)
    """Rows for the final scores, never used for choosing. Default: split off train."""
    columns: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Column names of csv and tsv files without a header line, from left to right, such as `[text, label]`. Default:
    read from the first line."""
    encoding: str = "utf-8"
    """Character encoding of all text files, such as `utf-8`, `cp1252` (Excel's csv in Western Europe), `latin-1`,
    `utf-16` or `shift_jis`."""
    text: str | None = None
    """Column with the text (text-classification, and causal-lm on raw text). By default, this and the other columns are
    recognised by their names."""
    text_pair: str | None = None
    """Column with the second text of a pair. Default: recognised by usual names, such as `premise` and `hypothesis`,
    unless `text` is given."""
    label: str | None = None
    """Column with the target: a class name, a list of class names, or a number. For multiple-choice: the number or the
    text of the right choice."""
    tokens: str | None = None
    """Column with the words of a sentence (token-classification): a list, or text with spaces."""
    tags: str | None = None
    """Column with one BIO tag per word (token-classification)."""
    source: str | None = None
    """Column with the text to read (seq2seq), to summarise or translate."""
    target: str | None = None
    """Column with the text to write (seq2seq)."""
    source_prefix: str | None = None
    """Text put before each source (seq2seq), such as `"summarize: "` for T5."""
    question: str | None = None
    """Column with the question (question-answering, and optionally multiple-choice)."""
    context: str | None = None
    """Column with the passage that contains the answer (question-answering)."""
    answers: str | None = None
    """Column with the answers (question-answering): `{text: [...], answer_start: [...]}` as in SQuAD, or a text that
    occurs in the context."""
    choices: str | None = None
    """Column with a list of possible answers (multiple-choice). Columns such as `choice0`, `choice1` ... are recognised
    too."""
    image: str | None = None
    """Column with the path or the bytes of an image (image-classification). Not needed if each class has its own
    folder."""
    prompt: str | None = None
    """Column with the prompt (causal-lm), which gets no loss."""
    input: str | None = None
    """Column with the input of an instruction (causal-lm). It is put after the prompt and a blank line, unless it is
    empty. Default: `input` or `context`, if the prompt column is called `instruction`."""
    completion: str | None = None
    """Column with the answer (causal-lm), which gets the loss."""
    messages: str | None = None
    """Column with a list of chat messages (causal-lm). Only assistant turns get a loss."""
    tools: str | None = None
    """Column with the tool definitions for `messages`."""
    problem_type: Literal["auto", "single_label", "multi_label", "regression"] = "auto"
    """Kind of label. `auto`: lists are `multi_label`, fractional numbers `regression`, anything else `single_label`."""
    chat_template: str | None = None
    """Jinja file with a chat template, for tokenizers without one."""
    max_length: int | None = Field(default=None, ge=8)
    """Longest row in tokens. Lower it to save memory. Default: the longest row in the data, up to the model's limit and
    at most 512 (classification), 2048 (causal-lm) or 1024 (raw text)."""
    text_rows: TextRows = "auto"
    """Rows of a .txt file: lines, paragraphs (up to a blank line), or sections of paragraphs with about 4,000
    characters (for books). `auto`: sections if blank lines separate paragraphs, otherwise lines."""
    packing: bool | None = None
    """Put several short texts into one block of `max_length` tokens, without attention between them (causal-lm on raw
    text). Default: on, if a check shows that the model keeps the texts separate."""
    stride: int | None = Field(default=None, ge=0)
    """Number of tokens by which the windows of a long context overlap (question-answering). Default: a third of a
    window."""
    undecodable_images: Literal["error", "drop"] = "error"
    """What to do with images that cannot be decoded: `error` lists them and stops, `drop` lists and drops them."""
    truncation_strategy: Literal["truncate", "drop", "error"] = "truncate"
    """What to do with rows longer than `max_length`. Rows whose whole answer would be cut off are always dropped and
    listed."""
    eval_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of train that becomes eval rows if `eval` is not given, at most 2,000 rows."""
    test_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of train that becomes test rows if `test` is not given, at most 2,000 rows."""
    split_seed: int = Field(default=42, ge=0)
    """Seed of the split. It is separate from `train.seed`, so that trials with other seeds use the same rows."""
    near_duplicates: float = Field(default=1.0, gt=0, le=1)
    """Similarity (Jaccard index of 5-character sequences) from which two rows are put into the same split. 1: only
    equal texts; 0.8 also finds texts that differ in a word or two."""
    group: str | None = None
    """Column that identifies the owner of a row, such as a customer, patient or document. Rows of one group never fall
    into two splits. Every row of the task needs a value. If eval or test files share groups with train, this is
    reported. Mixed-in rows of a scored group are dropped."""
    time: str | None = None
    """Column with the time of each row: ISO dates (`2026-11-28`), date-times, or numbers such as Unix seconds. The
    newest rows become the test rows, and those before them the eval rows. Rows with the same time stay together. A
    later row whose text or `group` occurs in an earlier split is dropped and listed. Only train files are split."""
    contamination: str | None = Field(default=None, coerce_numbers_to_str=True)
    """File or folder of texts that must not be trained on, such as benchmarks (txt: one text per line or paragraph;
    tables: every text column). Train rows with an equal text, or with half of the shorter text's 8-word sequences,
    are counted and reported, not dropped. Case, white space, answers under 8 words and sequences that occur in over
    100 texts are ignored. Not for images."""
    patch: str | None = Field(default=None, coerce_numbers_to_str=True)
    """File of decisions about single rows, written by `fulltune data --review`: which rows to drop, and which texts or
    labels to replace. A patch written for other rows is refused."""
    max_rows: int | None = Field(default=None, ge=10)
    """Most rows to use from each file, for a quick try. They are drawn with `split_seed`, with up to three rows of each
    label."""

    @field_validator("train", mode="before")
    @classmethod
    def _expand_short_forms(cls, value: object) -> object:
        """Replace each `{path: x}` without a weight by `x`."""
        entries = [value] if isinstance(value, dict) else value
        if not isinstance(entries, (list, tuple)):
            return entries
        return [one["path"] if isinstance(one, dict) and one.keys() == {"path"} else one for one in entries]

    @field_validator("encoding")
    @classmethod
    def _encoding_must_be_known(cls, encoding: str) -> str:
        codec_of(encoding)
        return encoding

    @property
    def entries(self) -> tuple[str | MixedFile, ...]:
        """All entries of `train`, even if it is a single path."""
        return (self.train,) if isinstance(self.train, str) else self.train

    @property
    def task_files(self) -> tuple[str, ...]:
        return tuple(one for one in self.entries if isinstance(one, str))

    @property
    def mixed_files(self) -> tuple[MixedFile, ...]:
        return tuple(one for one in self.entries if isinstance(one, MixedFile))

    @model_validator(mode="after")
    def _settings_must_agree(self) -> DataBlock:
        """Refuse settings that contradict each other."""
        mixed, weights = [one.path for one in self.mixed_files], [one.weight for one in self.mixed_files]
        train = (*self.task_files, *mixed)
        held_out = {role: path for role, path in (("eval", self.eval), ("test", self.test)) if path is not None}
        pairs = {
            "train: every file has a weight, but the task's rows, from which eval and test are split, need a file "
            "without one; remove a weight": weights and not self.task_files,
            f"train: the weights sum to {sum(weights):g}, expected at most {_MAX_WEIGHT_SUM:g}, because the rest of "
            "each epoch is the task's rows; lower them": sum(weights) > _MAX_WEIGHT_SUM,
            "train: names no file": not train or not all(train),
            **{f"train: names {path} twice, once with a weight; keep one": train.count(path) > 1 for path in mixed},
            **{
                f"{role}: is also a file of train; rows for scoring must not be trained on": path in train
                for role, path in held_out.items()
            },
            "test: is the same file as eval; rows for reporting must not choose the checkpoint": (
                self.test is not None and self.test == self.eval
            ),
            "time: has no effect, because eval and test name files; remove it, or one of the files": (
                self.time is not None and len(held_out) == 2
            ),
            "columns: two columns have the same name; give each a different one": (
                len(set(self.columns or ())) != len(self.columns or ())
            ),
        }
        refuse(pairs)
        return self


def rows_per_epoch(task_rows: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Return how many rows of each mixed-in file an epoch needs, so that each file has its weight among all rows."""
    return tuple(round(task_rows * weight / (1 - sum(weights))) for weight in weights)
