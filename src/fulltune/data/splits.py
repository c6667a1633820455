"""Which row belongs to which split, and what is wrong or worth knowing about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from fulltune.data.check import UNDECODABLE_IMAGE, labels_only_held_out, too_many, undecodable
from fulltune.data.encode import Encoded
from fulltune.data.readers.plain_text import SECTION_CHARACTERS
from fulltune.data.sources import SourceRows
from fulltune.data.split import MOST_HELD_OUT_ROWS, split_off
from fulltune.errors import DataError
from fulltune.recipe.fields import Recipe
from fulltune.records.data import SplitName as Split
from fulltune.tasks import Target

SPLITS: tuple[Split, ...] = ("train", "eval", "test")
HELD_OUT: tuple[Split, ...] = ("eval", "test")
FEW_EVAL_ROWS = 50
_FEW_OF_A_CLASS = 5
"""One right answer more or less then moves its recall by 20 points or more."""


def refuse_unusable(recipe: Recipe, encoded: Mapping[Split, Encoded], given: Mapping[Split, SourceRows]) -> None:
    """Too many rows that cannot be used, too long ones where the recipe forbids them, broken images.

    Raises:
        DataError: With all such problems.
    """
    strategy = recipe.data.truncation_strategy
    # Rows that the user asked to leave out are not held against the file.
    wanted_out = {"too long", "answer cut off"} if strategy == "drop" else set()
    problems: list[str] = []
    for name, whole in encoded.items():
        where, usable = given[name].where, whole.num_read - whole.unusable.counts.total()
        if recipe.data.undecodable_images == "error":
            problems += undecodable(whole.unfit, where)
        problems += too_many(whole.unusable, whole.num_read, where)
        problems += too_many(whole.unfit.without({*wanted_out, UNDECODABLE_IMAGE}), usable, where)
        if strategy == "error" and whole.num_too_long:
            problems.append(
                f"{where}: {whole.num_too_long} rows of {name} are longer than data.max_length; raise it, or set "
                "data.truncation_strategy to truncate or drop"
            )
    if problems:
        raise DataError(problems)


def assign(
    recipe: Recipe, encoded: Mapping[Split, Encoded], given: Mapping[Split, SourceRows]
) -> tuple[dict[Split, np.ndarray], dict[Split, str]]:
    """Which rows of its source each split gets: all of its own file, or some split off train. bool [rows]."""
    train = encoded["train"]
    split_of = {name: np.ones(whole.num_rows, bool) for name, whole in encoded.items()}
    sources = {name: f"file {rows.where}" for name, rows in given.items()}
    fractions: dict[Split, float] = {"test": recipe.data.test_fraction, "eval": recipe.data.eval_fraction}
    groups, strata = np.asarray(train.groups), _strata(train)
    for name, fraction in fractions.items():
        if name in given:
            continue
        rest = np.flatnonzero(split_of["train"])
        # The second split takes its share of all rows, not of those that the first one left.
        share = min(0.5, fraction * train.num_rows / max(1, len(rest)))
        held_out = rest[split_off(groups[rest], strata[rest], share)]
        split_of[name] = np.zeros(train.num_rows, bool)
        split_of[name][held_out] = True
        split_of["train"][held_out] = False
        sources[name] = f"split off {given['train'].where} (seed {recipe.data.split_seed})"
    counts = {name: int(split_of[name].sum()) for name in SPLITS}
    few = [
        f"{rows.where}: {counts[name]} usable rows for {name}; expected at least 2"
        for name, rows in given.items()
        if counts[name] < 2 and name != "train"
    ]
    if few:
        raise DataError(few)
    small = [f"{name} has {counts[name]}" for name in SPLITS if counts[name] < 2]
    if small:
        different = len(np.unique(groups))
        ways = ["give more rows", "files for eval and test"]
        ways += ["larger data.eval_fraction and data.test_fraction"] if different >= 2 * len(SPLITS) else []
        raise DataError(
            f"{given['train'].where}: {train.num_read} rows, {different} of them different, are too few "
            f"for three splits of at least 2 rows ({', '.join(small)}); {', '.join(ways[:-1])}, or {ways[-1]}"
            f"{_sections(recipe)}"
        )
    return split_of, sources


def more_than_asked(
    recipe: Recipe, given: Mapping[Split, SourceRows], split_of: Mapping[Split, np.ndarray]
) -> dict[Split, int]:
    """Splits taken off train that have clearly more rows than their fraction asks for, with what it asks for.

    That is so where labels have so few rows that their share would be none.
    """
    fractions: dict[Split, float] = {"eval": recipe.data.eval_fraction, "test": recipe.data.test_fraction}
    rows = len(split_of["train"])
    asked = {name: min(MOST_HELD_OUT_ROWS, round(fraction * rows)) for name, fraction in fractions.items()}
    return {name: few for name, few in asked.items() if name not in given and split_of[name].sum() > 1.1 * few + 1}


def _sections(recipe: Recipe) -> str:
    """A text file with blank lines gives far fewer rows than it has paragraphs."""
    if recipe.data.text_rows != "auto" or not any(file.lower().endswith(".txt") for file in recipe.train_files()):
        return ""
    return (
        f"; paragraphs of a .txt are joined into rows of about {SECTION_CHARACTERS:,} characters: for one row a "
        "paragraph set data.text_rows: paragraph"
    )


def _strata(whole: Encoded) -> np.ndarray:
    """Each row's class; of several labels the rarest one: combinations would be too many to share out."""
    numbers, ends = np.asarray(whole.label_numbers), np.asarray(whole.label_ends)
    sizes = np.diff(ends)
    strata = np.full(whole.num_rows, -1, np.int64)
    named = np.flatnonzero(sizes)
    if len(named):
        widest = int(sizes.max()) + 1
        place = np.arange(len(numbers)) - np.repeat(ends[:-1], sizes)
        # The smallest key of a row is that of its rarest label, of equally rare ones the first.
        keys = np.bincount(numbers)[numbers].astype(np.int64) * widest + place
        rarest = np.minimum.reduceat(keys, ends[:-1][named]) % widest
        strata[named] = numbers[ends[:-1][named] + rarest]
    return strata


