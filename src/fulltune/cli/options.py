import shlex
import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from fulltune.errors import SetupError


class Commands(TyperGroup):
    """The commands, which answer an unknown option with the `--set` that was meant."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]  # of either click
        try:
            return super().invoke(ctx)
        except Exception as error:
            # Which class of which click it is depends on typer's version.
            if type(error).__name__ != "NoSuchOption" or (hint := _meant_setting(error)) is None:
                raise
            raise SetupError(hint) from None


def _meant_setting(error: Exception) -> str | None:
    """Return an error message that names the `--set` option, or None if the command has none or another is near."""
    from fulltune.recipe.file import nearest_setting

    context, name, near = (vars(error)[field] for field in ("ctx", "option_name", "possibilities"))
    options = {option for parameter in context.command.params for option in parameter.opts}
    setting = nearest_setting(name.lstrip("-"), cutoff=1.0 if near else 0.6)
    if "--set" not in options or (near and setting is None):
        return None
    unknown = f"{name}: {context.info_name} has no such option; settings of the recipe are changed with --set"
    if setting is None:
        return f"{unknown} block.name=value (docs/reference/recipe.md lists them)"
    given = dict(zip((word.partition("=")[0] for word in sys.argv), pairwise([*sys.argv, "--"]), strict=True))[name]
    value = given[0].partition("=")[2] or given[1]
    value = "VALUE" if value.startswith("--") else value
    return f"{unknown}: --set {shlex.quote(f'{setting}={value}')}"


def _print_version(value: bool) -> None:
    if value:
        from importlib import metadata

        typer.echo(metadata.version("fulltune"))
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)]
TargetArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE|RUN", help="A recipe (YAML), or the folder of a run.", show_default=False)
]
OutputFile = Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file instead of stdout.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting: block.name=value. Repeatable.", metavar="NAME=VALUE"),
]
RunFolder = Annotated[Path | None, typer.Option(help="Run folder to use instead of a new one in 'output'.")]
JudgeLabels = Annotated[
    bool,
    typer.Option(
        "--labels/--no-labels", help="Judge labels and find outliers with the pretrained model, or skip these checks."
    ),
]
Prove = Annotated[
    bool, typer.Option("--prove", help="Fit classifiers on the pretrained model with and without each cleaning step.")
]
Trainings = Annotated[
    int, typer.Option(help="Train with and without each cleaning step, with N seeds each (2 or more).", metavar="N")
]
StepsOf = Annotated[
    list[str] | None,
    typer.Option(help="For --trainings: try only the steps of this check. Repeatable.", metavar="CHECK"),
]
ListLosses = Annotated[
    bool, typer.Option("--losses", help="For a RUN: list the trained model's highest losses on train and eval rows.")
]
Accept = Annotated[
    list[str] | None,
    typer.Option(help="Write the proposed remedies of a check into the patch. Repeatable.", metavar="CHECK"),
]
Review = Annotated[
    bool,
    typer.Option("--review", help="Decide about each suspicious row; without a terminal, list the rows in the patch."),
]
PatchFile = Annotated[
    Path | None, typer.Option(help="File for decisions. Default: NAME.patch.jsonl beside the recipe, or in the RUN.")
]
Convert = Annotated[
    Path | None,
    typer.Option(
        help="Only write the train rows of the RECIPE, RUN or data file as chat messages.", metavar="FILE.jsonl"
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start a new run even if this recipe has an unfinished one.")]
SearchRate = Annotated[
    bool, typer.Option("--search", help="Search the learning rate first: short for --set method.learning_rate=search.")
]
SearchBudget = Annotated[
    str | None, typer.Option(help="Approximate time for search and best run, such as 20m or 2h.", metavar="TIME")
]
CompareBudget = Annotated[
    str | None,
    typer.Option(help="Maximum total time, such as 30m or 2h. Rerun with a larger budget to resume.", metavar="TIME"),
]
MethodName = Annotated[
    str | None, typer.Option(help="Method whose model is used. Default: the method that the comparison recommends.")
]
MachineRank = Annotated[
    int | None, typer.Option(help="Rank of this machine among several, starting at 0 (docs/guides/scale.md).")
]
Rendezvous = Annotated[
    str | None, typer.Option(help="Address of machine 0, where several machines meet.", metavar="HOST[:PORT]")
]
WaitForMachines = Annotated[str, typer.Option(help="How long machines wait for each other.", metavar="TIME")]
MaxNewTokens = Annotated[int, typer.Option(help="Maximum length of a generated answer, in tokens.", min=1)]
Host = Annotated[str, typer.Option(help="Address to listen on. There is no authentication.")]
Port = Annotated[int, typer.Option(min=1, max=65535)]
Beside = Annotated[str | None, typer.Option(help="Also ask 'base' (the pretrained model), a folder or a Hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON instead of a table.")]
ModelFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, or of a model.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]

# ---- options of `plan` ------------------------------------------------------------------------------------------

Hardware = Annotated[
    str | None, typer.Option("--for", help='Plan for other hardware: "8x A100-80GB", "1x RTX 4090, 64GB host", "cpu".')
]
NumRows = Annotated[int | None, typer.Option(help="Plan without data: number of train rows (with --tokens).")]
NumTokens = Annotated[int | None, typer.Option(help="Plan without data: tokens per row (with --rows).")]
HourlyPrice = Annotated[
    str | None, typer.Option(help="Price of one device per hour: 2.5 or '2.5 USD'.", metavar="PRICE")
]
MeasureSettings = Annotated[
    bool, typer.Option("--measure", help="Measure one step of each setting here and choose the fastest that fits.")
]
