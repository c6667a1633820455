from __future__ import annotations

from collections.abc import Iterator, Sequence

from fulltune.plan.alternatives import format_flags
from fulltune.plan.choose import PHASE_NAMES
from fulltune.plan.settings import FROM_RECIPE
from fulltune.plan.time import NETWORK
from fulltune.records.plan import MemoryKind, Plan, Setting, Survey, TimeNeed
from fulltune.records.training import Measurements
from fulltune.report.format import words
from fulltune.report.format.blocks import Code, Element, Facts, NameAndValue, Paragraph, Section, Table, TableRow
from fulltune.report.format.words import format_count, format_speed
from fulltune.text import counted, format_bytes, format_seconds, to_yaml

KINDS: tuple[MemoryKind, ...] = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
WIDEST_VALUE = 20


def build_plan_sections(survey: Survey, plan: Plan | None) -> Iterator[Section]:
    yield _section("plan", Facts(tuple(_fit_and_cost_facts(survey, plan))))
    yield _section("inputs", Facts(tuple(_input_facts(survey))))
    if plan is not None:
        yield _section(f"memory of a step, micro batch {plan.micro_batch_size}", *_build_memory_blocks(survey, plan))
    host = "each host" if survey.num_machines > 1 else "the host"
    legend = f"GiB on each device and {host}; batch: rows per pass on each device, * with activation checkpointing"
    yield _section("placements", _build_placement_table(survey), Paragraph(legend))
    if plan is not None:
        if plan.time:
            yield _section("time", Facts(tuple(_time_facts(survey, plan, plan.time))))
        yield _section("settings", *_build_setting_blocks(plan.settings))
    if survey.ways_out:
        yield _section("alternatives", *_build_alternative_blocks(survey))
    advice = tuple((one.verdict, one.method, one.rule) for one in survey.advice)
    title = "method: where to start (sources: docs/evidence.md)"
    yield _section(title, Table("", ("", "method", "why"), advice))
    yield _section("next", *_build_next_commands(survey, plan))


def _section(title: str, *blocks: Element) -> Section:
    return Section(title, title, blocks)


def format_gib(num_bytes: int) -> str:
    if not num_bytes:
        return "–"
    value = num_bytes / 2**30
    if value < 1:
        return f"{value:.2f}" if value >= 0.005 else "<0.01"
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


def _free(num_bytes: int | None) -> str:
    return "free space unknown" if num_bytes is None else f"{format_bytes(num_bytes)} free"


def _fit_and_cost_facts(survey: Survey, plan: Plan | None) -> list[NameAndValue]:
    """List whether the plan fits, its duration and price, or why nothing fits if `plan` is None."""
    if plan is None:
        return [("fits", f"no: {'; '.join(survey.notes[:1])}")]
    peak = f", {format_gib(plan.memory.peak)} of {format_gib(survey.device_free_bytes)} GiB" if plan.memory else ""
    each = f" in each of {plan.num_processes} processes" if peak and plan.num_processes > 1 else ""
    rows = [("fits", f"yes: {plan.method} on {survey.hardware}, {survey.placement or plan.placement}{peak}{each}")]
    if (need := plan.time) is None:
        return [*rows, ("takes", "unknown: the dry run before step 1 measures the speed of this hardware")]
    rows += [("busy", plan.busy)] if plan.busy else []
    rows.append(("takes", f"{format_seconds(need.whole_seconds)} for the whole command, after the rows are prepared"))
    if survey.price is not None:
        hours = survey.num_devices * need.whole_seconds / 3600
        price = f"{survey.price:,.2f} {survey.currency}".rstrip()
        rows.append(("costs", f"{price} for {f'{hours:,.1f}' if hours >= 10 else f'{hours:.2g}'} device hours"))
    return rows


