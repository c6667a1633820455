"""The command line. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import logging
import signal
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fulltune.cli import options, stages
from fulltune.cli.evaluate import evaluate
from fulltune.cli.export import export
from fulltune.cli.launch import launch
from fulltune.cli.push import push
from fulltune.cli.serve import chat, serve
from fulltune.cli.stages import err, out
from fulltune.errors import DoesNotFitError, FulltuneError, InterruptedRun, SetupError
from fulltune.records.data import SplitName
from fulltune.system import signals
from fulltune.text import counted, format_seconds

app = typer.Typer(
    cls=options.Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune every parameter of a pretrained model, and see with numbers whether it was worth it.",
)


@app.callback()
def _common(version: options.Version = False) -> None:
    pass


@app.command()
def init(
    data: Annotated[
        str,
        typer.Argument(
            help="A data file (csv, jsonl, parquet, CoNLL, txt ...), a folder of files named train, dev and test, a "
            "folder with a subfolder of images per class, OWNER/NAME on the Hub, or an address such as https://..."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write.")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option(help="Hub id, folder, GGUF file or package:NAME/PATH.")] = None,
    force: options.Force = False,
    task: Annotated[str | None, typer.Option(help="The task, if it is not clear from the columns.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Names of all columns, for a file without a header line.", metavar="NAME,NAME")
    ] = None,
    encoding: Annotated[str | None, typer.Option(help="Encoding of text files, such as cp1252.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="Column that has a role, if its name is unusual. Repeatable.", metavar="ROLE=COLUMN"),
    ] = None,
    tag_names: Annotated[
        str | None, typer.Option(help="Names of tags that are numbers, from 0 on.", metavar="NAME,NAME")
    ] = None,
    eval_: Annotated[Path | None, typer.Option("--eval", help="File of rows that choose the checkpoint.")] = None,
    test: Annotated[Path | None, typer.Option(help="File of rows for the final scores.")] = None,
) -> None:
    """Read a data file, infer the task and write a commented recipe.

    The contents decide, and names break ties. To decide yourself: --column prompt=mr --column completion=ref.

    """
    from fulltune.cli.inferred import parse_hints
    from fulltune.cli.init import describe_inferred_data, write_recipe

    hints = parse_hints(task, column or [], columns, encoding=encoding, tag_names=tag_names)
    held_out: dict[SplitName, Path | None] = {"eval": eval_, "test": test}
    inferred, files = write_recipe(data, output, model, force, hints.with_files(held_out))
    for line in describe_inferred_data(inferred, files):
        out.print(escape(line))
    out.print(f"wrote {escape(str(output))}; next: fulltune run {escape(str(output))}", soft_wrap=True)


@app.command()
def run(
    target: options.TargetArgument,
    set_: options.Overrides = None,
    run_folder: options.RunFolder = None,
    fresh: options.Fresh = False,
    as_json: options.Json = False,
    search: options.SearchRate = False,
    budget: options.SearchBudget = None,
    machine_rank: options.MachineRank = None,
    rendezvous: options.Rendezvous = None,
    wait_for_machines: options.WaitForMachines = "10m",
) -> None:
    """Run all stages (data, plan, train, evaluate, report), or resume an unfinished run."""
    from fulltune import report
    from fulltune.report.format import pages
    from fulltune.report.format.blocks import Headline
    from fulltune.report.run.about_data import choose_row_form

    began = time.time()
    overrides = [*(set_ or []), *["method.learning_rate=search"] * search]
    overrides += [f"compare.budget={budget}"] if budget is not None else []
    with stages.machine_group(target, overrides, machine_rank, rendezvous, wait_for_machines) as group:
        recipe, folder = stages.open_run(target, overrides, run_folder, fresh, "report")
        reached = stages.load_if_finished(recipe, folder)
        reached = reached or stages.run_until(recipe, folder, "report", details=True, began=began, group=group)
    if as_json:
        stages.print_json([entry.model_dump(mode="json") for entry in reached.scores])
        return
    parts = report.build_run_terminal_report(folder)
    pages.print_parts(out, parts)
    out.print(f"report:  {escape(str(reached.report))}", soft_wrap=True)
    if reached.plan is not None and (model := folder / reached.plan.model_folder).is_dir():
        out.print(f"model:   {escape(str(model))} (for from_pretrained)", soft_wrap=True)
    if not any(isinstance(part, Headline) and part.kind in ("worse", "pooled") for part in parts):
        question = choose_row_form(reached.summary).question
        out.print(f"try it:  fulltune predict {escape(str(folder))} {question}", soft_wrap=True)


@app.command()
def data(
    target: options.TargetArgument,
    set_: options.Overrides = None,
    run_folder: options.RunFolder = None,
    fresh: options.Fresh = False,
    labels: options.JudgeLabels = True,
    prove: options.Prove = False,
    trainings: options.Trainings = 0,
    check: options.StepsOf = None,
    losses: options.ListLosses = False,
    review: options.Review = False,
    accept: options.Accept = None,
    patch: options.PatchFile = None,
    convert: options.Convert = None,
    as_json: options.Json = False,
) -> None:
    """Read, check, split, tokenise and audit the rows, and show what the model will see."""
    from fulltune.cli import audit as cli_audit

    if convert is not None:
        others = (run_folder, fresh, not labels, prove, trainings, check, losses, review, accept, patch, as_json)
        return cli_audit.write_conversations(target, set_ or [], convert, any(others))
    wanted = cli_audit.AuditRequest(labels=labels, losses=losses, prove=prove, trainings=trainings, checks=check or [])
    wanted.raise_if_unsuitable(target)
    recipe, folder = stages.open_run(target, set_, run_folder, fresh, "data")
    cli_audit.run_audit(recipe, folder, wanted)
    if review or accept or patch:
        cli_audit.write_decisions(target, folder, patch, review, accept or [], as_json)
    else:
        cli_audit.print_audit(target, folder, as_json)


@app.command()
def plan(
    target: options.TargetArgument,
    set_: options.Overrides = None,
    run_folder: options.RunFolder = None,
    fresh: options.Fresh = False,
    as_json: options.Json = False,
    hardware: options.Hardware = None,
    rows: options.NumRows = None,
    tokens: options.NumTokens = None,
    price: options.HourlyPrice = None,
    measure: options.MeasureSettings = False,
) -> None:
    """Choose and explain every setting, and show memory, placements, time, and alternatives if the run does not fit."""
    from fulltune.cli import plan as cli_plan
    from fulltune.cli.show import plan as display_plan
    from fulltune.plan.alternatives import format_alternatives
    from fulltune.records.training import Measurements
    from fulltune.report.format import pages

    if measure:
        cli_plan.raise_if_measure_conflicts(hardware, rows, tokens)
    if rows is not None or tokens is not None:
        survey, planned = cli_plan.plan_without_data(target, set_ or [], rows, tokens, hardware, price)
    else:
        checked = cli_plan.parse_plan_options(hardware, rows, tokens, price)
        recipe, folder = stages.open_run(target, set_, run_folder, fresh, "plan")
        planned = None
        try:
            planned = stages.run_until(recipe, folder, "data" if hardware else "plan", False, measure).plan
        except DoesNotFitError:  # shown below, with the alternatives
            if measure or not (folder / "data" / "summary.json").exists():
                raise
        survey, planned = cli_plan.plan_with_data(target, set_ or [], recipe, folder, checked, planned)
    measured = Measurements.load(folder / "plan" / "measured.json") if measure else None
    if as_json:
        fields = {} if planned is None else planned.model_dump(mode="json")
        rows_measured = {} if measured is None else {"measured": measured.model_dump(mode="json")}
        stages.print_json({**fields, "survey": survey.model_dump(mode="json"), **rows_measured})
    else:
        pages.print_parts(out, display_plan.build_plan_sections(survey, planned))
        if measured is not None:
            pages.print_parts(out, [display_plan.build_measured_table(measured)])
    if planned is None:
        raise DoesNotFitError([*survey.notes, *(format_alternatives(survey.ways_out) if as_json else ())])


@app.command()
def train(
    target: options.TargetArgument,
    set_: options.Overrides = None,
    run_folder: options.RunFolder = None,
    fresh: options.Fresh = False,
    as_json: options.Json = False,
    machine_rank: options.MachineRank = None,
    rendezvous: options.Rendezvous = None,
    wait_for_machines: options.WaitForMachines = "10m",
) -> None:
    """Train the model and save it in the run folder."""
    from fulltune.train.journal import trial_seconds

    with stages.machine_group(target, set_, machine_rank, rendezvous, wait_for_machines) as group:
        recipe, folder = stages.open_run(target, set_, run_folder, fresh, "train")
        reached = stages.run_until(recipe, folder, "train", details=True, group=group)
    outcome = reached.outcome
    assert outcome is not None
    if as_json:
        stages.print_json(outcome.model_dump(mode="json"))
        return
    changes = outcome.parameter_changes if outcome.best_step != 0 else None
    no_change = "; the weights before step 1 are kept" * (outcome.best_step == 0)
    changed = f", {changes.share:.1%} of the values changed" if changes else no_change
    took = format_seconds(round(trial_seconds(folder, outcome.trial)))
    out.print(f"{outcome.steps} steps in {took}: {outcome.reason}{changed}")
    out.print(f"model: {escape(str(folder / (outcome.model_folder or '')))}", soft_wrap=True)


app.command()(evaluate)


@app.command()
def compare(
    targets: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECIPE|RUN...", help="A recipe, a comparison's folder, or several recipes (tasks of one model)."
        ),
    ],
    set_: options.Overrides = None,
    run_folder: options.RunFolder = None,
    fresh: options.Fresh = False,
    as_json: options.Json = False,
    budget: options.CompareBudget = None,
    lint: Annotated[
        bool, typer.Option("--lint", help="Only check for unfair settings; exit code 2 if there are any.")
    ] = False,
) -> None:
    """Compare full fine-tuning with LoRA, adapters and prompt tuning on equal terms, and write a report."""
    from fulltune.cli import compare as cli_compare

    if lint:
        cli_compare.print_unfair_settings(targets, set_ or [], budget, as_json)
    else:
        cli_compare.compare(targets, set_ or [], run_folder, fresh, budget, as_json)


app.command()(launch)


@app.command()
def report(run_folder: Annotated[Path, typer.Argument(help="The folder of a run.", show_default=False)]) -> None:
    """Rewrite a run's report.md and report.html (card.md and card.html for a comparison) from its files."""
    from fulltune.pipeline import Run, write_report
    from fulltune.report import write_comparison_report
    from fulltune.system.run_folder import explain_os_errors, load_run_recipe, lock_folder

    recipe = load_run_recipe(run_folder)
    with explain_os_errors(run_folder), lock_folder(run_folder):
        paths = write_comparison_report(run_folder) if recipe.methods else (write_report(Run(recipe, run_folder)),)
    for path in paths:
        out.print(escape(str(path)), soft_wrap=True)


