"""The recipe's block `data`."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from fulltune.recipe.model import Block, refuse

TextRows = Literal["auto", "line", "paragraph", "section"]
UTF_8 = "utf-8-sig"
"""Python's name of UTF-8 whose byte order mark is no text, where there is one."""


_MOST = 0.999
"""Together: each epoch has all of the task's rows, and with them a thousand times as many others."""


def codec_of(encoding: str) -> str:
    """What text in an encoding is opened with. Raises `ValueError` when Python does not know it."""
    try:
        "a".encode(encoding)
    except (LookupError, ValueError):
        raise ValueError(f"expected a name such as utf-8, cp1252 or utf-16, found '{encoding}'") from None
    return UTF_8 if codecs.lookup(encoding).name == "utf-8" else encoding


class MixedFile(Block):
    """A file whose rows are mixed into the task's rows, and only trained on."""

    path: str = Field(min_length=1)
    """File or folder, as in `data.train`."""
    weight: float = Field(gt=0, lt=1)
    """Share of the rows of each epoch that are drawn from this file, such as 0.05. They are drawn at random with
    `train.seed`, each once before any comes again, and the next epoch goes on with those that are left. Without a
    weight the rows are the task's own. Raw text is counted in rows, too: packed ones, where texts share a row."""


# pydantic puts these names, which no setting can have, into the place of an error; the recipe's reader leaves them out.
_Entry = Annotated[
    Annotated[str, Tag("one path")] | Annotated[MixedFile, Tag("mixed file")],
    Discriminator(lambda given: "mixed file" if isinstance(given, (dict, MixedFile)) else "one path"),
]
_Train = Annotated[
    Annotated[str, Tag("one path")] | Annotated[tuple[_Entry, ...], Tag("several paths")],
    Discriminator(lambda given: "several paths" if isinstance(given, (list, tuple)) else "one path"),
]


