"""A plan on the terminal, in 80 columns. Layer 4."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fulltune.plan.choose import DOING
from fulltune.plan.reasons import FROM_RECIPE
from fulltune.plan.ways_out import as_flags
from fulltune.records.plan import MemoryKind, MemoryNeed, Plan, Setting, TimeNeed, TimePart
from fulltune.records.survey import Survey
from fulltune.report.format import words
from fulltune.text import counted, format_bytes, format_seconds

KINDS: tuple[MemoryKind, ...] = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
WIDTH = 80
MARKS = {"take": "[green]take[/green]", "try": "[yellow]try[/yellow]", "leave": "[dim]leave[/dim]"}


def show(console: Console, survey: Survey, plan: Plan | None) -> None:
    """Everything, top down: what was found, what it needs, how long it takes, what was chosen, what else there is."""
    for part in _parts(survey, plan):
        # A command is for copying: the terminal may break its line, nothing else.
        console.print(part, soft_wrap=isinstance(part, Command))


class Command(Text):
    """What is copied: on several lines where it is long, as a shell takes them; `mark` stands before it."""

    def __init__(self, words: str, mark: str = "") -> None:
        short = len(mark) + len(words) <= WIDTH
        super().__init__(mark + (words if short else words.replace(" --set ", " \\\n  --set ")))


def _parts(survey: Survey, plan: Plan | None) -> Iterator[Any]:
    yield _found(survey)
    if plan is not None:
        yield _memory(survey, plan)
    yield _placements(survey)
    if plan is not None:
        yield _time(survey, plan)
        yield _settings(plan.settings)
    if survey.ways_out:
        yield from _ways_out(survey)
    if survey.alternatives:
        yield _alternatives(survey)
    yield _advice(survey)
    yield from _settle(survey, plan)


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
    if value >= 1:
        return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"
    return f"{value:.2f}" if value >= 0.005 else "<0.01"


def for_long(seconds: float) -> str:
    if seconds < 0.5:
        return "under 1 s"
    return format_seconds(round(seconds)) if seconds < 86_400 else f"{seconds / 86_400:,.1f} days"


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
    tokens = f"median {lengths['p50']:,}, 95th percentile {lengths['p95']:,}, longest {lengths['max']:,}"
    # A row is only longer than what is kept where each of its choices is read by itself.
    each = " of each choice" if lengths["max"] > survey.max_length else ""
    rows = [
        ("model", f"{survey.model_type}, {survey.num_parameters:,} parameters ({count(survey.num_parameters)})"),
        ("rows", f"{survey.train_rows:,} to train, {_eval_rows(survey)}"),
        ("tokens a row", f"{tokens}; kept up to {survey.max_length:,}{each}"),
        ("hardware", survey.hardware),
        ("free", _free(survey)),
    ]
    if survey.assumed:
        rows.append(("assumed", "; ".join(survey.assumed)))
    return Group(_head("found"), _facts(rows), "")


def _eval_rows(survey: Survey) -> str:
    words, asked = f"{survey.eval_rows:,} to choose the checkpoint", survey.asked_eval_rows
    return words if asked is None else f"{words} (data.eval_fraction asks for {asked:,}; each label gives a text)"


def _free(survey: Survey) -> str:
    """In GiB as everywhere below, and of the host also in GB, as hosts and `--for` count: 1 GiB is 1.07 GB."""
    host = f"{gib(survey.host_free_bytes)} GiB ({survey.host_free_bytes / 1e9:,.0f} GB) of the host's memory"
    if survey.on_cpu:
        return host
    return f"{gib(survey.device_free_bytes)} GiB on each GPU, {host}"


def _memory(survey: Survey, plan: Plan) -> Group:
    placed = next((one for one in survey.placements if one.name == survey.placement), None)
    kinds = plan.memory.kinds if plan.memory else placed.kinds if placed else {}
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
    on_device = placed is None or not placed.host_bytes
    lines = [] if plan.memory is None else _peak_lines(plan.memory, on_device)
    lines += [] if plan.disk is None else [_disk_line(survey, plan)]
    return Group(_head(f"memory of a step, micro batch {plan.micro_batch_size}"), table, *lines, "")


def _peak_lines(need: MemoryNeed, on_device: bool) -> list[Any]:
    """What a reader of the row would wonder about."""
    lines = []
    if on_device:
        lines.append(Text(f"{words.AT_THE_PEAK}: {words.moment(need.kinds)}", style="dim"))
    if need.peak_phase != "step":
        lines.append(Text(f"more than a step needs: {DOING[need.peak_phase]}, {format_bytes(need.peak)}", style="dim"))
    return lines


def _disk_line(survey: Survey, plan: Plan) -> str:
    disk = plan.disk
    assert disk is not None
    free = "free space not given" if survey.disk_free_bytes is None else f"{format_bytes(survey.disk_free_bytes)} free"
    offloaded = f" + offloaded {format_bytes(disk.offloaded)}" if disk.offloaded else ""
    return (
        f"[dim]disk:[/dim] {counted(disk.num_checkpoints, 'checkpoint')} x {format_bytes(disk.one_checkpoint)} "
        f"+ models {format_bytes(disk.model)}{offloaded} = {format_bytes(disk.total)}; {free}"
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
    if survey.no_sharing:
        legend += f"; {survey.no_sharing}"
    return Group(_head("placements"), table, Text(legend, style="dim"), "")


def _time(survey: Survey, plan: Plan) -> Group:
    need = plan.time
    title = _head("time")
    if need is None:
        return Group(title, "the speed of this hardware is not known; the dry-run step before step 1 measures it", "")
    epochs = "epoch" if plan.num_train_epochs == 1 else "epochs"
    rows = [
        (
            "steps",
            f"{plan.total_steps:,} of {plan.global_batch_size} rows ({plan.micro_batch_size} x "
            f"{plan.gradient_accumulation_steps} x {plan.num_processes}), {plan.num_train_epochs:g} {epochs}, "
            f"{count(need.tokens)} tokens",
        ),
        ("speed", f"{need.tokens_per_second:,.0f} tokens/s ({need.source}: can be off by half)"),
        ("training", f"{for_long(need.total_seconds)}: {_parts_of(need)}"),
    ]
    around = [_around(one) for one in need.around]
    if around:
        left_out = "" if survey.rows_prepared else "; not in this sum: reading and tokenising the rows"
        rows.append(("besides", ", ".join(around)))
        rows.append(("together", f"{for_long(need.whole_seconds)} for the whole command{left_out}"))
    if survey.price is not None:
        hours = survey.num_devices * need.whole_seconds / 3600
        price = f"{survey.price:,.2f} {survey.currency}".rstrip()
        rows.append(("price", f"{price} for {f'{hours:,.1f}' if hours >= 10 else f'{hours:.2g}'} device hours"))
    return Group(title, _facts(rows), "")


def _around(part: TimePart) -> str:
    return f"{part.name} {for_long(part.seconds)}" + (f" ({part.basis})" if part.basis != "arithmetic" else "")


def _parts_of(need: TimeNeed) -> str:
    return (
        f"steps {for_long(need.train_seconds)}, evaluations {for_long(need.eval_seconds)}, checkpoints "
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


def _ways_out(survey: Survey) -> Iterator[Any]:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("ways out", overflow="fold", ratio=1)
    table.add_column("frees GiB", justify="right", no_wrap=True)
    table.add_column("enough", no_wrap=True)
    table.add_column("costs", overflow="fold", ratio=1)
    for number, way in enumerate(survey.ways_out, 1):
        enough = "[green]yes[/green]" if way.enough else "no"
        table.add_row(str(number), escape(way.change), gib(way.frees_bytes), enough, escape(way.costs))
    yield table
    flags = [(number, as_flags(way)) for number, way in enumerate(survey.ways_out, 1)]
    if any(words for _, words in flags):
        yield Text("to see the plan of one, add to the command (--for in place of the one given):", style="dim")
    yield from (Command(words, f"{number}  ") for number, words in flags if words)
    yield ""


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
    return Group(_head("method: where to start, not a law"), table)


def _settle(survey: Survey, plan: Plan | None) -> Iterator[Any]:
    """What decides on one's own rows."""
    if plan is None:
        yield Text("to settle it, first take one of the ways out", style="dim")
        return
    if survey.comparison:
        yield Text("to settle it on your rows: a fair comparison, each method at its best rate", style="dim")
        if survey.comparison_first:
            yield Text(f"(first put '{survey.comparison_first}' in place of 'method' in the recipe)", style="dim")
        yield Command(survey.comparison)
    elif survey.full_fits:
        yield Text("to settle it: fulltune compare, on a placement without DeepSpeed", style="dim")
    else:
        yield Text("full fine-tuning does not fit here: there is nothing to settle by a comparison", style="dim")
    yield Text("this run, with another seed", style="dim")
    yield Command(survey.command)
