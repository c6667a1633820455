"""What `fulltune plan --measure` found, as a table of 80 columns."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from fulltune.records.training import Measured, Measurements
from fulltune.text import format_bytes


def table(found: Measurements) -> Table:
    """Each row's memory, speed and loss; the loss as the difference to the first row that ran."""
    shown = Table(
        title=f"measured, one step each; {format_bytes(found.available_bytes)} can be used",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    shown.add_column("", no_wrap=True, width=1)
    shown.add_column("settings", ratio=1)
    for name in ("peak memory", "tokens/s", "loss"):
        shown.add_column(name, justify="right", no_wrap=True)
    first = next((row.loss for row in found.rows if row.loss is not None), None)
    kind = found.rows[0].kind
    for row in found.rows:
        if row.kind != kind:
            kind = row.kind
            shown.add_section()
        shown.add_row(
            "*" if row.taken else "",
            escape(row.name) + (f"\n[dim]{escape(row.problem)}[/dim]" if row.problem else ""),
            format_bytes(row.peak_memory_bytes) if row.peak_memory_bytes else "–",
            f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "–",
            _loss(row, first),
            style="bold" if row.taken else "dim" if row.problem else None,
        )
    return shown


def _loss(row: Measured, first: float | None) -> str:
    """Of another micro batch it is the loss of other rows."""
    if row.loss is None or first is None or row.kind == "micro batch":
        return "–"
    return f"{row.loss:.4f}" if row.loss == first else f"{row.loss - first:+.1e}"
