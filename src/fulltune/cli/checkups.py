"""The commands that look at what is there: this machine, and the log of a training."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

from rich.markup import escape

from fulltune.cli import stages
from fulltune.cli.stages import err, out
from fulltune.errors import SetupError
from fulltune.report.format import terminal
from fulltune.report.format.blocks import Facts
from fulltune.report.format.pages import section_in_markdown
from fulltune.report.format.words import write_harmless


def doctor(place: Path, as_json: bool) -> None:
    """What went wrong in a training."""
    from fulltune.doctor import diagnose, in_words, read_log

    log = read_log(place)
    found = diagnose(log)
    if as_json:
        stages.print_json([dict(zip(("name", "evidence", "advice"), one, strict=True)) for one in found])
        return
    out.print(escape(in_words(log)), soft_wrap=True)
    rows = ((name, f"{evidence}{f' → {advice}' if advice else ''}") for name, evidence, advice in found)
    terminal.show(out, [Facts(tuple(rows))])


def selfcheck(output: Path | None, as_json: bool) -> None:
    """What the hardware decides, run here."""
    from fulltune import selfcheck as checking
    from fulltune.system.run_folder import writing

    # What libraries print must not run into the page: some greet on stdout when it is imported.
    with err.status("starting") as status, redirect_stdout(sys.stderr):
        page = checking.run(lambda line: status.update(escape(line)))
    shown = checking.in_blocks(page)
    if output is not None:
        with writing(output):
            write_harmless(output, section_in_markdown(shown))
    if as_json:
        stages.print_json(page.model_dump(mode="json"))
    else:
        terminal.show(out, [shown])
        share = f"share {output}" if output else "to share it: fulltune selfcheck --output selfcheck.md"
        out.print(escape(share), soft_wrap=True)
    if failed := [f"selfcheck: {one.device}: {one.ran}: {one.result}" for one in page.findings if one.status == "fail"]:
        raise SetupError(failed)
