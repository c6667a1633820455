from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fulltune.errors import SetupError
from fulltune.records.data import DataSummary
from fulltune.records.export import Verification
from fulltune.records.scores import Scores
from fulltune.report.comparison.content import build_comparison_report
from fulltune.report.format.blocks import Element, Headline, Section
from fulltune.report.format.pages import write_pages
from fulltune.report.format.words import write_sanitized
from fulltune.report.run import content
from fulltune.report.run.content import build_run_report
from fulltune.report.run.folds import build_folds_report
from fulltune.report.run.model_card import build_exported_card, build_model_card
from fulltune.report.run.read import read_run
from fulltune.system.run_folder import COMPARISONS, FOLDS, load_comparison

_OF_LATER_ROWS = (
    *("results", "slices", "answers-before-and-after-training", "confusion", "worst-mistakes", "calibration", "data"),
)


def write_run_report(folder: Path) -> Path:
    """Write a run's report and return the path of `report.html`."""
    is_run = not (Path(folder) / FOLDS).exists()
    report = build_run_report(read_run(folder)) if is_run else build_folds_report(Path(folder))
    return write_pages(Path(folder) / "report", report)


def write_later_rows_report(
    run: Path, folder: Path, summary: DataSummary, scores: Sequence[Scores]
) -> list[Headline | Section | Element]:
    """Write the report on rows that came after a run, whose test rows `summary` and `scores` describe, and return what
    is printed."""
    view = replace(read_run(run, scores[-1]), summary=summary, scores=tuple(scores), missing=(), accesses=())
    page = build_run_report(view)
    sections = tuple(section for section in page.sections if section.anchor in _OF_LATER_ROWS)
    title = f"{page.title}: {summary.sources['test'].removeprefix('file ')}"
    write_pages(folder / "report", replace(page, title=title, key_figures=(), sections=sections))
    return content.build_run_terminal_report(view)


def build_run_terminal_report(folder: Path) -> list[Headline | Section | Element]:
    if (Path(folder) / FOLDS).exists():
        page = build_folds_report(Path(folder))
        return [page.headline, *page.sections[0].blocks]
    return content.build_run_terminal_report(read_run(Path(folder)))


def write_comparison_report(folder: Path) -> tuple[Path, ...]:
    """Write a finished comparison's pages and `proof.json`, and return their paths."""
    comparison = load_comparison(folder)
    if comparison is None:
        raise SetupError(
            f"{folder}: contains no finished comparison ({COMPARISONS[0]} is missing); run 'fulltune compare RECIPE' "
            "to the end"
        )
    card, proof = folder / "card.md", folder / "proof.json"
    html = write_pages(card, build_comparison_report(comparison), "comparison.html.j2", private=False)
    comparison.save(proof)
    return card, html, proof


def write_model_card(folder: Path, model_folder: Path, scores: Scores | None = None) -> None:
    """Write the model card beside the weights. For a comparison's trial, pass its `scores`."""
    write_sanitized(Path(model_folder) / "README.md", build_model_card(read_run(folder, scores), Path(model_folder)))


def write_exported_card(trained_folder: Path, target: Path, verification: Verification, usage: str) -> None:
    """Write an exported model's `README.md`, based on the trained model's card."""
    path = trained_folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    write_sanitized(target / "README.md", build_exported_card(text, verification, usage))
