"""A plan in blocks, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fulltune.plan.choose import PHASE_NAMES
from fulltune.plan.settings import FROM_RECIPE, in_yaml
from fulltune.plan.time import NETWORK
from fulltune.plan.ways_out import as_flags
from fulltune.records.plan import MemoryKind, Plan, Setting, Survey, TimeNeed
from fulltune.records.training import Measurements
from fulltune.report.format import words
from fulltune.report.format.blocks import Code, Element, Facts, Paragraph, Section, Table, TableRow
from fulltune.report.format.words import short_count
from fulltune.text import counted, format_bytes, format_seconds

KINDS: tuple[MemoryKind, ...] = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
WIDEST_VALUE = 20


def sections(survey: Survey, plan: Plan | None) -> Iterator[Section]:
    """The decision, then top down: what there is, what it needs, how long it takes, what was chosen, what else."""
    yield _section("plan", Facts(tuple(_decision(survey, plan))))
    yield _section("found", Facts(tuple(_found(survey))))
    if plan is not None:
        yield _section(f"memory of a step, micro batch {plan.micro_batch_size}", *_memory(survey, plan))
    yield _section("placements", _placements(survey), Paragraph(_legend(survey)))
    if plan is not None:
        if plan.time:
            yield _section("time", Facts(tuple(_time(survey, plan, plan.time))))
        yield _section("settings", *_settings(plan.settings))
    if survey.ways_out:
        yield _section("ways out", *_ways_out(survey))
    advice = tuple((one.verdict, one.method, one.rule) for one in survey.advice)
    title = "method: where to start, not a law (sources: docs/evidence.md)"
    yield _section(title, Table("", ("", "method", "why"), advice))
    yield _section("next", *_what_next(survey, plan))


def _section(title: str, *blocks: Element) -> Section:
    return Section(title, title, blocks)


def gib(num_bytes: int) -> str:
    """GiB with as many digits as say something."""
    if not num_bytes:
        return "–"
    value = num_bytes / 2**30
    if value < 1:
        return f"{value:.2f}" if value >= 0.005 else "<0.01"
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


def _decision(survey: Survey, plan: Plan | None) -> list[tuple[str, str]]:
    if plan is None:
        return [("fits", f"no: {'; '.join(survey.notes[:1])}")]
    peak = f", {gib(plan.memory.peak)} of {gib(survey.device_free_bytes)} GiB" if plan.memory else ""
    each = f" in each of {plan.num_processes} processes" if peak and plan.num_processes > 1 else ""
    rows = [("fits", f"yes: {plan.method} on {survey.hardware}, {survey.placement or plan.placement}{peak}{each}")]
    if (need := plan.time) is None:
        return [*rows, ("takes", "the speed of this hardware is not known; the dry run before step 1 measures it")]
    rows += [("busy", plan.busy)] if plan.busy else []
    rows.append(("takes", f"{format_seconds(need.whole_seconds)} for the whole command, after the rows are prepared"))
    if survey.price is not None:
        hours = survey.num_devices * need.whole_seconds / 3600
        price = f"{survey.price:,.2f} {survey.currency}".rstrip()
        rows.append(("costs", f"{price} for {f'{hours:,.1f}' if hours >= 10 else f'{hours:.2g}'} device hours"))
    return rows


def _found(survey: Survey) -> list[tuple[str, str]]:
    lengths = survey.length_percentiles
    tokens = f"median {lengths['p50']:,}, 95th percentile {lengths['p95']:,}, longest {lengths['max']:,}"
    # In GiB as everywhere below, and of the host also in GB, as hosts and `--for` count: 1 GiB is 1.07 GB.
    host = "each host's" if survey.num_machines > 1 else "the host's"
    free = f"{gib(survey.device_free_bytes)} GiB for each process, {gib(survey.host_free_bytes)} GiB "
    free += f"({survey.host_free_bytes / 1e9:,.0f} GB) of {host} memory"
    rows = [
        ("model", f"{survey.model_type}, {survey.num_parameters:,} parameters ({short_count(survey.num_parameters)})"),
        ("rows", f"{survey.train_rows:,} to train, {survey.eval_rows:,} to choose the checkpoint"),
        ("tokens a row", f"{tokens}; kept up to {survey.max_length:,}"),
        ("hardware", survey.hardware),
        ("free", free),
    ]
    return [*rows, ("assumed", "; ".join(survey.assumptions))] if survey.assumptions else rows


def _memory(survey: Survey, plan: Plan) -> list[Element]:
    need, disk = plan.memory, plan.disk
    kinds = need.kinds if need else {}
    sizes = [gib(size) for size in (*(kinds.get(kind, 0) for kind in KINDS), sum(kinds.values()))]
    row = ("device" if plan.device == "cuda" else "memory", *sizes, gib(survey.device_free_bytes))
    header = ("GiB", *KINDS, "sum", "of")
    blocks: list[Element] = [Table("", header, (row,), frozenset(range(1, len(header))))]
    blocks += [Paragraph(words.at_the_peak(kinds))] if kinds else []
    if need is not None and need.peak_phase != "step":
        blocks.append(Paragraph(f"more than a step needs: {PHASE_NAMES[need.peak_phase]}, {format_bytes(need.peak)}"))
    facts = []
    if disk is not None:
        parts = f"{counted(disk.num_checkpoints, 'checkpoint')} x {format_bytes(disk.one_checkpoint)}"
        parts += f" + models {format_bytes(disk.model)}"
        free = survey.disk_free_bytes
        room = "free space not given" if free is None else f"{format_bytes(free)} free"
        facts.append(("disk", f"{parts} = {format_bytes(disk.total)}; {room}"))
    if sent := words.sent(plan):
        facts.append(("traffic", sent))
    return [*blocks, Facts(tuple(facts))]


def _placements(survey: Survey) -> Table:
    rows: list[TableRow] = []
    for one in survey.placements:
        chosen = one.name == survey.placement
        last = ("", "", (one.shortage or "").replace(" GiB", ""))
        if one.fits:
            speed = short_count(one.tokens_per_second) if one.tokens_per_second else "?"
            micro = f"{one.micro_batch_size}{'*' * one.activation_checkpointing}"
            last = (micro, speed, "chosen" if chosen else "fits")
        rows.append((f"{'▸ ' * chosen}{one.name}", gib(one.device_bytes), gib(one.host_bytes), *last))
    header = ("placement", "device", "host", "batch", "tokens/s", "")
    return Table("", header, tuple(rows), frozenset(range(1, len(header) - 1)))


def _legend(survey: Survey) -> str:
    host = "each host" if survey.num_machines > 1 else "the host"
    return f"GiB on each device, on {host}; batch: rows a pass on each device, * activations recomputed"


def _time(survey: Survey, plan: Plan, need: TimeNeed) -> list[tuple[str, str]]:
    batch = f"{plan.micro_batch_size} x {plan.gradient_accumulation_steps} x {plan.num_processes}"
    rows = counted(plan.global_batch_size, "row")
    epochs = f"{plan.num_train_epochs:g} {'epoch' if plan.num_train_epochs == 1 else 'epochs'}"
    steps = f"{plan.total_steps:,} of {rows} ({batch}), {epochs}"
    doubt = "from a busy machine, see above" if plan.busy else "can be off by half"
    placed = next((one for one in survey.placements if one.name == survey.placement), None)
    # Over several machines more of the network would help.
    waits = f"; a step waits for the {NETWORK}" if placed is not None and placed.bound_by == NETWORK else ""
    parts = {"steps": need.train_seconds, "evaluations": need.eval_seconds, "checkpoints": need.save_seconds}
    training = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in parts.items())
    besides = (f"{name} {format_seconds(seconds)}" for name, seconds in need.around.items())
    return [
        ("steps", f"{steps}, {short_count(need.tokens)} tokens"),
        ("speed", f"{need.tokens_per_second:,.0f} tokens/s ({need.source}: {doubt}){waits}"),
        ("training", f"{format_seconds(need.total_seconds)}: {training}"),
        ("besides", ", ".join(besides)),
    ]


def _settings(settings: Sequence[Setting]) -> list[Element]:
    """Those that were chosen with their reasons; the recipe's own and the defaults in a line."""
    reasoned = [one for one in settings if one.reason not in ("default", FROM_RECIPE)]
    rows = [(one.name, in_yaml(one.value), one.reason) for one in reasoned]
    long = [Paragraph(f"{name}: {value} ({why})") for name, value, why in rows if len(value) > WIDEST_VALUE]
    short = tuple(row for row in rows if len(row[1]) <= WIDEST_VALUE)
    blocks = ("method", "train", "evaluate")
    named = [one for one in settings if one.reason == FROM_RECIPE and one.name.partition(".")[0] in blocks]
    given = [f"{one.name.split('.')[-1]} {in_yaml(one.value)}" for one in named if one.name != "method.kind"]
    defaults = counted(sum(one.is_automatic and one.reason == "default" for one in settings), "default")
    start = f"from the recipe: {', '.join(given)};" if given else "and"
    return [
        Table("", ("chosen", "value", "why"), short),
        *long,
        Paragraph(f"{start} {defaults} (--json lists all)"),
    ]


