"""A plan on the terminal, in 80 columns. Layer 4."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fulltune.display import duration, size
from fulltune.plan.ledger import FROM_RECIPE
from fulltune.records import MemoryKind, Plan, Setting, Survey, TimeNeed
from fulltune.report import words

KINDS: tuple[MemoryKind, ...] = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
MARKS = {"take": "[green]take[/green]", "try": "[yellow]try[/yellow]", "leave": "[dim]leave[/dim]"}


def show(console: Console, survey: Survey, plan: Plan | None) -> None:
    """Everything, top down: what was found, what it needs, how long it takes, what was chosen, what else there is."""
    for part in _parts(survey, plan):
        console.print(part)


def _parts(survey: Survey, plan: Plan | None) -> Iterator[Any]:
    yield _found(survey)
    if plan is not None:
        yield _memory(survey, plan)
    yield _placements(survey)
    if plan is not None:
        yield _time(survey, plan)
        yield _settings(plan.settings)
    if survey.ways_out:
        yield _ways_out(survey)
    if survey.alternatives:
        yield _alternatives(survey)
    yield _advice(survey)


def count(number: float) -> str:
    """`6.7 B`, `22.7 M`, `950`."""
    for power, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= power:
            return f"{number / power:,.1f} {letter}"
    return f"{number:,.0f}"


def gib(num_bytes: int) -> str:
    """GiB with as many digits as say something."""
    if not num_bytes:
        return "–"
    value = num_bytes / 2**30
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}" if value >= 1 else f"{value:.2f}"


def for_long(seconds: float) -> str:
    return duration(seconds) if seconds < 86_400 else f"{seconds / 86_400:,.1f} days"


def _head(title: str) -> Text:
    return Text(title, style="bold")


def _facts(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, escape(value))
    return table


def _found(survey: Survey) -> Group:
    lengths = survey.length_percentiles
    tokens = f"{lengths['p50']:,} in the median, {lengths['p95']:,} for 95 %, {lengths['max']:,} at most"
    rows = [
        ("model", f"{survey.model_type}, {survey.num_parameters:,} parameters ({count(survey.num_parameters)})"),
        ("rows", f"{survey.train_rows:,} to train, {survey.eval_rows:,} to choose the checkpoint"),
        ("tokens a row", f"{tokens}; kept {survey.max_length:,}"),
        ("hardware", survey.hardware),
    ]
    if survey.assumed:
        rows.append(("assumed", "; ".join(survey.assumed)))
    return Group(_head("found"), _facts(rows), "")


def _memory(survey: Survey, plan: Plan) -> Group:
    placed = next((one for one in survey.placements if one.name == survey.placement), None)
    kinds = placed.kinds if placed else plan.memory.kinds if plan.memory else {}
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("GiB")
    for kind in KINDS:
        table.add_column(kind, justify="right", no_wrap=True)
    table.add_column("sum", justify="right", no_wrap=True)
    table.add_column("of", justify="right", no_wrap=True)
    each = "device" if plan.device == "cuda" else "memory"
    total = sum(kinds.values())
    table.add_row(each, *(gib(kinds.get(kind, 0)) for kind in KINDS), gib(total), gib(survey.device_free_bytes))
    if placed and placed.host_bytes:
        table.add_row("host", *[""] * len(KINDS), gib(placed.host_bytes), gib(survey.host_free_bytes))
    disk = [] if plan.disk is None else [_disk_line(survey, plan)]
    at = [f"[dim]{words.AT_THE_PEAK}: {words.moment(kinds)}[/dim]"] if kinds else []
    return Group(_head(f"memory of a step, micro batch {plan.micro_batch_size}"), table, *at, *disk, "")


def _disk_line(survey: Survey, plan: Plan) -> str:
    disk = plan.disk
    assert disk is not None
    free = "free: not said" if survey.disk_free_bytes is None else f"{size(survey.disk_free_bytes)} free"
    offloaded = f" + offloaded {size(disk.offloaded)}" if disk.offloaded else ""
    return (
        f"[dim]disk:[/dim] {disk.num_checkpoints} checkpoints x {size(disk.one_checkpoint)} + models "
        f"{size(disk.model)}{offloaded} = {size(disk.total)}; {free}"
    )


def _placements(survey: Survey) -> Group:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True, width=1)
    table.add_column("placement", no_wrap=True)
    for name in ("device", "host", "disk", "batch", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for one in survey.placements:
        chosen = one.name == survey.placement
        speed = count(one.tokens_per_second) if one.tokens_per_second else "?"
        micro = f"{one.micro_batch_size}{'*' if one.activation_checkpointing else ''}"
        if not one.fits:
            verdict, micro, speed = f"[red]{escape(one.short.replace(' GiB', ''))}[/red]", "", ""
        elif not one.runs:
            verdict = "[yellow]not built yet[/yellow]"
        elif one.needs and not chosen:
            verdict = "[yellow]needs nvme_path[/yellow]"
        else:
            verdict = "[green]chosen[/green]" if chosen else "fits"
        table.add_row(
            "[green]>[/green]" if chosen else "",
            one.name,
            gib(one.device_bytes),
            gib(one.host_bytes),
            gib(one.disk_bytes),
            micro,
            speed,
            verdict,
            style="bold" if chosen else None if one.fits and one.runs else "dim",
        )
    legend = "GiB on each device, on the host, on disk; batch: rows a pass on each device"
    if any(one.activation_checkpointing and one.fits for one in survey.placements):
        legend += ", * activations recomputed"
    return Group(_head("placements"), table, Text(legend, style="dim"), "")


def _time(survey: Survey, plan: Plan) -> Group:
    need = plan.time
    title = _head("time")
    if need is None:
        return Group(title, "the speed of this hardware is not known; the dry-run step before step 1 measures it", "")
    rows = [
        (
            "steps",
            f"{plan.total_steps:,} of {plan.global_batch_size} rows ({plan.micro_batch_size} x "
            f"{plan.gradient_accumulation_steps} x {plan.num_processes}), {plan.num_train_epochs:g} epochs, "
            f"{count(need.tokens)} tokens",
        ),
        ("speed", f"{need.tokens_per_second:,.0f} tokens/s ({need.source}: can be off by half)"),
        ("together", f"{for_long(need.total_seconds)}: {_parts_of(need)}"),
    ]
    if survey.price is not None:
        hours = survey.num_devices * need.total_seconds / 3600
        rows.append(("price", f"{survey.price:,.2f} {survey.currency}".rstrip() + f" for {hours:,.1f} device hours"))
    return Group(title, _facts(rows), "")


def _parts_of(need: TimeNeed) -> str:
    return (
        f"training {for_long(need.train_seconds)}, evaluation {for_long(need.eval_seconds)}, checkpoints "
        f"{for_long(need.save_seconds)}"
    )


WIDEST_VALUE = 20


def _settings(settings: Sequence[Setting]) -> Group:
    """Those that were chosen with their reasons; the recipe's own and the defaults in a line each."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("chosen", no_wrap=True)
    table.add_column("value", no_wrap=True)
    table.add_column("why", overflow="fold", ratio=1)
    lines = []
    for one in settings:
        if one.reason in ("default", FROM_RECIPE):
            continue
        value = _value(one.value)
        if len(value) <= WIDEST_VALUE:
            table.add_row(one.name, escape(value), escape(one.reason))
        else:
            lines.append(Text(f"{one.name}: {value} ({one.reason})"))
    named = [
        one
        for one in settings
        if one.reason == FROM_RECIPE and one.name.split(".")[0] in ("method", "train", "evaluate")
    ]
    given = ", ".join(f"{one.name.split('.')[-1]} {_value(one.value)}" for one in named if one.name != "method.kind")
    defaults = sum(1 for one in settings if one.chosen and one.reason == "default")
    rest = f"from the recipe: {given}; {defaults} defaults" if given else f"and {defaults} defaults"
    return Group(table, *lines, Text(f"{rest} (--json lists all)", style="dim"), "")


def _value(value: Any) -> str:
    """As YAML would have it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_value(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _ways_out(survey: Survey) -> Group:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("ways out", overflow="fold")
    table.add_column("frees GiB", justify="right", no_wrap=True)
    table.add_column("enough", no_wrap=True)
    table.add_column("costs", overflow="fold")
    for way in survey.ways_out:
        enough = "[green]yes[/green]" if way.enough else "no"
        table.add_row(escape(way.change), gib(way.frees_bytes), enough, escape(way.costs))
    return Group(table, "")


def _alternatives(survey: Survey) -> Group:
    rows = [(one.kind, f"{one.change}: {one.effect}") for one in survey.alternatives]
    return Group(_head("instead"), _facts(rows), "")


def _advice(survey: Survey) -> Group:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for one in survey.advice:
        text = Text(f"{one.rule}. ")
        text.append(one.evidence, style="dim")
        table.add_row(MARKS[one.verdict], one.method, text)
    settle = f"{survey.command}, and with other seeds" if survey.fits else "first take one of the ways out"
    measure = Text(f"to settle it: {settle}; a run of LoRA beside it is planned, not built", style="dim")
    return Group(_head("method: where to start, not a law"), table, measure)
