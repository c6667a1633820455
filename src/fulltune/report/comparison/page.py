"""The report of a comparison: one page as Markdown and HTML, its plot as PNG, and the one JSON that it is made from."""

from __future__ import annotations

from pathlib import Path

from fulltune.errors import SetupError
from fulltune.records.comparison import Comparison
from fulltune.report.comparison.content import build, label, plots
from fulltune.report.format.html import page
from fulltune.report.format.markdown import markdown
from fulltune.report.format.plots import cost_picture
from fulltune.report.format.words import write_harmless

RECORD = "compare/comparison.json"
PROOF = "proof.json"
CARD = "card.md"
PAGE = "card.html"
PICTURE = "card.png"


def write_comparison(folder: Path) -> tuple[Path, ...]:
    """Write `card.md`, `card.html`, `card.png` and `proof.json`.

    Args:
        folder: A run folder with a finished comparison, or the JSON of one (`proof.json`): then the report is
            written beside it.

    Returns:
        What was written; without `card.png` where there is nothing to plot.

    Raises:
        SetupError: If there is no comparison, or it cannot be read.
    """
    source = _source(Path(folder))
    comparison = Comparison.load(source)
    target = Path(folder) if Path(folder).is_dir() else source.parent
    found, picture = plots(comparison), target / PICTURE
    if found:
        subtitle = f"{comparison.name}: {comparison.decision.headline}"
        cost_picture(label(comparison.decision), subtitle, found, picture)
    else:
        picture.unlink(missing_ok=True)  # one of an earlier comparison would contradict the report
    report = build(comparison, PICTURE)
    write_harmless(target / CARD, markdown(report))
    write_harmless(target / PAGE, page(report, "comparison.html.j2"))
    comparison.save(target / PROOF)
    return (target / CARD, target / PAGE, *[picture] * bool(found), target / PROOF)


def _source(folder: Path) -> Path:
    if folder.is_file():
        return folder
    found = next((folder / name for name in (RECORD, PROOF) if (folder / name).is_file()), None)
    if found is None:
        raise SetupError(
            f"{folder}: has no finished comparison ({RECORD} is missing); first let 'fulltune compare RECIPE' end"
        )
    return found
