from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fulltune.cli import options, stages
from fulltune.errors import SetupError
from fulltune.text import counted, format_bytes


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, of a model or of an export.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A repository on the Hugging Face Hub.")],
    yes: Annotated[bool, typer.Option("--yes", help="Send the files.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see the repository.")] = False,
    branch: Annotated[str | None, typer.Option(help="Send the files to this branch.")] = None,
    as_pr: Annotated[bool, typer.Option("--pr", help="Send the files as a pull request.")] = False,
    method: options.MethodName = None,
    as_json: options.Json = False,
) -> None:
    """Send a model to the Hugging Face Hub; without --yes, only show what would be sent."""
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not in __all__

    from fulltune import push as pushing
    from fulltune.report.format import blocks, pages

    if repository.count("/") != 1:
        raise SetupError(f"{repository}: expected a repository as OWNER/NAME")
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise SetupError(f"{repository}: expected a repository as OWNER/NAME: {error}") from None
    if branch and as_pr:
        raise SetupError("push: give either --branch or --pr, not both")
    folder = stages.choose_model_folder(run, method)
    files = pushing.choose_files(folder)
    checks = list(pushing.check_readiness(folder, files))
    sent = {folder, folder.parent, *(folder / Path(name).parts[0] for name in files)}
    stays = sorted({*run.iterdir(), *run.glob("models/*"), *folder.iterdir()} - sent)
    left_out = [f"{path.relative_to(run)}{'/' * path.is_dir()}" for path in stays]
    if not as_json:
        card = (folder / pushing.CARD).read_text(encoding="utf-8") if pushing.CARD in files else ""
        where = f"branch {branch}" if branch else "pull request" if as_pr else "main branch"
        facts = [("to", f"{repository} ({'public' if public else 'private'}), {where}")]
        facts += [("model card", ": ".join(card.partition("\n# ")[2].split("\n\n")[:2]) or "none")]
        facts += [("not sent", ", ".join(left_out) or "-")]
        total = f"{counted(len(files), 'file')}, {format_bytes(sum(files.values()))}, in one commit"
        sizes = tuple((name, format_bytes(size)) for name, size in files.items())
        results = tuple(("ok" if one.passed else "PROBLEM", one.name, one.result) for one in checks)
        tables = [blocks.Table(total, ("file", "size"), sizes, numeric=frozenset({1}))]
        tables += [blocks.Table("Can other programs load it?", ("", "check", "result"), results)]
        pages.print_parts(stages.out, [blocks.Facts(tuple(facts)), *tables])
    if blocking := [one for one in checks if not one.passed and one.name in pushing.BLOCKING]:
        raise SetupError([f"{folder}: cannot be sent: {one.name}: {one.result}" for one in blocking])
    url = pushing.upload(folder, files, repository, public, branch, as_pr) if yes else None
    if as_json:
        stages.print_json({"files": files, "left_out": left_out, "checks": [*map(dict, checks)], "url": url})
    else:
        stages.out.print(f"sent: {url}" if yes else "nothing was sent; --yes sends it", markup=False, soft_wrap=True)
