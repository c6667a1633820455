"""A plan on the terminal, in 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fulltune.plan.choose import DOING
from fulltune.plan.dotted import in_yaml
from fulltune.plan.reasons import FROM_RECIPE
from fulltune.plan.time import NETWORK
from fulltune.plan.ways_out import as_flags
from fulltune.records.plan import MemoryKind, Plan, Setting
from fulltune.records.survey import Placement, Survey
from fulltune.report.format import words
from fulltune.text import counted, format_bytes, format_seconds

KINDS: tuple[MemoryKind, ...] = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
WIDTH, WIDEST_VALUE = 80, 20
MARKS = {"take": "[green]take[/green]", "try": "[yellow]try[/yellow]", "leave": "[dim]leave[/dim]"}


def show(console: Console, survey: Survey, plan: Plan | None) -> None:
    """The decision, then top down: what was found, what it needs, how long it takes, what was chosen, what else."""
    for part in _parts(survey, plan):
        # A command is for copying: the terminal may break its line, nothing else.
        console.print(part, soft_wrap=isinstance(part, CommandText))


class CommandText(Text):
    """What is copied: on several lines where it is long, as a shell takes them; `mark` stands before it."""

    def __init__(self, words: str, mark: str = "") -> None:
        short = len(mark) + len(words) <= WIDTH
        super().__init__(mark + (words if short else words.replace(" --set ", " \\\n  --set ")))


def _parts(survey: Survey, plan: Plan | None) -> Iterator[Any]:
    yield from _section("plan", _facts(_decision(survey, plan)))
    yield from _section("found", _facts(_found(survey)))
    if plan is not None:
        yield from _section(f"memory of a step, micro batch {plan.micro_batch_size}", *_memory(survey, plan))
    yield from _section("placements", _placements(survey), _dim(_legend(survey)))
    if plan is not None:
        if plan.time:
            yield from _section("time", _facts(_time(survey, plan)))
        yield from (*_settings(plan.settings), "")
    if survey.ways_out:
        yield from (*_ways_out(survey), "")
    if survey.alternatives:
        yield from _section(
            "instead", _facts([(one.kind, f"{one.change}: {one.effect}") for one in survey.alternatives])
        )
    title = "method: where to start, not a law (sources: docs/evidence.md)"
    yield Group(Text(title, style="bold"), _advice(survey))
    yield from _what_next(survey, plan)


def _section(title: str, *parts: Any) -> Iterator[Group]:
    yield Group(Text(title, style="bold"), *parts, "")


def _dim(text: str) -> Text:
    return Text(text, style="dim")


def _facts(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, escape(value))
    return table


def _table(names: Sequence[str], numbers: Sequence[str] = (), last: Sequence[str] = ()) -> Table:
    """Columns of names, of numbers to the right, and of text that may take several lines."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in last:
        table.add_column(name, overflow="fold", ratio=1)
    return table


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
    if value < 1:
        return f"{value:.2f}" if value >= 0.005 else "<0.01"
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


# ---- the parts, top down -----------------------------------------------------------------------------------------


def _decision(survey: Survey, plan: Plan | None) -> list[tuple[str, str]]:
    if plan is None:
        return [("fits", f"no: {'; '.join(survey.notes[:1])}")]
    peak = f", {gib(plan.memory.peak)} of {gib(survey.device_free_bytes)} GiB" if plan.memory else ""
    each = f" in each of {plan.num_processes} processes" if peak and plan.num_processes > 1 else ""
    rows = [("fits", f"yes: {plan.method} on {survey.hardware}, {survey.placement or plan.placement}{peak}{each}")]
    if (need := plan.time) is None:
        return [*rows, ("takes", _NO_TIME)]
    not_counted = "" if survey.rows_prepared else "; without reading and tokenising the rows"
    rows += [("busy", plan.busy)] if plan.busy else []
    rows.append(("takes", f"{format_seconds(need.whole_seconds)} for the whole command{not_counted}"))
    if survey.price is not None:
        hours = survey.num_devices * need.whole_seconds / 3600
        price = f"{survey.price:,.2f} {survey.currency}".rstrip()
        rows.append(("costs", f"{price} for {f'{hours:,.1f}' if hours >= 10 else f'{hours:.2g}'} device hours"))
    fewer = next((one for one in survey.alternatives if one.kind == "cheaper and faster"), None)
    return [*rows, ("but", f"fewer devices are faster: {fewer.change}, {fewer.effect}")] if fewer else rows