def _input_facts(survey: Survey) -> list[NameAndValue]:
    lengths = survey.length_percentiles
    tokens = f"median {lengths['p50']:,}, 95th percentile {lengths['p95']:,}, longest {lengths['max']:,}"
    # In GiB as everywhere below; for the host also in GB, as hosts are sold and `--for` counts (1 GiB is 1.07 GB).
    host = "each host's" if survey.num_machines > 1 else "the host's"
    free = f"{format_gib(survey.device_free_bytes)} GiB for each process, {format_gib(survey.host_free_bytes)} GiB "
    free += f"({survey.host_free_bytes / 1e9:,.0f} GB) of {host} memory"
    rows = [
        ("model", f"{survey.model_type}, {survey.num_parameters:,} parameters ({format_count(survey.num_parameters)})"),
        ("rows", f"{survey.train_rows:,} train, {survey.eval_rows:,} eval (choose the checkpoint)"),
        ("tokens per row", f"{tokens}; truncated at {survey.max_length:,}"),
        ("hardware", survey.hardware),
        ("free", free),
    ]
    return [*rows, ("assumed", "; ".join(survey.assumptions))] if survey.assumptions else rows


def _build_memory_blocks(survey: Survey, plan: Plan) -> list[Element]:
    need, disk = plan.memory, plan.disk
    kinds = need.kinds if need else {}
    sizes = [format_gib(size) for size in (*(kinds.get(kind, 0) for kind in KINDS), sum(kinds.values()))]
    row = ("device" if plan.device == "cuda" else "memory", *sizes, format_gib(survey.device_free_bytes))
    header = ("GiB", *KINDS, "sum", "of")
    blocks: list[Element] = [Table("", header, (row,), frozenset(range(1, len(header))))]
    if need is not None and need.peak_phase != "step":
        blocks.append(
            Paragraph(f"the peak is outside the step: {PHASE_NAMES[need.peak_phase]}, {format_bytes(need.peak)}")
        )
    models, state = f"models {format_bytes(disk.model)}", plan.stream
    facts = [("disk", f"{models}; {_free(survey.disk_free_bytes)}")]
    if state is None or not state.disk:
        parts = f"{counted(disk.num_checkpoints, 'checkpoint')} x {format_bytes(disk.checkpoint_bytes)}"
        facts = [("disk", f"{parts} + {models} = {format_bytes(disk.total)}; {_free(survey.disk_free_bytes)}")]
    else:
        needed = format_bytes(state.state_bytes + state.gradient_bytes)
        facts.append(("state", f"{needed} in {state.disk}; {_free(state.disk_free_bytes)}"))
    if sent := words.describe_traffic(plan):
        facts.append(("traffic", sent))
    facts += words.describe_stream(plan)
    return [*blocks, Facts(tuple(facts))]


def _build_placement_table(survey: Survey) -> Table:
    rows: list[TableRow] = []
    for placement in survey.placements:
        is_chosen = placement.name == survey.placement
        last = ("", "", (placement.shortage or "").replace(" GiB", ""))
        if placement.fits:
            speed = format_count(placement.tokens_per_second) if placement.tokens_per_second else "?"
            micro = f"{placement.micro_batch_size}{'*' * placement.activation_checkpointing}"
            last = (micro, speed, "chosen" if is_chosen else "fits")
        sizes = map(format_gib, (placement.device_bytes, placement.host_bytes))
        rows.append((f"{'▸ ' * is_chosen}{placement.name}", *sizes, *last))
    header = ("placement", "device", "host", "batch", "tokens/s", "")
    return Table("", header, tuple(rows), frozenset(range(1, len(header) - 1)))