def notes(
    encoded: Mapping[Split, Encoded], split_of: Mapping[Split, np.ndarray], target: Target, near: bool = False
) -> list[str]:
    """Few rows to choose by, and rows that stand, or share what is asked with others, twice in train or in two splits.

    Args:
        encoded: Each source.
        split_of: Which rows of its source each split has.
        target: Says what rows of one group share.
        near: Texts that are nearly equal belong to one group.
    """
    keys = {name: np.asarray(encoded.get(name, encoded["train"]).groups)[split_of[name]] for name in SPLITS}
    found = []
    nearly = " (equal, or nearly so)" if near else ""
    shared = next((word for role, word in _SHARED.items() if role in target.columns), "text")
    # Long raw texts are cut, short ones packed: the rows that are trained and shown are others than those of the file.
    sources = "texts" if set(target.columns) == {"text"} else "rows"
    if (count := len(keys["eval"])) < FEW_EVAL_ROWS:
        found.append(
            f"only {count} eval {sources}: which checkpoint is best is close to chance; more {sources} would tell "
            "better"
        )
    wholes = np.asarray(encoded["train"].wholes)[split_of["train"]]
    num_train = len(wholes)
    if repeated := num_train - len(np.unique(wholes)):
        found.append(f"{repeated:,} of {num_train:,} train rows repeat another train row, answer or label included")
    # Questions about the same passage belong together; that is how such rows are, and nothing to note.
    if shared != "passage" and (count := _with_others(keys["train"], wholes)):
        kept = "" if {"eval", "test"} <= set(encoded) else "; kept on one side of the split"
        found.append(f"{count:,} of {num_train:,} train rows share their {shared} with another one{nearly}{kept}")
    for name in HELD_OUT:
        if count := int(np.isin(keys[name], keys["train"]).sum()):
            found.append(
                f"{count:,} of {len(keys[name]):,} {name} rows have a {shared} that also stands in train{nearly}: "
                "their scores flatter the model"
            )
    if count := num_in_eval(encoded, split_of):
        found.append(
            f"{count:,} of {len(keys['test']):,} test rows have a {shared} that also stands in eval{nearly}, which "
            "chooses the checkpoint"
        )
    return found