def _ways_out(survey: Survey) -> list[Element]:
    rows = tuple(
        (f"{number} {way.change}", gib(way.frees_bytes), "yes" if way.enough else "no", way.costs)
        for number, way in enumerate(survey.ways_out, 1)
    )
    table = Table("", ("change", "frees GiB", "enough", "costs"), rows, frozenset({1}))
    flags = [
        Code(f"{number}  {given}", "sh") for number, way in enumerate(survey.ways_out, 1) if (given := as_flags(way))
    ]
    said = Paragraph("to see the plan of one, add to the command (a --for takes the place of yours):")
    return [table, said, *flags] if flags else [table]


def _what_next(survey: Survey, plan: Plan | None) -> list[Element]:
    """The commands that measure what the advice can only guess, and that run the plan."""
    if plan is None:
        return [Paragraph("nothing fits as it is: first take one of the ways out")]
    blocks: list[Element] = []
    if survey.comparison:
        blocks.append(Paragraph("to decide on your own rows: a fair comparison, each method at its best rate"))
        blocks.append(Code(survey.comparison, "sh"))
    elif survey.full_fits:
        where = "with methods: [full, lora] in place of method in the recipe, on one machine, without ZeRO"
        blocks.append(Paragraph(f"to decide on your own rows: fulltune compare, {where}"))
    if survey.command:
        machines = "; RANK counts the machines from 0, HOST is the name of 0" if survey.num_machines > 1 else ""
        blocks += [Paragraph(f"to run this plan{machines}"), Code(survey.command, "sh")]
    return blocks


def measured(found: Measurements) -> Table:
    """Each setting's memory, speed and loss, by a step each; the loss as the difference to the first one that ran."""
    first = next((row.loss for row in found.rows if row.loss is not None), None)
    rows = tuple(
        (
            f"{'▸ ' * row.is_best}{row.name}{f': {row.problem}' if row.problem else ''}",
            format_bytes(row.peak_memory_bytes) if row.peak_memory_bytes else "–",
            f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "–",
            # Of another micro batch it is the loss of other rows.
            "–" if row.loss is None or first is None or row.kind == "micro batch" else _loss(row.loss, first),
        )
        for row in found.rows
    )
    caption = f"measured, one step each; {format_bytes(found.available_bytes)} can be used; ▸: taken"
    return Table(caption, ("settings", "peak memory", "tokens/s", "loss"), rows, frozenset({1, 2, 3}))


def _loss(loss: float, first: float) -> str:
    return f"{loss:.4f}" if loss == first else f"{loss - first:+.1e}"
