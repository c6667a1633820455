from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fulltune.cli import options, stages
from fulltune.cli.stages import out
from fulltune.errors import SetupError

LaterRows = Annotated[
    Path | None, typer.Option("--file", "-f", help="Score the finished model of a RUN on this labelled file instead.")
]
AllowTrainingRows = Annotated[
    bool, typer.Option("--allow-training-rows", help="With --file: also score rows that the model was trained on.")
]


def evaluate(
    target: options.TargetArgument,
    set_: options.Overrides = None,
    run_folder: options.RunFolder = None,
    fresh: options.Fresh = False,
    file: LaterRows = None,
    allow_training_rows: AllowTrainingRows = False,
    method: options.MethodName = None,
    as_json: options.Json = False,
) -> None:
    """Score the baselines and the trained model on the test rows, or a finished model on another file."""
    from fulltune import report
    from fulltune.report.format import pages

    if file is None and (allow_training_rows or method is not None):
        raise SetupError("--allow-training-rows, --method: have an effect only with --file; add it, or remove them")
    if file is None:
        recipe, folder = stages.open_run(target, set_, run_folder, fresh, "evaluate")
        scores = stages.run_until(recipe, folder, "evaluate", details=True).scores
        parts = [] if as_json else report.build_run_terminal_report(folder)
    else:
        if set_ or run_folder or fresh or not target.is_dir():
            raise SetupError("--file: scores the model of a finished run as it is; give the folder of the run alone")
        model_folder = stages.choose_model_folder(target, method)
        with stages.progress_display(details=False) as display:
            from fulltune.pipeline import Run, score_later_rows
            from fulltune.system.run_folder import load_run_recipe

            job = Run(load_run_recipe(target), target, listener=display)
            scores, parts, folder = score_later_rows(job, model_folder, file, allow_training_rows)
    if as_json:
        stages.print_json([entry.model_dump(mode="json") for entry in scores])
        return
    pages.print_parts(out, parts)
    if file is not None:
        out.print(f"report:  {escape(str(folder / 'report.html'))}", soft_wrap=True)
