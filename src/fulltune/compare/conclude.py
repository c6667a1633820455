"""The test rows are opened, once: the verdict, and the record that the proof card is made from."""

from __future__ import annotations

import getpass
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from fulltune import evaluate, report
from fulltune.compare.claims import claims
from fulltune.compare.context import BASE, OPEN, OPENINGS, RECORD, SEALED, Line, append_line, lines_of
from fulltune.compare.lint import lint
from fulltune.compare.seeds import Ran, Results, arm_items, most_seeds, waiting
from fulltune.compare.sequential import Left, left
from fulltune.compare.table_rows import design_of, middle, rows_of
from fulltune.compare.trials import best_seed, keep
from fulltune.compare.verdict import ArmItems, decide
from fulltune.evaluate import drift, outputs
from fulltune.inference.store import clusters_of
from fulltune.recipe.tasks import FACTS
from fulltune.records.comparison import Comparison, Expectation, Opening, Search
from fulltune.records.differences import Decision
from fulltune.records.scores import Estimate, Scores
from fulltune.stats.bootstrap import draw
from fulltune.stats.calibration import calibrate
from fulltune.system import run_folder


def judge(line: Line, expectation: Expectation, searches: Mapping[str, Search], ran: Ran) -> Comparison:
    """Open the test rows, once, and say what they say."""
    line.say("opening the test rows")
    results, looks = ran.results, ran.looks
    left_out = tuple(one.arm for one in line.trained_arms if one.arm not in results)
    alpha = left(looks, line.alpha, time_was_up=_more_time_would_add(ran, left_out, searches))
    with line.clocked("verdict"):
        openings = open_test_rows(line, [one.trial.name for found in results.values() for one in found], alpha)
        base, baselines = untouched(line)
        compared = arm_items(line, results, SEALED, waiting(looks))
        if (line.folder / SEALED / f"{BASE}.npz").exists():
            kept = outputs.load(line.folder / SEALED / f"{BASE}.npz")
            compared.append(ArmItems(name=BASE, kind="base", trials=[kept], cost=0.0))
        decision = decide(
            compared,
            line.measure,
            margin=line.recipe.compare.margin,
            clusters=clusters_of(line.folder / "data" / "test"),
            confidence=line.recipe.evaluate.confidence,
            alpha=alpha.now,
        )
    found = comparison_of(line, expectation, searches, ran, left_out, decision, base, baselines, openings)
    found.save(line.folder / RECORD)  # the test rows are opened: before anything else can go wrong
    write_model_cards(line, results)
    return found


def write_model_cards(line: Line, results: Results) -> None:
    """A README.md beside each method's weights, with the kept seed's score on the test rows."""
    for arm, found in results.items():
        if not (line.folder / "models" / arm).is_dir():
            line.say(f"{arm}: its model is no longer in models/{arm}, so it gets no model card")
            continue
        kept = best_seed(line, found)
        chosen, test = (outputs.load(line.folder / place / f"{kept.trial.name}.npz") for place in (OPEN, SEALED))
        drawn = draw(line.measure, [[test]], clusters_of(line.folder / "data" / "test"))
        calibrated = line.summary.problem_type in evaluate.CALIBRATED
        confidence = line.recipe.evaluate.confidence
        low, high = np.quantile(drawn.draws[0][:, 0], ((1 - confidence) / 2, (1 + confidence) / 2))
        scores = Scores(
            name=kept.trial.name,
            kind="trained",
            rows=drawn.num_rows,
            metrics={
                line.measure.name: Estimate(value=float(drawn.point[0][0]), low=float(low), high=float(high)),
            },
            main_metric=line.measure.name,
            greater_is_better=line.measure.greater_is_better,
            confidence=confidence,
            calibration=calibrate(chosen["logits"], chosen["labels"], test["logits"], test["labels"])
            if calibrated
            else None,
        )
        report.write_model_card(line.folder, line.folder / "models" / arm, scores)


def untouched(line: Line) -> tuple[Scores | None, tuple[Scores, ...]]:
    """What costs no training: the arm `base` (the untouched language model, else the most frequent answer), and all
    baselines. A language model's rows are kept, so that it is compared like the others."""
    plan_of_full = line.room(line.full.arm).plan
    writes = FACTS[line.recipe.task].writes
    path = line.folder / SEALED / f"{BASE}.npz"
    generic_path = line.folder / "predictions" / "generic" / f"{BASE}.npz"
    if not (path.exists() if writes else generic_path.exists()):
        scoring = evaluate.scoring_of(line.recipe, plan_of_full, line.summary, line.folder, line.job.base)
        splits = ("eval", "test") if writes else ()
        keep(line, BASE, outputs.outputs(scoring, None, line.texts[0], line.most_tokens, splits))
    baselines = tuple(evaluate.baselines(line.recipe, plan_of_full, line.summary, line.folder, line.job.base))
    return (baselines[0] if baselines else None), baselines


