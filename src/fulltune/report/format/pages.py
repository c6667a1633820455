"""A report as one HTML file without network, by the template beside this file, and as Markdown with padded tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.cells import cell_len

from fulltune.report.format.blocks import (
    Block,
    Bullets,
    Cell,
    Code,
    Exchanges,
    Facts,
    Figures,
    Folded,
    Paragraph,
    Previews,
    Report,
    Section,
    Table,
)
from fulltune.report.format.words import clipped
from fulltune.text import listed

_LOADING = "loading.py.j2"
# Text from data, models and recipes goes through autoescape; only the SVG of `plots`, which escapes its own
# texts, is marked safe in the template.
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=lambda name: name != _LOADING,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page(report: Report, template: str = "report.html.j2") -> str:
    """Print the whole report as HTML."""
    return _TEMPLATES.get_template(template).render(report=report)


def loading_code(**facts: Any) -> str:
    """Print Python that loads a model."""
    return _TEMPLATES.get_template(_LOADING).render(**facts)


_BAR_LENGTH = 20
_TEXT_LIMIT = 600


def markdown(report: Report) -> str:
    """Print the whole report as Markdown."""
    lines = [f"# {escaped(report.title)}", "", escaped(report.subtitle), ""]
    lines += [f"**{escaped(report.headline.label)}.** {escaped(report.headline.sentence)}", ""]
    if report.headline.note:
        lines += [escaped(report.headline.note), ""]
    if report.headline.warning:
        lines += [f"**{escaped(report.headline.warning)}**", ""]
    if report.key_figures:
        lines += [*(f"- {name}: {value}" for name, value in report.key_figures), ""]
    body = "\n".join(section_in_markdown(section, "##") for section in report.sections)
    return "\n".join([*lines, body]).rstrip() + "\n"


def section_in_markdown(section: Section, level: str = "#") -> str:
    """Print one section, as a page of its own or inside a report."""
    lines = [f"{level} {section.title}", "", *(line for block in section.blocks for line in _block(block))]
    return "\n".join(lines).rstrip() + "\n"


def escaped(text: str) -> str:
    """Text on one line, without anything that Markdown would read as HTML, a table cell, a link or an image."""
    text = " ".join(text.split())
    text = re.sub(r"[\\<|`&]", r"\\\g<0>", text)
    return text.replace("](", "]\\(")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], numeric: frozenset[int] = frozenset()) -> str:
    cells = [[escaped(text) for text in row] for row in (header, *rows)]
    widths = [max(3, *(cell_len(row[index]) for row in cells)) for index in range(len(header))]
    rule = ["-" * (width - 1) + (":" if index in numeric else "-") for index, width in enumerate(widths)]
    lines = []
    for row in (cells[0], rule, *cells[1:]):
        padded = []
        for index, text in enumerate(row):
            space = " " * (widths[index] - cell_len(text))
            padded.append(space + text if index in numeric else text + space)
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)


def _fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _block(block: Block) -> Iterator[str]:
    match block:
        case Paragraph():
            yield from (escaped(block.text), "")
        case Bullets():
            yield from (*(f"- {escaped(item)}" for item in block.items), "")
        case Facts():
            yield from (*(f"- {escaped(name)}: {escaped(value)}" for name, value in block.rows), "")
        case Table():
            yield from (f"{escaped(block.caption)}:", "") if block.caption else ()
            yield _table(block.header, [[_cell(cell) for cell in row] for row in block.rows], block.numeric)
            yield ""
        case Figures(drawn_only=True):
            return
        case Figures():  # the drawings are in report.html; here is what they say
            yield from (*(f"- {escaped(figure.title)}: {escaped(figure.words)}" for figure in block.items), "")
            if block.file:
                yield from (f"![{escaped(listed([figure.title for figure in block.items]))}]({block.file})", "")
        case Code():
            yield from (_fenced(block.text, block.language), "")
        case Previews():
            if block.some_trained:
                yield from ("Trained tokens stand between ⟦ and ⟧.", "")
            for segments, label in block.items:
                text = "".join(f"⟦{one.text}⟧" if one.trained else one.text for one in segments)
                yield from (_fenced(text), "")
                if label is not None:
                    yield from (f"{block.target}: {escaped(label)}", "")
        case Exchanges():
            for asked, said in block.items:
                parts = [asked, *(f"[{who}]\n{what}" for who, what in said)]
                yield from (_fenced("\n\n".join(clipped(part, _TEXT_LIMIT) for part in parts)), "")
        case Folded():
            yield from (f"### {escaped(block.title)}", "")
            for inner in block.blocks:
                yield from _block(inner)


def _cell(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return cell
    text = cell.shown()
    if cell.bar is None:
        return text
    filled = max(round(cell.bar * _BAR_LENGTH), 1 if cell.bar > 0 else 0)
    return f"{text} {'█' * filled}"
