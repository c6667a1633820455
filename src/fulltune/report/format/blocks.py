from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from fulltune.records.data import Segment
from fulltune.report.format.words import cut_text, text_or_empty


@dataclass(frozen=True)
class Cell:
    text: str
    bar: float | None = None
    heat: float | None = None
    untrusted: bool = False
    """True for text from data or a model, which is escaped."""
    limit: int | None = None
    link: str = ""
    """Relative address on the HTML page."""

    def shown_text(self, on_page: bool = False) -> str:
        """Return the text. Untrusted text is cut to `limit` on a page, and to at most 160 characters elsewhere (80 if
        `limit` is None)."""
        most = self.limit if on_page else min(self.limit or 80, 160)
        return cut_text(self.text, most) if self.untrusted and most else self.text


TableRow = tuple[Cell | str, ...]
NameAndValue = tuple[str, str]


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    rows: tuple[NameAndValue, ...]


@dataclass(frozen=True)
class Table:
    caption: str
    header: tuple[str, ...]
    rows: tuple[TableRow, ...]
    numeric: frozenset[int] = frozenset()
    matrix: bool = False

    def keep_columns(self, columns: Collection[str]) -> Table:
        """Return the table with only the first column and the named ones."""
        indices = [index for index, name in enumerate(self.header) if index == 0 or name in columns]
        rows = tuple(tuple(row[index] for index in indices) for row in self.rows)
        numeric = frozenset(number for number, index in enumerate(indices) if index in self.numeric)
        return replace(self, header=tuple(self.header[index] for index in indices), rows=rows, numeric=numeric)


@dataclass(frozen=True)
class Figure:
    svg: str
    title: str
    words: str


@dataclass(frozen=True)
class Figures:
    items: tuple[Figure, ...]


@dataclass(frozen=True)
class Code:
    text: str
    language: str = ""


@dataclass(frozen=True)
class Previews:
    items: tuple[tuple[tuple[Segment, ...], str | None], ...]
    target: str = "label"

    @property
    def some_trained(self) -> bool:
        return any(segment.trained for segments, _ in self.items for segment in segments)


Exchange = tuple[str, tuple[tuple[str, str], ...]]
"""A prompt and its (speaker, reply) pairs."""


@dataclass(frozen=True)
class Exchanges:
    items: tuple[Exchange, ...]
    fold: int = 0
    """If set, a page folds each text after this number of characters."""


@dataclass(frozen=True)
class Folded:
    title: str
    blocks: tuple[Element, ...]


Element = Paragraph | Bullets | Facts | Table | Figures | Code | Previews | Exchanges | Folded


@dataclass(frozen=True)
class Section:
    anchor: str
    title: str
    blocks: tuple[Element, ...] = field(default=())


@dataclass(frozen=True)
class Headline:
    kind: str
    """CSS class: `better`, `worse`, `full`, `undecided` and so on."""
    label: str
    sentence: str
    note: str = ""
    warning: str = ""


@dataclass(frozen=True)
class Report:
    title: str
    subtitle: str
    headline: Headline
    key_figures: tuple[NameAndValue, ...]
    sections: tuple[Section, ...]


def unless_empty(title: str, blocks: Sequence[Element]) -> Section | None:
    """Return a section with these blocks, or None if `blocks` is empty."""
    return Section(title.lower().replace(" ", "-"), title, tuple(blocks)) if blocks else None


def untrusted(text: str, limit: int | None = None) -> Cell:
    """Return a cell for text from data or a model. Blank text becomes `(empty)`."""
    return Cell(text_or_empty(text), untrusted=True, limit=limit)