_SHARED = {
    "context": "passage",
    "prompt": "prompt",
    "messages": "question",
    "source": "source text",
    "choices": "question",
    "choice0": "question",
    "tokens": "sentence",
    "image": "image",
}
"""Role of a column to what rows of one group have in common; without any of them it is the text."""


def _with_others(groups: np.ndarray, wholes: np.ndarray) -> int:
    """Rows in whose group stands another row that is not the same as a whole."""
    different = np.unique(np.stack([groups, wholes]), axis=1)[0]
    names, counts = np.unique(different, return_counts=True)
    return int(np.isin(groups, names[counts > 1]).sum())


def num_in_eval(encoded: Mapping[Split, Encoded], split_of: Mapping[Split, np.ndarray]) -> int:
    """Test rows whose text, or prompt, also stands in eval."""
    test, chosen = (np.asarray(encoded.get(name, encoded["train"]).groups)[split_of[name]] for name in ("test", "eval"))
    return int(np.isin(test, chosen).sum())


def unmeasured(encoded: Mapping[Split, Encoded], split_of: Mapping[Split, np.ndarray]) -> list[str]:
    """Classes of train that no test row has, or hardly any: their quality is not known."""
    train, test = (label_counts(encoded.get(name, encoded["train"]), split_of[name]) for name in ("train", "test"))
    missing = sorted(set(train) - set(test), key=lambda name: (train[name], name))
    found = []
    if missing:
        shown = ", ".join(f"'{name}' ({train[name]} train rows)" for name in missing[:3])
        found.append(f"{len(missing)} of {len(train)} classes have no test row, so nothing measures them: {shown}")
    scarce = sorted((name for name in test if test[name] < _FEW_OF_A_CLASS), key=lambda name: (test[name], name))
    # Of few test rows in all, that is plain to see.
    if scarce and (num_test := int(split_of["test"].sum())) >= FEW_EVAL_ROWS:
        shown = ", ".join(f"'{name}' ({test[name]})" for name in scarce[:3])
        found.append(
            f"classes with fewer than {_FEW_OF_A_CLASS} of the {num_test:,} test rows, so that their scores are close "
            f"to chance: {len(scarce)} of {len(train)}: {shown}"
        )
    return found


def label_counts(whole: Encoded, weight_of_row: np.ndarray) -> Counter[str]:
    """How often each label occurs, each row counted so many times."""
    numbers, sizes = np.asarray(whole.label_numbers), np.diff(np.asarray(whole.label_ends))
    if not len(numbers):
        return Counter()
    found = np.bincount(numbers, weights=np.repeat(weight_of_row, sizes), minlength=len(whole.names))
    return Counter({name: int(found[number]) for name, number in whole.names.items() if found[number]})


def check_labels(
    encoded: Mapping[Split, Encoded], split_of: Mapping[Split, np.ndarray], given: Mapping[Split, SourceRows]
) -> None:
    """Every class that is scored must occur in train."""
    counts = {name: label_counts(encoded.get(name, encoded["train"]), split_of[name]) for name in SPLITS}
    where = {name: given.get(name, given["train"]).where for name in SPLITS}
    labels_only_held_out(counts["train"], {name: counts[name] for name in HELD_OUT}, where)
