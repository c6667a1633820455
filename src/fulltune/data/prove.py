"""Whether cleaning helps: linear classifiers on the untouched model, fitted with and without each cleaning step.

They take seconds where a training takes minutes, and see the same rows. What helps them may do nothing for a trained
model; what hurts them has little reason to help it. The eval rows are as they are: a cleaning that moves labels away
from how these rows are labelled hurts here, as it will in use if the labels there are made in the same way. Leaks are
not compared: without them scores fall because they were flattered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from fulltune.data.audit import load_issues
from fulltune.data.judge import Reader
from fulltune.data.patch import numbered
from fulltune.data.repeated import LEAKS
from fulltune.errors import SetupError
from fulltune.inference.store import row_id, texts
from fulltune.probe.layers import NoProbe
from fulltune.probe.linear import Items, best, fits, wrong
from fulltune.records.audit import PROOFS, Proof, Proofs, RowIssue
from fulltune.records.data import DataSummary

TIMES, LEFT_OUT = 5, 0.2
"""How often so large a part of the train rows is left out."""
LEAST_EVAL_ROWS = 50
_RESAMPLES = 1000
Action = Literal["drop", "replace"]


def refuse_prove(summary: DataSummary) -> None:
    """Rows that cannot be compared in seconds.

    Raises:
        SetupError: When the rows have no single label each, or too few of them are eval rows.
    """
    if summary.problem_type != "single_label":
        raise SetupError(
            "--prove: these rows have no single label each, and only by such can cleaning be compared in seconds; "
            "apply the patch, and compare two runs"
        )
    if summary.splits["eval"].rows < LEAST_EVAL_ROWS:
        raise SetupError(
            f"--prove: {summary.splits['eval'].rows} eval rows tell nothing, expected {LEAST_EVAL_ROWS} at least; give "
            "more, in a file (data.eval) or as a larger part of the train rows (data.eval_fraction)"
        )


def prove(folder: Path, summary: DataSummary, reader: Reader) -> Proofs:
    """Fit with and without each cleaning step, and compare on the eval rows.

    Args:
        folder: The run's `data` folder, audited; `proofs.json` is written there.
        summary: Of the prepared rows.
        reader: Reads rows with the untouched model.

    Raises:
        SetupError: When nothing can be fitted.
    """
    try:
        train, positions = reader.items("train")
        held_out, _ = reader.items("eval")
        _, strength, _ = best(train, held_out, fits, wrong)
        times, ids = Counter[str](), list[str]()
        for row in texts(folder / "train"):
            name = row_id(row)
            times[name] += 1
            ids.append(numbered(name, times[name]))
        place = {ids[position]: at for at, position in enumerate(positions)}
        steps = list(_steps(load_issues(folder), place, summary.labels, train))
        proofs = _compared(train, held_out, steps, strength)
    except NoProbe as no:
        raise SetupError(f"--prove: nothing can be compared: {no}") from None
    found = Proofs(fingerprint=summary.fingerprint, eval_rows=len(held_out.labels), times=TIMES, proofs=tuple(proofs))
    found.save(folder / PROOFS)
    return found


Step = tuple[str, Action, np.ndarray, np.ndarray]
"""The check, what is done, whether each row is kept, and its label then."""


def _steps(issues: Sequence[RowIssue], place: dict[str, int], names: Sequence[str], train: Items) -> Iterator[Step]:
    """Each check's rows dropped, and where labels are proposed, with these."""
    numbers = {name: number for number, name in enumerate(names)}
    for check in dict.fromkeys(one.check for one in issues if one.check not in LEAKS):
        them = [one for one in issues if one.check == check and one.split == "train" and one.row in place]
        if not them:
            continue
        kept, labels = np.ones(len(train.labels), bool), train.labels.copy()
        kept[[place[one.row] for one in them]] = False
        yield check, "drop", kept, train.labels
        other = [(place[one.row], numbers[one.remedy.value]) for one in them if one.remedy.value in numbers]
        if other:
            at, given = map(list, zip(*other, strict=True))
            labels[at] = given
            yield check, "replace", np.ones(len(labels), bool), labels


def _compared(train: Items, held_out: Items, steps: Sequence[Step], strength: float) -> Iterator[Proof]:
    fitted = partial(_right, held_out=held_out, strength=strength)
    drawn = np.random.default_rng(0)
    parts = [drawn.random(len(train.labels)) >= LEFT_OUT for _ in range(TIMES)]
    before = np.mean([fitted(train.part(part)) for part in parts], axis=0)
    samples = drawn.integers(0, len(before), (_RESAMPLES, len(before)))
    for check, action, kept, labels in steps:
        changed = Items(train.kind, train.features, labels, train.rows, train.num_outputs)
        after = np.mean([fitted(changed.part(part & kept)) for part in parts], axis=0)
        moved = after - before
        low, high = np.quantile(moved[samples].mean(axis=1), [0.025, 0.975])
        yield Proof(
            check=check,
            action=action,
            rows=int((~kept).sum() if action == "drop" else (labels != train.labels).sum()),
            before=float(before.mean()),
            difference=float(moved.mean()),
            low=float(low),
            high=float(high),
        )


def _right(items: Items, held_out: Items, strength: float) -> np.ndarray:
    """Whether each eval row is answered right: float64 [rows]."""
    [(_, found)] = fits(items, strengths=(strength,))
    return (found(held_out.features).argmax(axis=1) == held_out.labels).astype(np.float64)