@app.command()
def doctor(
    path: Annotated[
        Path,
        typer.Argument(help="A run folder, a Trainer's trainer_state.json or checkpoints, or a TensorBoard folder."),
    ],
    as_json: options.Json = False,
) -> None:
    """Diagnose what went wrong in training, from the log of any Trainer."""
    from fulltune.doctor import diagnose, read_log, summarise_log
    from fulltune.report.format import pages
    from fulltune.report.format.blocks import Facts

    log = read_log(path)
    diagnoses = diagnose(log)
    if as_json:
        stages.print_json([dict(zip(("name", "evidence", "advice"), one, strict=True)) for one in diagnoses])
        return
    out.print(escape(summarise_log(log)), soft_wrap=True)
    rows = ((name, f"{evidence}{f' → {advice}' if advice else ''}") for name, evidence, advice in diagnoses)
    pages.print_parts(out, [Facts(tuple(rows))])


@app.command()
def predict(
    run_folder: options.ModelFolder,
    text: Annotated[
        list[str] | None, typer.Argument(help="Texts. Without texts, or with '-', stdin is read line by line.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Table (csv, jsonl, parquet ...) or .txt file.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write rows and answers to this csv, tsv, jsonl or parquet file."),
    ] = None,
    force: options.Force = False,
    max_new_tokens: options.MaxNewTokens = 128,
    method: options.MethodName = None,
    as_json: options.Json = False,
) -> None:
    """Answer texts, stdin or the rows of a file with a trained model."""
    from fulltune import predict as predicting
    from fulltune.cli import predict as cli_predict
    from fulltune.methods import folder as folders

    if text and file is not None:
        raise SetupError("predict: give either texts or --file, not both")
    if output is not None:
        cli_predict.check_output(output, force)
    model_folder = stages.choose_model_folder(run_folder, method)
    what = cli_predict.read_input(text or [], file, folders.read_notes(model_folder))
    predictor = predicting.load_predictor(model_folder)
    if output is None:
        cli_predict.print_answers(predictor, what, max_new_tokens, as_json)
        return
    with stages.progress_display(details=False) as display:
        written = cli_predict.write_answers(predictor, what, output, max_new_tokens, display)
    if as_json:
        stages.print_json(written)
    else:
        out.print(f"wrote {escape(str(output))}: {counted(written['rows'], 'row')}", soft_wrap=True)


