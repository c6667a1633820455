"""The proof card of a comparison: one page as Markdown and HTML, its plot as PNG, and the one JSON it is made from."""

from __future__ import annotations

from pathlib import Path

from fulltune.errors import SetupError
from fulltune.records.comparison import Comparison
from fulltune.report.comparison import words as proof_words
from fulltune.report.comparison.content import build, drawings
from fulltune.report.files import replace
from fulltune.report.format.html import page
from fulltune.report.format.markdown import markdown
from fulltune.report.format.picture import draw

RECORD = "compare/comparison.json"
PROOF = "proof.json"
CARD = "card.md"
PAGE = "card.html"
PICTURE = "card.png"
_NO_PICTURE = (
    "There is no picture of the plot (card.html has it): matplotlib is not installed. Get it with pip install "
    "'fulltune[plots]', then 'fulltune report RUN' with this run's folder: it writes only the card anew."
)


def write_proof(folder: Path) -> tuple[Path, ...]:
    """Write `card.md`, `card.html`, `card.png` and `proof.json`.

    Args:
        folder: A run folder with a finished comparison, or the JSON of one (`proof.json`): then the card is written
            beside it.

    Returns:
        What was written; without `card.png` where matplotlib is missing or there is nothing to plot.

    Raises:
        SetupError: If there is no comparison, or it cannot be read.
    """
    source = _source(Path(folder))
    comparison = Comparison.load(source)
    target = Path(folder) if Path(folder).is_dir() else source.parent
    plots = drawings(comparison)
    picture = target / PICTURE
    title = proof_words.label(comparison.decision)
    drawn = bool(plots) and draw(title, f"{comparison.name}: {comparison.decision.headline}", plots, picture)
    if not drawn:
        picture.unlink(missing_ok=True)  # one of an earlier comparison would contradict the card
    note = _NO_PICTURE if plots and not drawn else ""
    replace(target / CARD, markdown(build(comparison, PICTURE if drawn else "", note)))
    replace(target / PAGE, page(build(comparison), "proof.html.j2"))
    comparison.save(target / PROOF)
    return (target / CARD, target / PAGE, *((picture,) if drawn else ()), target / PROOF)


def _source(folder: Path) -> Path:
    if folder.is_file():
        return folder
    found = next((folder / name for name in (RECORD, PROOF) if (folder / name).is_file()), None)
    if found is None:
        raise SetupError(
            f"{folder}: has no finished comparison ({RECORD} is missing); first let 'fulltune compare RECIPE' end"
        )
    return found
