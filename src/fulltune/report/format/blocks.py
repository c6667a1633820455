"""What a report is made of: described once, printed by `pages`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from fulltune.records.data import Segment
from fulltune.report.format.words import clipped, named


@dataclass(frozen=True)
class Cell:
    """One table cell that needs more than plain text of ours."""

    text: str
    bar: float | None = None
    """Length of a bar beside the text, 0 to 1."""
    heat: float | None = None
    """Shade behind the text, 0 to 1; the text always carries the number too."""
    untrusted: bool = False
    """Text from data or a model: shown as it is, isolated from the text around it."""
    limit: int | None = None
    """So many characters of it are shown on a page; in Markdown and on a terminal at most 160, without a limit 80."""

    def shown(self, on_page: bool = False) -> str:
        """The text as far as there is room for it, and how much was left out."""
        most = self.limit if on_page else min(self.limit or 80, 160)
        return clipped(self.text, most) if self.untrusted and most else self.text


TableRow = tuple[Cell | str, ...]


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Names with values."""

    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row."""

    caption: str
    """Empty: the section's title says it."""
    header: tuple[str, ...]
    rows: tuple[TableRow, ...]
    numeric: frozenset[int] = frozenset()
    """Columns whose text is aligned to the right."""
    matrix: bool = False
    """True: a square of counts, drawn tight with upright headers."""

    def only(self, columns: Collection[str]) -> Table:
        """The table with its first column and these."""
        places = [place for place, name in enumerate(self.header) if place == 0 or name in columns]
        rows = tuple(tuple(row[place] for place in places) for row in self.rows)
        numeric = frozenset(number for number, place in enumerate(places) if place in self.numeric)
        return replace(self, header=tuple(self.header[place] for place in places), rows=rows, numeric=numeric)


@dataclass(frozen=True)
class Figure:
    """A drawing, and in words what it shows."""

    svg: str
    title: str
    words: str


@dataclass(frozen=True)
class Figures:
    """Drawings side by side."""

    items: tuple[Figure, ...]
    drawn_only: bool = False
    """True: a table beside it has the same numbers, so Markdown leaves it out."""
    file: str = ""
    """A picture beside the Markdown that shows the same."""


@dataclass(frozen=True)
class Code:
    text: str
    language: str = ""


@dataclass(frozen=True)
class Previews:
    """Rows as the model sees them, trained tokens set apart from the others."""

    items: tuple[tuple[tuple[Segment, ...], str | None], ...]
    target: str = "label"
    """What the text beside each row is."""

    @property
    def some_trained(self) -> bool:
        """Whether tokens are trained, so that they have to be told from the others."""
        return any(segment.trained for segments, _ in self.items for segment in segments)


Exchange = tuple[str, tuple[tuple[str, str], ...]]
"""What a text generator was asked; who said what: expected, before training, after training."""


@dataclass(frozen=True)
class Exchanges:
    items: tuple[Exchange, ...]


@dataclass(frozen=True)
class Folded:
    """A long part that opens on request; Markdown prints it in full."""

    title: str
    blocks: tuple[Element, ...]


Element = Paragraph | Bullets | Facts | Table | Figures | Code | Previews | Exchanges | Folded


@dataclass(frozen=True)
class Section:
    """A headed part of the report."""

    anchor: str
    title: str
    blocks: tuple[Element, ...] = field(default=())


@dataclass(frozen=True)
class Headline:
    """What it all comes to, in the report's box."""

    kind: str
    """Its colour in `report.css`: `better`, `worse`, `full`, `undecided` and so on."""
    label: str
    sentence: str
    note: str = ""
    """Which trial it is about, or on what terms it holds."""
    warning: str = ""
    """What to read before it is believed."""


@dataclass(frozen=True)
class Report:
    """All that is printed, before it becomes Markdown or HTML."""

    title: str
    subtitle: str
    headline: Headline
    key_figures: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]


def unless_empty(title: str, blocks: Sequence[Element]) -> Section | None:
    """A section, or nothing when there is nothing to say in it."""
    return Section(title.lower().replace(" ", "-"), title, tuple(blocks)) if blocks else None


def untrusted(text: str, limit: int | None = None) -> Cell:
    """A cell of text from data or a model, cut after `limit` characters; an empty text is said to be empty."""
    return Cell(named(text), untrusted=True, limit=limit)
