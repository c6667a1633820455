from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import jinja2
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from fulltune.records.data import Segment
from fulltune.report.format.blocks import (
    Bullets,
    Code,
    Element,
    Exchanges,
    Facts,
    Figures,
    Folded,
    Headline,
    Paragraph,
    Previews,
    Report,
    Section,
    Table,
)
from fulltune.report.format.words import cut_text, one_line, write_sanitized

LOADING = "loading.py.j2"
# Text from data, models and recipes goes through autoescape; only the SVG of `plots`, which escapes its own
# texts, is marked safe in the template.
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=lambda name: name != LOADING,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_pages(path: Path, report: Report, template: str = "report.html.j2", private: bool = True) -> Path:
    """Write a report as Markdown and HTML files, which only their owner can read if `private`. Return the HTML file's
    path."""
    write_sanitized(path.with_suffix(".md"), render_markdown(report), private)
    target = path.with_suffix(".html")
    write_sanitized(target, TEMPLATES.get_template(template).render(report=report), private)
    return target


_TEXT_LIMIT = 600


def render_markdown(report: Report) -> str:
    lines = [f"# {escape_markdown(report.title)}", "", escape_markdown(report.subtitle), ""]
    lines += [f"**{escape_markdown(report.headline.label)}.** {escape_markdown(report.headline.sentence)}", ""]
    if report.headline.note:
        lines += [escape_markdown(report.headline.note), ""]
    if report.headline.warning:
        lines += [f"**{escape_markdown(report.headline.warning)}**", ""]
    if report.key_figures:
        lines += [*(f"- {name}: {value}" for name, value in report.key_figures), ""]
    body = "\n".join(render_section(section, "##") for section in report.sections)
    return "\n".join([*lines, body]).rstrip() + "\n"


def render_section(section: Section, level: str = "#") -> str:
    """Render a section as Markdown, with its heading at `level` (`#`, `##`)."""
    lines = [f"{level} {section.title}", "", *(line for block in section.blocks for line in _markdown_lines(block))]
    return "\n".join(lines).rstrip() + "\n"


def escape_markdown(text: str) -> str:
    """Put text on one line and escape Markdown's special characters for HTML, tables, links and images."""
    text = " ".join(text.split())
    text = re.sub(r"[\\<|`&]", r"\\\g<0>", text)
    return text.replace("](", "]\\(")


def _format_markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right_aligned: frozenset[int] = frozenset()
) -> str:
    cells = [[escape_markdown(text) for text in row] for row in (header, *rows)]
    widths = [max(3, *(cell_len(row[index]) for row in cells)) for index in range(len(header))]
    rule = ["-" * (width - 1) + (":" if index in right_aligned else "-") for index, width in enumerate(widths)]
    lines = []
    for row in (cells[0], rule, *cells[1:]):
        padded = []
        for index, text in enumerate(row):
            space = " " * (widths[index] - cell_len(text))
            padded.append(space + text if index in right_aligned else text + space)
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)


