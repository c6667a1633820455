"""Blocks on a terminal: what is folded away in `report.html`, and drawings, are left to that page."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Literal

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from fulltune.records.data import Segment
from fulltune.report.format import blocks
from fulltune.report.format.blocks import Block, Cell, Headline, Section
from fulltune.report.format.words import one_line

_TEXT_LIMIT = 300
"""Letters of a text from data or a model outside of a table."""
_NAME_WIDTH, _TEXT_WIDTH = 40, 28
"""A table's names and other texts are broken from so many columns on; numbers stay on one line."""
_GAP = 2
"""Between columns."""
_STYLES = {
    **dict.fromkeys(("better", "peft", "variant", "equivalent"), "bold green"),
    "worse": "bold red",
    "full": "bold blue",
}


def show(console: Console, parts: Iterable[Headline | Section | Block]) -> None:
    """Print them one after the other; a table wider than the terminal continues below with its other columns."""
    for place, part in enumerate(parts):
        if place and isinstance(part, blocks.Table) and part.caption:
            console.print()
        if isinstance(part, Section):
            console.print(Text(f"\n{part.title}", style="bold"))
            show(console, part.blocks)
        else:
            for line in _lines(part, console.width):
                # A command is for copying: the terminal may break its line, nothing else.
                console.print(line, soft_wrap=isinstance(part, blocks.Code), highlight=False)


def _lines(part: Headline | Block, width: int) -> Iterator[RenderableType]:
    match part:
        case Headline():
            style = _STYLES.get(part.kind, "bold yellow")
            yield Text.assemble((f"\n{one_line(part.label)}.", style), f" {one_line(part.sentence)}")
            yield from (Text(one_line(text)) for text in (part.note, part.warning) if text)
        case blocks.Paragraph():
            yield Text(one_line(part.text))
        case blocks.Bullets():
            yield _grid([("-", item) for item in part.items], gap=1)
        case blocks.Facts():
            yield _grid(part.rows)
        case blocks.Table():
            yield from [Text(one_line(part.caption), style="dim")] * bool(part.caption)
            yield from _tables(part, width)
        case blocks.Code():
            is_long = part.language == "sh" and len(part.text) > width
            yield Text(re.sub(r"(?<=\S) --set ", " \\\\\n  --set ", part.text) if is_long else part.text)
        case blocks.Previews():
            yield from (_preview(segments, label) for segments, label in part.items)
        case blocks.Exchanges():
            for asked, said in part.items:
                yield Text(_short(asked), style="bold")
                yield _grid([(who, _short(what)) for who, what in said])


def _grid(rows: Iterable[tuple[str, str]], gap: int = 2) -> Grid:
    """Names, and texts whose lines stand under each other."""
    grid = Grid.grid(padding=(0, gap, 0, 0))
    grid.add_column(max_width=_TEXT_WIDTH, style="dim")
    grid.add_column(overflow="fold")
    for name, text in rows:
        grid.add_row(Text(one_line(name)), Text(one_line(text)))
    return grid


def _tables(table: blocks.Table, width: int) -> Iterator[Grid]:
    """Tables with as many columns as fit; each begins with the first one, which names the rows."""
    cells = [[_cell(cell) for cell in row] for row in table.rows]
    headers, widest, needed = [], [], []
    for number, name in enumerate(map(one_line, table.header)):
        wide = max((cell_len(row[number]) for row in cells), default=0)
        headers.append("\n".join(textwrap.wrap(name, max(wide, *map(len, name.split() or [""]), 1))))
        widest.append(max(wide, *map(cell_len, headers[-1].split("\n"))))
        least = widest[-1] if number in table.numeric else _TEXT_WIDTH if number else _NAME_WIDTH
        needed.append(min(widest[-1], least))
    groups: list[list[int]] = [[]]
    for number in range(len(headers)):
        if groups[-1] and sum(needed[one] + _GAP for one in groups[-1]) + needed[number] > width:
            groups.append([0])
        groups[-1].append(number)
    for group in groups:
        # Gaps are columns: Rich would count one behind the last column, too.
        grid = Grid(box=None, pad_edge=False, header_style="dim", padding=0)
        left = width - sum(needed[number] + _GAP for number in group) + _GAP
        for place, number in enumerate(group):
            if place:
                grid.add_column(width=_GAP)
            more = min(max(0, left), widest[number] - needed[number])
            left -= more
            justify: Literal["left", "right"] = "right" if number in table.numeric else "left"
            grid.add_column(Text(headers[number]), justify=justify, overflow="fold", width=needed[number] + more)
        for row in cells:
            grid.add_row(*[text for number in group for text in ("", Text(row[number]))][1:])
        yield grid


def _cell(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return one_line(cell)
    return one_line(cell.shown())


def _preview(segments: Iterable[Segment], label: str | None) -> Text:
    """A row on one line; what is trained stands in ⟦brackets⟧ and green."""
    line = Text("  ")
    for segment in segments:
        text = one_line(segment.text)
        text = text if len(text) <= 160 else f"{text[:100]} … {text[-55:]}"
        line.append(f"⟦{text}⟧ " if segment.trained else f"{text} ", style="green" if segment.trained else "dim")
    if label is not None:
        line.append("→ ", style="dim")
        line.append(f"⟦{one_line(label)}⟧", style="green")
    return line


def _short(text: str) -> str:
    return one_line(text)[:_TEXT_LIMIT]
