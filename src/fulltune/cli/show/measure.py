"""What `fulltune plan --measure` found, as a table of 80 columns. Layer 4."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from fulltune.records.training import Measured, Measurements
from fulltune.text import in_words


def table(found: Measurements) -> Table:
    """Each row's memory, speed and loss; the loss as the difference to the first row that ran."""
    made = Table(
        title=f"measured, one step each; {in_words(found.available_bytes)} can be used",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    made.add_column("", no_wrap=True, width=1)
    made.add_column("settings", ratio=1)
    made.add_column("peak memory", justify="right", no_wrap=True)
    made.add_column("tokens/s", justify="right", no_wrap=True)
    made.add_column("loss", justify="right", no_wrap=True)
    first = next((row.loss for row in found.rows if row.loss is not None), None)
    kind = found.rows[0].kind
    for row in found.rows:
        if row.kind != kind:
            kind = row.kind
            made.add_section()
        made.add_row(*_cells(row, first), style="bold" if row.taken else "dim" if row.problem else None)
    return made


def _cells(row: Measured, first_loss: float | None) -> tuple[str, ...]:
    name = escape(row.name) + (f"\n[dim]{escape(row.problem)}[/dim]" if row.problem else "")
    return (
        "*" if row.taken else "",
        name,
        in_words(row.peak_memory_bytes) if row.peak_memory_bytes else "–",
        f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "–",
        _loss(row, first_loss),
    )


def _loss(row: Measured, first: float | None) -> str:
    """Of another micro batch it is the loss of other rows."""
    if row.loss is None or first is None or row.kind == "micro batch":
        return "–"
    return f"{row.loss:.4f}" if row.loss == first else f"{row.loss - first:+.1e}"