def _fence_code(text: str, language: str = "") -> str:
    """Return a Markdown code block, fenced by more backticks than the text contains."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _markdown_lines(block: Element) -> Iterator[str]:
    match block:
        case Paragraph():
            yield from (escape_markdown(block.text), "")
        case Bullets():
            yield from (*(f"- {escape_markdown(item)}" for item in block.items), "")
        case Facts():
            yield from (*(f"- {escape_markdown(name)}: {escape_markdown(value)}" for name, value in block.rows), "")
        case Table():
            yield from (f"{escape_markdown(block.caption)}:", "") if block.caption else ()
            rows = [[cell if isinstance(cell, str) else cell.shown_text() for cell in row] for row in block.rows]
            yield _format_markdown_table(block.header, rows, block.numeric)
            yield ""
        case Figures():  # the drawings are in report.html; Markdown describes them
            named = [(figure.title, figure.words) for figure in block.items]
            yield from (*(f"- {escape_markdown(title)}: {escape_markdown(text)}" for title, text in named), "")
        case Code():
            yield from (_fence_code(block.text, block.language), "")
        case Previews():
            if block.some_trained:
                yield from ("The model is trained on the tokens between ⟦ and ⟧.", "")
            for segments, label in block.items:
                text = "".join(f"⟦{one.text}⟧" if one.trained else one.text for one in segments)
                yield from (_fence_code(text), "")
                if label is not None:
                    yield from (f"{block.target}: {escape_markdown(label)}", "")
        case Exchanges():
            for prompt, replies in block.items:
                parts = [prompt, *(f"[{who}]\n{what}" for who, what in replies)]
                yield from (_fence_code("\n\n".join(cut_text(part, _TEXT_LIMIT) for part in parts)), "")
        case Folded():
            yield from (f"### {escape_markdown(block.title)}", "")
            for inner in block.blocks:
                yield from _markdown_lines(inner)


# ---- on a terminal --------------------------------------------------------------------------------------------------

_SHOWN_LIMIT = 300
_NAME_WIDTH, _TEXT_WIDTH = 40, 28
_GAP = 2
_STYLES = {
    **dict.fromkeys(("better", "peft", "variant", "equivalent"), "bold green"),
    "worse": "bold red",
    "full": "bold blue",
}


def print_parts(console: Console, parts: Iterable[Headline | Section | Element]) -> None:
    """Print the parts of a report. A table too wide for the terminal is split into several."""
    for index, part in enumerate(parts):
        if index and isinstance(part, Table) and part.caption:
            console.print()
        if isinstance(part, Section):
            console.print(Text(f"\n{part.title}", style="bold"))
            print_parts(console, part.blocks)
        else:
            for line in _terminal_renderables(part, console.width):
                # Commands are for copying: only the terminal may wrap them.
                console.print(line, soft_wrap=isinstance(part, Code), highlight=False)


def _terminal_renderables(part: Headline | Element, width: int) -> Iterator[RenderableType]:
    match part:
        case Headline():
            style = _STYLES.get(part.kind, "bold yellow")
            yield Text.assemble((f"\n{one_line(part.label)}.", style), f" {one_line(part.sentence)}")
            yield from (Text(one_line(text)) for text in (part.note, part.warning) if text)
        case Paragraph():
            yield Text(one_line(part.text))
        case Bullets():
            yield _build_two_column_grid([("-", item) for item in part.items], gap_width=1)
        case Facts():
            yield _build_two_column_grid(part.rows)
        case Table():
            if part.caption:
                yield Text(one_line(part.caption), style="dim")
            yield from _split_to_width(part, width)
        case Code():
            is_long = part.language == "sh" and len(part.text) > width
            yield Text(re.sub(r"(?<=\S) --set ", " \\\\\n  --set ", part.text) if is_long else part.text)
        case Previews():
            yield from (_format_row_preview(segments, label) for segments, label in part.items)
        case Exchanges():
            for prompt, replies in part.items:
                yield Text(one_line(prompt)[:_SHOWN_LIMIT], style="bold")
                yield _build_two_column_grid([(who, one_line(what)[:_SHOWN_LIMIT]) for who, what in replies])


def _build_two_column_grid(rows: Iterable[tuple[str, str]], gap_width: int = 2) -> Grid:
    grid = Grid.grid(padding=(0, gap_width, 0, 0))
    grid.add_column(max_width=_TEXT_WIDTH, style="dim")
    grid.add_column(overflow="fold")
    for name, text in rows:
        grid.add_row(Text(one_line(name)), Text(one_line(text)))
    return grid


def _split_to_width(table: Table, width: int) -> Iterator[Grid]:
    """Split a table into tables at most `width` characters wide, each with the first column."""
    cells = [[one_line(cell if isinstance(cell, str) else cell.shown_text()) for cell in row] for row in table.rows]
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
        # Gaps are columns, because Rich would add padding behind the last column as well.
        grid = Grid(box=None, pad_edge=False, header_style="dim", padding=0)
        left = width - sum(needed[number] + _GAP for number in group) + _GAP
        for index, number in enumerate(group):
            if index:
                grid.add_column(width=_GAP)
            more = min(max(0, left), widest[number] - needed[number])
            left -= more
            justify: Literal["left", "right"] = "right" if number in table.numeric else "left"
            grid.add_column(Text(headers[number]), justify=justify, overflow="fold", width=needed[number] + more)
        for row in cells:
            grid.add_row(*[text for number in group for text in ("", Text(row[number]))][1:])
        yield grid


def _format_row_preview(segments: Iterable[Segment], label: str | None) -> Text:
    line = Text("  ")
    for segment in segments:
        text = one_line(segment.text)
        text = text if len(text) <= 160 else f"{text[:100]} … {text[-55:]}"
        line.append(f"⟦{text}⟧ " if segment.trained else f"{text} ", style="green" if segment.trained else "dim")
    if label is not None:
        line.append("→ ", style="dim")
        line.append(f"⟦{one_line(label)}⟧", style="green")
    return line