def open_test_rows(line: Line, trials: Sequence[str], alpha: Left) -> tuple[Opening, ...]:
    """Note who looks at the sealed rows; the noted openings, this one included."""
    opening = Opening(
        time=datetime.now().astimezone().isoformat(timespec="seconds"),
        by=f"{getpass.getuser()}@{platform.node()}",
        command=line.command,
        trials=tuple(trials),
        alpha=alpha.now,
        left=alpha.later,
    )
    append_line(line.folder / OPENINGS, opening.model_dump(mode="json"))
    return tuple(Opening.model_validate(entry) for entry in lines_of(line.folder / OPENINGS))


def opened_by_others(line: Line, own: Sequence[Path] = ()) -> list[str]:
    """Names of other comparisons beside this one that opened the same test rows.

    Args:
        line: The comparison.
        own: Folders that are no other one's.
    """
    found, mine = set(), {path.resolve() for path in (line.folder, *own)}
    for parent in {line.folder.resolve().parent, Path(line.recipe.output).resolve()}:
        for path in parent.glob(f"*/{OPENINGS}"):
            folder = path.parent.parent
            if folder not in mine and _data_fingerprint(folder) == line.summary.fingerprint:
                found.add(folder.name)
    return sorted(found)


def _data_fingerprint(folder: Path) -> str:
    """Of a run folder's rows; empty where it has none, or was written by a version that wrote them otherwise."""
    try:
        return str(json.loads((folder / "data" / "summary.json").read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def comparison_of(
    line: Line,
    expectation: Expectation,
    searches: Mapping[str, Search],
    ran: Ran,
    left_out: tuple[str, ...],
    decision: Decision,
    base: Scores | None,
    baselines: tuple[Scores, ...],
    openings: tuple[Opening, ...],
) -> Comparison:
    summary, results, looks = line.summary, ran.results, ran.looks
    rows = rows_of(line, searches, results, looks, decision, base)
    finals = [one for arm in results for one in results[arm]]
    full = [one.train_seconds for one in results[line.full.arm]]
    environment = run_folder.environment(line.machine)
    made = line.room(line.full.arm).plan
    fixed = sum(
        middle(one.train_seconds for one in found) * most_seeds(expectation) for found in results.values()
    ) + sum(row.search_seconds for row in rows)
    full_wins, others = decision.verdict == "FULL", opened_by_others(line)
    design = design_of(line, searches, ran, openings, others, full_wins=full_wins)
    return Comparison(
        name=line.folder.name,
        model=line.recipe.model.name,
        task=line.recipe.task,
        problem_type=summary.problem_type,
        train_rows=summary.splits["train"].rows,
        eval_rows=summary.splits["eval"].rows,
        test_rows=summary.splits["test"].rows,
        metric=line.measure.name,
        greater_is_better=line.measure.greater_is_better,
        decision=decision,
        rows=rows,
        baselines=baselines,
        searches=tuple(searches.values()),
        expectation=expectation,
        looks=tuple(looks),
        findings=lint(design),
        openings=openings,
        claims=claims(rows, decision, summary.splits["train"].rows),
        drift_unit="nats per token" if summary.problem_type in drift.WRITERS else "1 - cosine",
        drift_text=line.texts[1],
        num_trials=len(finals) + sum(len(one.tried) + one.other_runs for one in searches.values()),
        seconds=round(line.spent_seconds, 1),
        full_run_seconds=round(middle(full), 1),
        fixed_design_seconds=round(fixed, 1),
        costs="median",
        cores=line.machine.num_cores,
        time_was_up=_more_time_would_add(ran, left_out, searches),
        left_out=left_out,
        side_by_side=max(one.side_by_side for one in finals),
        full_side_by_side=max(one.side_by_side for one in results[line.full.arm]),
        device=made.device,
        started=line.started,
        data_fingerprint=summary.fingerprint,
        command=line.command,
        versions={"fulltune": environment.fulltune, "python": environment.python, **environment.packages},
        notes=tuple(_asked(line, design.test_in_train)),
    )


def _more_time_would_add(ran: Ran, left_out: Sequence[str], searches: Mapping[str, Search]) -> bool:
    """Seeds, methods or searches of rates are missing for lack of time."""
    return ran.time_was_up or bool(left_out) or any(one.time_was_up for one in searches.values())


def _asked(line: Line, said: str) -> list[str]:
    """What the data stage found that a reader of the verdict should know, less what the lint has said."""
    left_out = [f"rows left out: {count:,}, {reason}" for reason, count in line.summary.dropped.items()]
    found = [note for note in line.summary.notes if "also stand" in note or "repeat" in note]
    return left_out + [note for note in found if note != said]