def _time_facts(survey: Survey, plan: Plan, need: TimeNeed) -> list[NameAndValue]:
    batch = f"{plan.micro_batch_size} x {plan.gradient_accumulation_steps} x {plan.num_processes}"
    rows = counted(plan.global_batch_size, "row")
    epochs = f"{plan.num_train_epochs:g} {'epoch' if plan.num_train_epochs == 1 else 'epochs'}"
    steps = f"{plan.total_steps:,} of {rows} ({batch}), {epochs}"
    doubt = "measured on a busy machine, see above" if plan.busy else "can be off by half"
    placed = next((one for one in survey.placements if one.name == survey.placement), None)
    # Shown because a faster network between machines would help.
    waits = f"; a step waits for the {NETWORK}" if placed is not None and placed.bound_by == NETWORK else ""
    parts = {"steps": need.train_seconds, "evaluations": need.eval_seconds, "checkpoints": need.save_seconds}
    training = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in parts.items())
    besides = (f"{name} {format_seconds(seconds)}" for name, seconds in need.overhead_seconds.items())
    return [
        ("steps", f"{steps}, {format_count(need.tokens)} tokens"),
        ("speed", f"{format_speed(need.tokens_per_second)} tokens/s ({need.source}: {doubt}){waits}"),
        ("training", f"{format_seconds(need.total_seconds)}: {training}"),
        ("besides", ", ".join(besides)),
    ]


def _build_setting_blocks(settings: Sequence[Setting]) -> list[Element]:
    reasoned = [one for one in settings if one.reason not in ("default", FROM_RECIPE)]
    rows = [(one.name, to_yaml(one.value), one.reason) for one in reasoned]
    long = [Paragraph(f"{name}: {value} ({why})") for name, value, why in rows if len(value) > WIDEST_VALUE]
    short = tuple(row for row in rows if len(row[1]) <= WIDEST_VALUE)
    blocks = ("method", "train", "evaluate")
    named = [one for one in settings if one.reason == FROM_RECIPE and one.name.partition(".")[0] in blocks]
    from_recipe = [f"{one.name.split('.')[-1]} {to_yaml(one.value)}" for one in named if one.name != "method.kind"]
    defaults = counted(sum(one.is_automatic and one.reason == "default" for one in settings), "default")
    start = f"from the recipe: {', '.join(from_recipe)};" if from_recipe else "and"
    return [Table("", ("chosen", "value", "why"), short), *long, Paragraph(f"{start} {defaults} (--json lists all)")]


def _build_alternative_blocks(survey: Survey) -> list[Element]:
    rows = tuple(
        (f"{number} {way.change}", format_gib(way.frees_bytes), "yes" if way.enough else "no", way.costs)
        for number, way in enumerate(survey.ways_out, 1)
    )
    table = Table("", ("change", "frees GiB", "enough", "costs"), rows, frozenset({1}))
    flags = [
        Code(f"{number}  {flag}", "sh") for number, way in enumerate(survey.ways_out, 1) if (flag := format_flags(way))
    ]
    lead = Paragraph("to plan one of them, add its options to the command (its --for replaces yours):")
    return [table, lead, *flags] if flags else [table]


def _build_next_commands(survey: Survey, plan: Plan | None) -> list[Element]:
    if plan is None:
        return [Paragraph("nothing fits yet; choose one of the alternatives first")]
    blocks: list[Element] = []
    if survey.full_fits:
        where = "with methods: [full, lora] in the recipe instead of method, on one machine, without ZeRO"
        blocks.append(Paragraph(f"to decide on your own rows: fulltune compare, {where}"))
    if survey.command:
        machines = "; RANK numbers the machines from 0, HOST is machine 0" if survey.num_machines > 1 else ""
        blocks += [Paragraph(f"to run this plan{machines}"), Code(survey.command, "sh")]
    return blocks


def build_measured_table(measurements: Measurements) -> Table:
    """Build the table of memory, speed and loss in one measured step per setting."""
    rows = tuple(
        (
            f"{'▸ ' * row.is_best}{row.name}{f': {row.problem}' if row.problem else ''}",
            format_bytes(row.peak_memory_bytes) if row.peak_memory_bytes else "–",
            f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "–",
            # Another micro batch has other rows, so its loss is not comparable.
            "–" if row.loss is None or row.kind == "micro batch" else f"{row.loss:.6f}",
        )
        for row in measurements.rows
    )
    caption = f"measured, one step each; {format_bytes(measurements.available_bytes)} available; ▸: chosen"
    return Table(caption, ("settings", "peak memory", "tokens/s", "loss"), rows, frozenset({1, 2, 3}))
