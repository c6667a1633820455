from __future__ import annotations

from pathlib import Path

from fulltune.records.scores import Scores
from fulltune.report.format.blocks import Bullets, Cell, Code, Headline, Report, Section, Table, TableRow
from fulltune.report.format.words import NOTHING, format_estimate, metric_name, strip_folders
from fulltune.report.run.read import read_run
from fulltune.report.run.verdict import find_best_untrained
from fulltune.system.run_folder import FOLDS


def build_folds_report(folder: Path) -> Report:
    """Build a finished cross-validation's report: each fold's scores, and those of all rows' answers together."""
    pooled, rows = Scores.load(folder / FOLDS), list[TableRow]()
    name, metric = pooled.main_metric, metric_name(pooled.main_metric)
    views = [read_run(path) for path in sorted((folder / "folds").glob("[0-9]*"), key=lambda path: int(path.name))]
    for view in views:
        trained = next(one for one in view.scores if one.kind == "trained")
        both = trained, find_best_untrained(view.scores, name, pooled.greater_is_better)
        cells = [format_estimate(name, one.metrics[name]) if one and name in one.metrics else NOTHING for one in both]
        rows.append((Cell(f"folds/{view.name}", link=f"folds/{view.name}/report.html"), f"{trained.rows:,}", *cells))
    together = {metric_name(one): format_estimate(one, value) for one, value in pooled.metrics.items()}
    notes = (
        f"Intervals ({100 * pooled.confidence:g}%) are for other test rows with the same models.",
        "Each fold has its own model and report, with own metrics and slices. To train a model without folds:",
    )
    header = ("fold", "test rows", metric, "best baseline")
    blocks = (
        Table("Each fold's model on its test rows", header, tuple(rows), frozenset({1, 2, 3})),
        Table("All rows, answered by models not trained on them", ("metric", "value"), tuple(together.items())),
        Bullets(notes),
        Code("fulltune run RECIPE --set data.folds=null", "sh"),
    )
    shown = f"{metric} {together.get(metric, NOTHING)} on {pooled.rows:,} rows."
    headline = Headline("pooled", f"{len(views)} folds", shown)
    title = f"{strip_folders(views[0].model)} · {views[0].task} · cross-validation"
    return Report(folder.resolve().name, title, headline, (), (Section("folds", "Folds", blocks),))