def _found(survey: Survey) -> list[tuple[str, str]]:
    lengths = survey.length_percentiles
    # A row is only longer than what is kept where each of its choices is read by itself.
    each = " of each choice" if lengths["max"] > survey.max_length else ""
    held_out = f"{survey.eval_rows:,} to choose the checkpoint"
    if survey.asked_eval_rows is not None:
        held_out += f" (data.eval_fraction asks for {survey.asked_eval_rows:,}; each label gives a text)"
    mixed = f" and {survey.mixed_rows:,} mixed into each epoch" if survey.mixed_rows else ""
    # In GiB as everywhere below, and of the host also in GB, as hosts and `--for` count: 1 GiB is 1.07 GB.
    host = "each host's" if survey.num_machines > 1 else "the host's"
    free = f"{gib(survey.host_free_bytes)} GiB ({survey.host_free_bytes / 1e9:,.0f} GB) of {host} memory"
    if not survey.on_cpu:
        free = f"{gib(survey.device_free_bytes)} GiB on each GPU, {free}"
    rows = [
        ("model", f"{survey.model_type}, {survey.num_parameters:,} parameters ({count(survey.num_parameters)})"),
        ("rows", f"{survey.train_rows:,} to train{mixed}, {held_out}"),
        (
            "tokens a row",
            f"median {lengths['p50']:,}, 95th percentile {lengths['p95']:,}, longest {lengths['max']:,}; kept up to "
            f"{survey.max_length:,}{each}",
        ),
        ("hardware", survey.hardware),
        ("free", free),
    ]
    if not survey.fits:  # else it stands among the settings
        rows.append(("computes in", survey.computes))
    return [*rows, ("assumed", "; ".join(survey.assumed))] if survey.assumed else rows


def _memory(survey: Survey, plan: Plan) -> Iterator[Any]:
    placed = next((one for one in survey.placements if one.name == survey.placement), None)
    kinds = plan.memory.kinds if plan.memory else placed.kinds if placed else {}
    table = _table(["GiB"], [*KINDS, "sum", "of"])
    sizes = [gib(kinds.get(kind, 0)) for kind in KINDS]
    each = "device" if plan.device == "cuda" else "memory"
    table.add_row(each, *sizes, gib(sum(kinds.values())), gib(survey.device_free_bytes))
    on_host = placed.host_bytes if placed else 0
    if on_host:
        table.add_row("host", *[""] * len(KINDS), gib(on_host), gib(survey.host_free_bytes))
    yield table
    need, disk = plan.memory, plan.disk
    if need is not None and not on_host:
        yield _dim(words.at_the_peak(need.kinds))
    if need is not None and need.peak_phase != "step":
        yield _dim(f"more than a step needs: {DOING[need.peak_phase]}, {format_bytes(need.peak)}")
    if disk is not None:
        parts = f"{counted(disk.num_checkpoints, 'checkpoint')} x {format_bytes(disk.one_checkpoint)}"
        parts += f" + models {format_bytes(disk.model)}"
        parts += f" + offloaded {format_bytes(disk.offloaded)}" if disk.offloaded else ""
        free = survey.disk_free_bytes
        room = "free space not given" if free is None else f"{format_bytes(free)} free"
        yield f"[dim]disk:[/dim] {parts} = {format_bytes(disk.total)}; {room}"
    if sent := words.sent(plan):
        yield f"[dim]traffic:[/dim] {sent}"


def _placements(survey: Survey) -> Table:
    table = _table(["", "placement"], ["device", "host", "disk", "batch", "tokens/s"])
    table.add_column("", overflow="fold")
    for one in survey.placements:
        chosen = one.name == survey.placement
        speed = count(one.tokens_per_second) if one.tokens_per_second else "?"
        micro = f"{one.micro_batch_size}{'*' if one.activation_checkpointing else ''}"
        sizes = (gib(one.device_bytes), gib(one.host_bytes), gib(one.disk_bytes))
        table.add_row(
            "[green]>[/green]" if chosen else "",
            one.name,
            *sizes,
            *((micro, speed) if one.fits else ("", "")),
            _verdict(one, chosen),
            style="bold" if chosen else None if one.fits and one.runs else "dim",
        )
    return table


def _verdict(one: Placement, chosen: bool) -> str:
    if not one.fits:
        return f"[red]{escape(one.short.replace(' GiB', ''))}[/red]"
    if not one.runs:
        return "[yellow]not built yet[/yellow]"
    if chosen:
        return "[green]chosen[/green]"
    return "[yellow]needs a folder[/yellow]" if one.needs else "fits"


def _legend(survey: Survey) -> str:
    host = "each host" if survey.num_machines > 1 else "the host"
    legend = f"GiB on each device, on {host}, on disk; batch: rows a pass on each device"
    if any(one.activation_checkpointing and one.fits for one in survey.placements):
        legend += ", * activations recomputed"
    return f"{legend}; {survey.no_sharing}" if survey.no_sharing else legend


