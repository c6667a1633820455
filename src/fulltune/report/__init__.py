"""Run folder to report: `report.md`, `report.html` and the model card, of a comparison `card.md` and `card.html`; made
from the files in the folder alone.

`format` knows how a page is written, `run` and `comparison` what stands on it. Light: matplotlib, PyYAML and
huggingface_hub are imported when they are needed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fulltune.records.scores import Scores
from fulltune.report.comparison.many_tasks import write_tasks
from fulltune.report.comparison.page import write_comparison
from fulltune.report.format.blocks import Block, Headline, Section
from fulltune.report.format.html import page
from fulltune.report.format.markdown import markdown
from fulltune.report.format.words import write_harmless
from fulltune.report.run import content
from fulltune.report.run.content import build
from fulltune.report.run.data_page import write_data_page
from fulltune.report.run.model_card import merged_card, model_card
from fulltune.report.run.read import read_run

__all__ = [
    "in_short",
    "write",
    "write_comparison",
    "write_data_page",
    "write_merged_card",
    "write_model_card",
    "write_tasks",
]


def write(folder: Path) -> Path:
    """Write `report.md` and `report.html` into a run folder.

    The run may have ended anywhere: what is missing is named in the report, with the reason.

    Returns:
        The path of `report.html`.

    Raises:
        SetupError: If the folder does not exist or is not a run folder.

    Example:
        >>> write(Path("runs/banking77-2026-11-24-1530"))  # doctest: +SKIP
    """
    folder = Path(folder)
    report = build(read_run(folder))
    write_harmless(folder / "report.md", markdown(report), private=True)
    target = folder / "report.html"
    write_harmless(target, page(report), private=True)
    return target


def in_short(folder: Path) -> list[Headline | Section | Block]:
    """What of a run's report stands in the terminal at its end."""
    return content.in_short(read_run(Path(folder)))


def write_model_card(folder: Path, model_folder: Path, scores: Scores | None = None) -> None:
    """Write `README.md` beside the trained weights.

    Args:
        folder: The run folder.
        model_folder: The model's folder; created when it is not there.
        scores: Of the trial whose model it is, where they lie in no file of their own, as in a comparison.

    Raises:
        SetupError: If `folder` does not exist or is not a run folder.
    """
    view = read_run(Path(folder))
    if scores:
        view = replace(view, scores=(*(row for row in view.scores if row.kind != "trained"), scores))
    write_harmless(Path(model_folder) / "README.md", model_card(view, Path(model_folder)))


def write_merged_card(source: Path, model_folder: Path, task: str) -> None:
    """Write `README.md` into the folder of a merged model, from that of the model it was made of."""
    path = Path(source) / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    write_harmless(Path(model_folder) / "README.md", merged_card(text, Path(model_folder).name, task))
