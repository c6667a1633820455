from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fulltune.cli import stages
from fulltune.cli.stages import out


def schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the schema to this file instead of printing it.")
    ] = None,
) -> None:
    """Print the JSON schema of recipes, with which editors complete and check settings."""
    from fulltune.files import write_json
    from fulltune.recipe.schema import recipe_schema
    from fulltune.system.run_folder import explain_os_errors

    if output is None:
        stages.print_json(recipe_schema())
        return
    with explain_os_errors(output):
        write_json(output, recipe_schema())
    out.print("first line of a recipe that uses it:")
    out.print(f"# yaml-language-server: $schema={escape(str(output))}", soft_wrap=True)