app.command()(export)
app.command()(serve)
app.command()(chat)
app.command()(push)


@app.command()
def quickstart(
    chat: Annotated[bool, typer.Option("--chat", help="Fine-tune a chat model instead of a classifier.")] = False,
    output: Annotated[Path, typer.Option("--output", help="Where to put data, recipe and runs.")] = Path("runs"),
    set_: options.Overrides = None,
    fresh: options.Fresh = False,
) -> None:
    """Fine-tune a real small model on real text, offline, in 2 to 5 minutes on 2 cores."""
    from fulltune import quickstart as example
    from fulltune.system.run_folder import explain_os_errors

    with explain_os_errors(output):
        stages.note("reading the docstrings of the installed packages")
        recipe = example.write_example(output, chat)
    stages.note(f"the recipe: {recipe}")
    run(recipe, set_, fresh=fresh)


@app.command()
def schema(output: options.OutputFile = None) -> None:
    """Print the JSON schema of recipes, with which editors complete and check settings."""
    from fulltune.files import write_json
    from fulltune.recipe.schema import recipe_schema
    from fulltune.system.run_folder import explain_os_errors

    if output is None:
        return stages.print_json(recipe_schema())
    with explain_os_errors(output):
        write_json(output, recipe_schema())


@app.command()
def selfcheck(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the page as Markdown to this file.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check precision, attention, memory and two processes on this machine, offline in seconds."""
    # Some libraries print a greeting to stdout on import, which must not mix with the page.
    with err.status("starting") as status, redirect_stdout(sys.stderr):
        from fulltune import selfcheck as checking
        from fulltune.report.format import pages
        from fulltune.report.format.pages import render_section
        from fulltune.report.format.words import write_sanitized
        from fulltune.system.run_folder import explain_os_errors

        page = checking.run_checks(lambda line: status.update(escape(line)))
    shown = checking.report_section_of_page(page)
    if output is not None:
        with explain_os_errors(output):
            write_sanitized(output, render_section(shown))
    if as_json:
        stages.print_json(page.model_dump(mode="json"))
    else:
        pages.print_parts(out, [shown])
        share = f"share {output}" if output else "to share it: fulltune selfcheck --output selfcheck.md"
        out.print(escape(share), soft_wrap=True)
    if failed := [f"selfcheck: {one.device}: {one.ran}: {one.result}" for one in page.findings if one.status == "fail"]:
        raise SetupError(failed)


def main() -> None:
    """Run the `fulltune` command, and turn its errors into messages and exit codes."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("huggingface_hub").propagate = False  # the hub prints its own lines
    signals.set_handlers(stages.end_on_signal, signals.ENDING)
    try:
        app(standalone_mode=True)
    except FulltuneError as error:
        colour = "yellow" if isinstance(error, InterruptedRun) else "red"
        if isinstance(error, InterruptedRun):  # another signal must no longer change the exit code
            signals.restore_handlers(dict.fromkeys(signals.STOPPING, signal.SIG_IGN))
        for problem in stages.printable_problems(error):
            err.print(f"[{colour}]{escape(problem)}[/{colour}]", soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        err.print("[yellow]interrupted; run the same command to resume[/yellow]")
        sys.exit(InterruptedRun.exit_code)


if __name__ == "__main__":
    main()
