"""Options of the command line: their names and help texts, each once."""

from pathlib import Path
from typing import Annotated

import typer


def _print_version(asked: bool) -> None:
    if asked:
        from importlib import metadata

        typer.echo(metadata.version("fulltune"))
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)]
Target = Annotated[
    Path, typer.Argument(metavar="RECIPE|RUN", help="A recipe (YAML), or the folder of a run.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting: block.name=value. Repeatable.", metavar="NAME=VALUE"),
]
RunFolder = Annotated[
    Path | None, typer.Option("--run-folder", help="Work in this folder instead of a new one in 'output'.")
]
JudgeLabels = Annotated[
    bool,
    typer.Option(
        "--labels/--no-labels",
        help="Have the untouched model judge labels and find outliers, or leave out what needs it.",
    ),
]
Prove = Annotated[
    bool,
    typer.Option("--prove", help="Fit classifiers on the untouched model with and without each cleaning step."),
]
Trainings = Annotated[
    int,
    typer.Option(
        "--trainings", help="Train with and without each cleaning step, with N seeds each (2 or more).", metavar="N"
    ),
]
StepsOf = Annotated[
    list[str] | None,
    typer.Option("--check", help="For --trainings: only the steps of this check. Repeatable.", metavar="CHECK"),
]
Losses = Annotated[
    bool,
    typer.Option(
        "--losses", help="Of a RUN: read its train and eval rows with the trained model; list the highest losses."
    ),
]
Accept = Annotated[
    list[str] | None,
    typer.Option(
        "--accept", help="Take what is proposed for all rows of a check into the patch. Repeatable.", metavar="CHECK"
    ),
]
Review = Annotated[
    bool,
    typer.Option("--review", help="Go through the suspicious rows and decide; without a terminal write them down."),
]
PatchFile = Annotated[
    Path | None,
    typer.Option(
        "--patch", help="Where decisions are kept. Default: NAME.patch.jsonl beside the recipe, or in the RUN."
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew even if an unfinished run of this recipe exists.")]
SearchRate = Annotated[
    bool, typer.Option("--search", help="Find the learning rate first: short for --set method.learning_rate=search.")
]
SearchBudget = Annotated[
    str | None,
    typer.Option("--budget", help="About the most time for a search, its best run included: 20m, 2h.", metavar="TIME"),
]
CompareBudget = Annotated[
    str | None,
    typer.Option("--budget", help="Most time in all: 30m, 2h; with more of it later it goes on.", metavar="TIME"),
]
MethodName = Annotated[
    str | None,
    typer.Option("--method", help="Which of the run's models; default: the method that the comparison recommends."),
]
MachineRank = Annotated[
    int | None,
    typer.Option("--machine-rank", help="Of several machines the number of this one, from 0 (docs/guides/scale.md)."),
]
Rendezvous = Annotated[
    str | None,
    typer.Option("--rendezvous", help="Where several machines meet: machine 0's name.", metavar="HOST[:PORT]"),
]
WaitForMachines = Annotated[
    str, typer.Option("--wait-for-machines", help="How long machines wait for each other.", metavar="TIME")
]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON instead of a table.")]
ModelFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, or of a model.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]

# ---- of `plan` --------------------------------------------------------------------------------------------------

Hardware = Annotated[
    str | None,
    typer.Option("--for", help='Hardware that is not here: "8x A100-80GB", "1x RTX 4090, 64GB host", "cpu".'),
]
NumRows = Annotated[int | None, typer.Option("--rows", help="Plan without data: so many train rows ...")]
NumTokens = Annotated[int | None, typer.Option("--tokens", help="... of so many tokens each.")]
Price = Annotated[
    str | None, typer.Option("--price", help="What one device costs in an hour: 2.5 or '2.5 USD'.", metavar="PRICE")
]
Measure = Annotated[
    bool, typer.Option("--measure", help="Try the settings for a step each, here; take the fastest that fit.")
]