_NO_TIME = "the speed of this hardware is not known; the dry-run step before step 1 measures it"


def _time(survey: Survey, plan: Plan) -> list[tuple[str, str]]:
    need = plan.time
    assert need is not None
    batch = f"{plan.micro_batch_size} x {plan.gradient_accumulation_steps} x {plan.num_processes}"
    epochs = f"{plan.num_train_epochs:g} {'epoch' if plan.num_train_epochs == 1 else 'epochs'}"
    doubt = "from a busy machine, see above" if plan.busy else "can be off by half"
    training = f"steps {format_seconds(need.train_seconds)}, evaluations {format_seconds(need.eval_seconds)}"
    rows = [
        (
            "steps",
            f"{plan.total_steps:,} of {counted(plan.global_batch_size, 'row')} ({batch}), {epochs}, "
            f"{count(need.tokens)} tokens",
        ),
        ("speed", f"{need.tokens_per_second:,.0f} tokens/s ({need.source}: {doubt}){_bound(survey)}"),
        (
            "training",
            f"{format_seconds(need.total_seconds)}: {training}, checkpoints {format_seconds(need.save_seconds)}",
        ),
    ]
    if need.around:
        parts = [
            f"{one.name} {format_seconds(one.seconds)}" + (f" ({one.basis})" if one.basis != "arithmetic" else "")
            for one in need.around
        ]
        rows.append(("besides", ", ".join(parts)))
    return rows


def _bound(survey: Survey) -> str:
    """What a step over several machines waits for, where that is their network: more of it would help."""
    placed = next((one for one in survey.placements if one.name == survey.placement), None)
    return f"; a step waits for the {NETWORK}" if placed is not None and placed.bound_by == NETWORK else ""


def _settings(settings: Sequence[Setting]) -> Iterator[Any]:
    """Those that were chosen with their reasons; the recipe's own and the defaults in a line each."""
    table, lines = _table(["chosen", "value"], last=["why"]), []
    for one in settings:
        value = in_yaml(one.value)
        if one.reason in ("default", FROM_RECIPE):
            continue
        if len(value) <= WIDEST_VALUE:
            table.add_row(one.name, escape(value), escape(one.reason))
        else:
            lines.append(Text(f"{one.name}: {value} ({one.reason})"))
    yield from (table, *lines)
    blocks = ("method", "train", "evaluate")
    named = [one for one in settings if one.reason == FROM_RECIPE and one.name.partition(".")[0] in blocks]
    given = [f"{one.name.split('.')[-1]} {in_yaml(one.value)}" for one in named if one.name != "method.kind"]
    defaults = counted(sum(one.chosen and one.reason == "default" for one in settings), "default")
    start = f"from the recipe: {', '.join(given)};" if given else "and"
    yield _dim(f"{start} {defaults} (--json lists all)")


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
    flags = {number: words for number, way in enumerate(survey.ways_out, 1) if (words := as_flags(way))}
    if flags:
        yield _dim("to see the plan of one, add to the command (a --for takes the place of yours):")
    yield from (CommandText(words, f"{number}  ") for number, words in flags.items())


def _advice(survey: Survey) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for one in survey.advice:
        table.add_row(MARKS[one.verdict], one.method, Text(one.rule))
    return table


def _what_next(survey: Survey, plan: Plan | None) -> Iterator[Text]:
    """The commands that measure what the advice can only guess, and that run the plan."""
    if plan is None:
        yield _dim("nothing fits as it is: first take one of the ways out")
        return
    if survey.comparison:
        yield _dim("to decide on your own rows: a fair comparison, each method at its best rate")
        if survey.comparison_first:
            yield _dim(f"(first put '{survey.comparison_first}' in place of 'method' in the recipe)")
        yield CommandText(survey.comparison)
    elif survey.full_fits:
        where = "one machine" if survey.num_machines > 1 else "a placement without DeepSpeed"
        yield _dim(f"to decide on your own rows: fulltune compare, on {where}")
    else:
        yield _dim("full fine-tuning does not fit here: there is nothing to compare with")
    here = " (without train.seed: in this run folder)" if survey.rows_prepared and not survey.settings else ""
    yield _dim(f"to run this plan with another seed{here}")
    if survey.num_machines > 1:
        machines = f"on each of the {survey.num_machines} machines"
        yield _dim(f"({machines}, in a folder that all see; RANK counts them from 0, HOST is 0's name)")
    yield CommandText(survey.command)