class DataBlock(Block):
    """Which rows, which columns, and how they become tokens."""

    train: _Train
    """File, list of files or folder: csv, tsv, jsonl, json, parquet, arrow, CoNLL, txt; for images a folder with one
    folder per class. A folder with files named `dev`, `valid` or `test` is refused: name the files. `${NAME}` is taken
    from the environment; a relative path starts at the recipe's folder. Files without a weight are together the task's
    rows: eval and test are split off them, and an epoch is one pass over them. A file with a weight, as in
    `[task.jsonl, {path: generic.jsonl, weight: 0.05}]`, is mixed into each epoch and never scored on, so that
    less is forgotten. Its columns are those of the task's rows; for causal-lm it may hold another form, such as raw
    text beside conversations. Not for images."""
    eval: str | None = Field(default=None, coerce_numbers_to_str=True)
    """Rows for choosing: best checkpoint, early stopping, calibration. Left out, they are split off train."""
    test: str | None = Field(default=None, coerce_numbers_to_str=True)
    """Rows for reporting, never used for choosing. Left out, they are split off train."""
    columns: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of the columns of csv and tsv files that have no header line, from left to right, such as `[text, label]`.
    Left out: the first line holds the names."""
    encoding: str = "utf-8"
    """How characters are written as bytes in csv, tsv, jsonl, json, txt and CoNLL files: a name that Python knows, such
    as `cp1252` (Excel's csv in Western Europe), `latin-1`, `utf-16` or `shift_jis`. One for all files of `train`,
    `eval` and `test`."""
    text: str | None = None
    """Column with the text (text-classification; causal-lm on raw text). Found by itself when left out, like the other
    columns."""
    text_pair: str | None = None
    """Column with a second text, for sentence pairs. Found by itself for the usual pairs of names, such as `premise`
    and `hypothesis`, unless `text` is given: then only what is named is read."""
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
    input: str | None = None
    """Column with what an instruction is about (causal-lm): put after the prompt, behind a blank line, in rows where it
    is not empty. Found by itself, as `input` or `context`, beside a prompt called `instruction`."""
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
    group: str | None = None
    """Column that says whose a row is (a customer, patient, document, conversation): rows with the same value are never
    on two sides of a split, nor are rows whose texts are equal, or nearly so (`near_duplicates`), whoever's they are.
    Each row of the task's files needs a value. In files of `eval` and `test`, rows that share one with train are
    counted and noted; a mixed file may lack the column, and loses the rows whose value is scored on."""
    time: str | None = None
    """Column that says when a row came: the newest rows are test rows, those before them eval rows, the oldest are
    trained on. ISO dates (`2026-11-28`), date-times, with a zone or without, or numbers such as Unix seconds: the same
    kind in each row. Rows of one time stay on one side. A row whose text, or `group`, already stands in an earlier
    split is left out of the later one, listed and counted. Classes keep no shares. Only the train files are split by
    it."""
    contamination: str | None = Field(default=None, coerce_numbers_to_str=True)
    """File, or folder with its folders, of texts that must not be trained on: benchmarks, tests (txt: a line or a
    paragraph each; csv, jsonl and other tables: each text in any column). Train rows are counted and noted whose text,
    prompt, question or answer is equal to one, or shares at least half of the runs of 8 words of the shorter one. Case
    and white space do not count, nor do an answer of fewer than 8 words and runs that stand in more than 100 of the
    texts. No row is dropped. Not for images."""
    patch: str | None = Field(default=None, coerce_numbers_to_str=True)
    """File of decisions about single rows, as `fulltune data --review` writes it: which are dropped, and in which a
    text or label is replaced. Each is known by a hash of all its columns; a patch for other rows is refused."""
    max_rows: int | None = Field(default=None, ge=10)
    """Use only so many rows of each file, drawn at random with `split_seed`, up to three of each label first: for a
    quick try."""

    @field_validator("train", mode="before")
    @classmethod
    def _expand_short_forms(cls, given: Any) -> Any:
        """`{path: x}` is the same as `x`."""
        entries = [given] if isinstance(given, dict) else given
        if not isinstance(entries, (list, tuple)):
            return entries
        return [one["path"] if isinstance(one, dict) and one.keys() == {"path"} else one for one in entries]

    @field_validator("encoding")
    @classmethod
    def _must_be_known(cls, given: str) -> str:
        codec_of(given)
        return given

    @property
    def entries(self) -> tuple[str | MixedFile, ...]:
        """All of `train`."""
        return (self.train,) if isinstance(self.train, str) else self.train

    @property
    def task_files(self) -> tuple[str, ...]:
        """Those without a weight: together the task's rows."""
        return tuple(one for one in self.entries if isinstance(one, str))

    @property
    def mixed_files(self) -> tuple[MixedFile, ...]:
        """Those with a weight."""
        return tuple(one for one in self.entries if isinstance(one, MixedFile))

    @model_validator(mode="after")
    def _files_must_differ(self) -> DataBlock:
        mixed, weights = [one.path for one in self.mixed_files], [one.weight for one in self.mixed_files]
        train = (*self.task_files, *mixed)
        held_out = {role: path for role, path in (("eval", self.eval), ("test", self.test)) if path is not None}
        pairs = {
            "train: all files have a weight, expected one without at least: the task's rows, which eval and test are "
            "split off; remove its weight": weights and not self.task_files,
            f"train: the weights come to {sum(weights):g}, expected at most {_MOST:g}: the rest of each epoch are the "
            "task's rows; lower them": sum(weights) > _MOST,
            "train: names no file": not train or not all(train),
            **{
                f"train: names {path} twice, and one of them has a weight; keep one of them": train.count(path) > 1
                for path in mixed
            },
            **{
                f"{role}: is the file of train; rows for scoring must not be trained on": path in train
                for role, path in held_out.items()
            },
            "test: is the file of eval; rows for reporting must not choose the checkpoint": (
                self.test is not None and self.test == self.eval
            ),
            "time: eval and test name files, so there is nothing to split by time; remove it, or a file": (
                self.time is not None and len(held_out) == 2
            ),
            "columns: names a column twice; give each a name of its own": (
                len(set(self.columns or ())) != len(self.columns or ())
            ),
        }
        refuse(pairs)
        return self


def rows_per_epoch(task_rows: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Rows of each mixed file in an epoch, which has all of the task's rows: of all rows together its weight."""
    return tuple(round(task_rows * weight / (1 - sum(weights))) for weight in weights)
