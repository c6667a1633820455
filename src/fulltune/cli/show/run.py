"""What a person sees while a run works: a live line on a terminal, plain lines elsewhere. All on stderr."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from fulltune.cli.show import compare
from fulltune.records.audit import Audit, Proofs
from fulltune.records.data import DataSummary, Preview
from fulltune.records.events import (
    OF_GENERIC_TEXT,
    AttemptFailed,
    Certified,
    ChecksDone,
    DataPrepared,
    Designed,
    Evaluated,
    Event,
    Forecast,
    PhaseBegan,
    Planned,
    Resumed,
    RowsPrepared,
    RowsRead,
    Said,
    StepLogged,
    StepSkipped,
    Warned,
)
from fulltune.records.plan import Plan
from fulltune.records.scores import Estimate, Scores
from fulltune.records.training import Check
from fulltune.report.format import terminal
from fulltune.report.format.blocks import Headline
from fulltune.report.format.words import metric_name
from fulltune.report.run.about_forgetting import verdict
from fulltune.report.run.about_scores import without_leaks
from fulltune.report.run.data_page import about_labels, about_proofs, proof_rows
from fulltune.report.run.row_words import has_images, mixed_words, row_words
from fulltune.text import counted, first_few, format_bytes, format_metric, format_seconds, is_share

if TYPE_CHECKING:
    from fulltune.doctor import Diagnosis
    from fulltune.selfcheck import Page


_MOST_ROWS = 8
"""Of a skipped step."""


class Display:
    """Listens to a run's events.

    Args:
        console: Where to write; a terminal gets a live line.
        details: Also print tables (data, checks, plan).
    """

    def __init__(self, console: Console, details: bool = True) -> None:
        self.console = console
        self.details = details
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.metric = ""
        self.last_metric = ""
        self.last_line = 0.0
        self.total_steps = 0
        self.rows_of = ""
        self.summary: DataSummary | None = None
        self.rows_began = 0.0

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[facts]}"),
                console=self.console,
                transient=True,
            )
            self.progress.start()
            self.task = self.progress.add_task("starting", total=None, facts="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case PhaseBegan(name=name):
                self._phase(name)
            case RowsPrepared():
                self._prepared(event)
            case RowsRead():
                self._rows(event)
            case StepLogged():
                self._step(event)
            case Evaluated():
                self._eval(event)
            case DataPrepared():
                self._data(event.summary, event.is_known)
            case Planned(plan=plan):
                self.metric = plan.metric
                self._plan(plan)
            case ChecksDone(checks=checks):
                self._checks(checks)
            case Forecast():
                self._forecast(event)
            case Said(text=text):
                self.print(escape(text))
            case Designed(expectation=expectation, metric=metric, margin=margin):
                terminal.show(self.console, [compare.expectation(expectation, metric, margin)])
            case Resumed(step=step):
                self.print(f"continuing from the checkpoint of step {step}")
            case Certified(preserved=preserved):
                self.print(escape(verdict(preserved)))
            case AttemptFailed(reason=reason):
                self.print(f"[yellow]next attempt:[/yellow] {escape(reason)}")
            case StepSkipped(step=step, reason=reason, rows=rows):
                named = first_few([f"{row + 1:,}" for row in rows], _MOST_ROWS)
                self.print(f"[yellow]step {step}: skipped:[/yellow] {escape(reason)}; train rows {named}")
            case Warned(text=text):
                self.print(f"[yellow]{escape(text)}[/yellow]")

    def print(self, what: Any) -> None:
        self.console.print(what)

    def _phase(self, name: str) -> None:
        self.last_line = time.monotonic()
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, description=name, total=None, facts="")
        else:
            self.print(f"[dim]{name}[/dim]")

    def _prepared(self, event: RowsPrepared) -> None:
        done, total = event.done, event.total
        facts = f"{done:,} of {total:,} rows"
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, description=event.name, completed=done, total=total, facts=facts)
        elif time.monotonic() - self.last_line > 5:
            self.last_line = time.monotonic()
            self.print(f"[dim]{event.name}: {facts}[/dim]")

    def _rows(self, event: RowsRead) -> None:
        """Rows that a model reads outside of training: on a terminal only, logs have the phases."""
        if self.progress is None or self.task is None:
            return
        now = time.monotonic()
        if event.done == 0 or event.name != self.rows_of:
            self.rows_of, self.rows_began = event.name, now
        share = event.share
        facts = f"{event.done:,} rows" if event.total is None else f"{event.done:,} of {event.total:,} rows"
        if share and share < 1:
            facts += f", {format_seconds(round((now - self.rows_began) * (1 - share) / share))} left"
        total = None if event.total is None else 1.0
        self.progress.update(self.task, description=event.name, completed=share or 0.0, total=total, facts=facts)

    def _step(self, event: StepLogged) -> None:
        # Images have no tokens.
        speed = f"{event.tokens_per_second:,.0f} tok/s  " if event.tokens_per_second else ""
        facts = f"loss {event.loss:.3f}{self.last_metric}  {speed}{format_seconds(round(event.seconds_left))} left"
        step, total = event.step, event.total_steps
        if self.progress is not None and self.task is not None:
            self.progress.update(
                self.task, description=f"step {step}/{total}", completed=step, total=total, facts=facts
            )
        elif time.monotonic() - self.last_line > 5 or step in (1, total):
            self.last_line = time.monotonic()
            self.print(f"step {step}/{total}  {facts}")

    def _eval(self, event: Evaluated) -> None:
        metrics = event.metrics
        names = [name for name in metrics if name not in (self.metric, *OF_GENERIC_TEXT)]
        shown = [self.metric, *names[: 1 if "drift" in metrics else 2], "drift"]
        values = "  ".join(f"{name} {format_metric(name, metrics[name])}" for name in shown if name in metrics)
        if self.metric in metrics:
            self.last_metric = f"  eval {self.metric} {format_metric(self.metric, metrics[self.metric])}"
        self.print(f"step {event.step:>5}  epoch {event.epoch:.2f}  eval {values}")

    def _data(self, summary: DataSummary, is_known: bool) -> None:
        """All of it when it is new; of a run that goes on, the numbers of rows."""
        self.summary = summary
        if self.details and is_known:
            rows = ", ".join(f"{split.rows:,} {name}" for name, split in summary.splits.items())
            self.print(f"[dim]rows as before: {rows}[/dim]")
        elif self.details:
            show_data(self.console, summary)

    def _plan(self, plan: Plan) -> None:
        if self.details:
            trained = f"{plan.num_trainable_parameters:,} trained" if plan.num_frozen_parameters else "all trained"
            self.print(
                f"{plan.trial}: {plan.num_parameters:,} parameters, {trained}; {plan.total_steps} steps of "
                f"{plan.global_batch_size} rows ({plan.micro_batch_size} x {plan.gradient_accumulation_steps} x "
                f"{plan.num_processes}), learning rate {plan.learning_rate:g}, {plan.precision} on {plan.device}, "
                f"state {format_bytes(plan.state.total)}"
            )
            if plan.busy:
                self.print(f"[yellow]{escape(plan.busy)}[/yellow]")
            for line in mixed_words(self.summary, plan.num_train_epochs) if self.summary else ():
                self.print(f"mixed in: {escape(line)}")

    def _checks(self, checks: Sequence[Check]) -> None:
        table = Table(title="checks before step 1", title_justify="left", box=None, show_header=False, pad_edge=False)
        for check in checks:
            mark = "[green]ok[/green]" if check.passed else "[red]refused[/red]"
            table.add_row(mark, check.name, escape(check.result))
        self.print(table)

    def _forecast(self, event: Forecast) -> None:
        memory = f", about {format_bytes(event.peak_memory_bytes)} of memory" if event.peak_memory_bytes else ""
        self.print(
            f"training, with its evaluations and checkpoints, will take about "
            f"{format_seconds(round(event.total_seconds))}{memory} (from the dry run)"
        )
        if scoring := [part.seconds for part in event.around]:
            each = format_seconds(max(1, round(sum(scoring))))
            said = f"scoring a model on the test rows then takes about {each}, without generated answers"
            self.print(f"[dim]{said}[/dim]")


def data_table(summary: DataSummary) -> Table:
    """Rows of the three splits."""
    labels = f", {len(summary.labels)} labels" if summary.labels else ""
    images = has_images(summary)
    longest = "" if images else f"; {row_words(summary).longest} kept {summary.max_length} tokens"
    title = f"data: {row_words(summary).kind}{labels}{longest}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    counts = () if images else ("tokens", "p50/p95/max", "cut")
    for column in ("split", f"{row_words(summary).row}s", *counts, "dropped", "from"):
        table.add_column(column, justify="left" if column in ("split", "from") else "right")
    mixed = [("mixed in", source.counts, f"file {source.where}") for source in summary.mixed]
    for name, split, source in [
        *((name, split, summary.sources[name]) for name, split in summary.splits.items()),
        *mixed,
    ]:
        lengths = "/".join(str(split.length_percentiles[key]) for key in ("p50", "p95", "max"))
        table.add_row(
            name,
            f"{split.rows:,}",
            *(() if images else (f"{split.tokens:,}", lengths, str(split.truncated_rows))),
            str(split.dropped_rows),
            escape(source),
        )
    return table


def show_data(console: Console, summary: DataSummary) -> None:
    """How many rows of which lengths, a line for each source that is mixed in, and some rows as the model sees them."""
    console.print(data_table(summary))
    for preview in summary.previews:
        console.print(_in_brackets(preview))
    for line, source in zip(mixed_words(summary), summary.mixed, strict=True):
        console.print(f"mixed in: {escape(line)}")
        for preview in source.previews:
            console.print(_in_brackets(preview))
    for note in summary.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}")


def show_audit(console: Console, audit: Audit) -> None:
    """What each check found, with a row of it, and how far the suspicion about labels can be trusted."""
    if not audit.checks:
        console.print(f"audit: none of {counted(len(audit.clean), 'check')} found anything")
    else:
        table = Table(title="audit: rows that look wrong", title_justify="left", box=None, header_style="dim")
        for column in ("check", "rows", "for example"):
            table.add_column(column, justify="right" if column == "rows" else "left")
        for found in audit.checks:
            first = found.examples[0]
            table.add_row(found.check, f"{found.rows:,}", escape(f"{first.place}: {first.reason}"))
        console.print(table)
    if audit.labels is not None:
        console.print(escape(about_labels(audit.labels)))
    for check, why in audit.not_run.items():
        console.print(f"not looked at: {escape(f'{check}: {why}')}")


def show_proofs(console: Console, proofs: Proofs) -> None:
    """What each cleaning step does to classifiers on the untouched model, or to trained models."""
    console.print(f"would cleaning help? {about_proofs(proofs)}")
    table = Table(box=None, header_style="dim")
    name, difference = metric_name(proofs.metric), "points" if is_share(proofs.metric) else "difference"
    for column in ("check", "its rows", "rows", name, difference, ""):
        is_number = column in ("rows", name, difference)
        table.add_column(column, justify="right" if is_number else "left", no_wrap=is_number)
    for row in proof_rows(proofs):
        table.add_row(*row)
    console.print(table)


def _in_brackets(preview: Preview) -> Text:
    """A row decoded from its tokens; what is trained stands in ⟦brackets⟧ and green."""
    line = Text("  ")
    for segment in preview.segments:
        words = " ".join(segment.text.split())
        words = words if len(words) <= 160 else words[:100] + " … " + words[-55:]
        line.append(f"⟦{words}⟧" if segment.trained else words, style="green" if segment.trained else "dim")
        line.append(" ")
    if preview.label is not None:
        line.append("→ ", style="dim")
        line.append(f"⟦{preview.label}⟧", style="green")
    return line


def scores_table(scores: Sequence[Scores], summary: DataSummary) -> Group:
    """Every contestant on the test rows, with intervals."""
    first = scores[0]
    # Two metrics are what 80 columns hold; the report has all.
    present = {name for entry in scores for name in entry.metrics} - {first.main_metric}
    second = next(
        (name for name in ("f1_macro", "rougeL", "token_accuracy", "r2", "exact_match", "loss") if name in present),
        None,
    )
    shown = [first.main_metric, *([second] if second else [])]
    title = (
        f"{max(entry.rows for entry in scores):,} test rows, never used for choosing; {first.confidence:.0%} intervals"
    )
    if first.answers:
        title += f"\nanswers generated for {len(first.answers)} of them, drawn at random"
    table = Table(pad_edge=False)
    table.add_column("")
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for entry in scores:
        cells = [_cell(name, entry.metrics.get(name)) for name in shown]
        table.add_row(escape(entry.name), *cells, style="bold" if entry.kind == "trained" else None)
    below = [without_leaks(scores, summary), *{entry.left_out: 0 for entry in scores}]
    # Above the table, not as its title: that would be wrapped to the width of the table.
    return Group(title, table, *(Text(said) for said in below if said))


def answers(scores: Sequence[Scores], count: int = 3) -> list[Text]:
    """The first generated answers, before and after training."""
    with_answers = [entry for entry in scores if entry.answers]
    lines = []
    for position in range(min(count, *(len(entry.answers) for entry in with_answers)) if with_answers else 0):
        first = with_answers[0].answers[position]
        asked = " ".join(first.text.split())
        lines.append(Text(f"\n{asked[:300]}", style="bold"))
        for entry in with_answers:
            when = "before" if entry.kind == "untouched" else "after"
            lines.append(Text(f"  {when:<9}{' '.join(entry.answers[position].predicted.split())[:300]}"))
        lines.append(Text(f"  {'expected':<9}{' '.join(first.expected.split())[:300]}", style="dim"))
    return lines


def conclusion(headline: Headline, unfit: str, steps: Sequence[str]) -> list[Text | Table]:
    """The verdict in words, how the run fits its rows, and what to change where training was not worth it."""
    styles = {"better": "bold green", "worse": "bold red"}
    lines: list[Text | Table] = [
        Text.assemble((f"{headline.label}.", styles.get(headline.kind, "bold yellow")), f" {headline.brief}")
    ]
    if headline.note:
        lines.append(Text(headline.note))
    if unfit:
        lines.append(Text(unfit))
    if steps:
        lines.append(Text("What to do next, the same recipe with one change at a time:"))
        table = Table.grid(padding=(0, 1))
        for step in steps:
            table.add_row("  -", Text(step))
        lines.append(table)
    return lines


def findings(found: Sequence[Diagnosis]) -> Table:
    """What a log tells, each with its evidence and what to do."""
    table = Table.grid(padding=(0, 2))
    for one in found:
        style = "green" if one.name == "sound" else "bold yellow"
        table.add_row(Text(one.name, style=style), Text(one.evidence))
        if one.advice:
            table.add_row("", Text(f"→ {one.advice}"))
    return table


def selfcheck_table(page: Page) -> Group:
    """What is here, and what every check on every device found; fits 80 columns."""
    facts = Table.grid(padding=(0, 2))
    for name, value in page.environment.items():
        facts.add_row(Text(name, style="dim"), escape(value))
    table = Table(pad_edge=False, box=None, header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("what was run", ratio=1)
    table.add_column("result", ratio=1)
    table.add_column("s", justify="right", no_wrap=True)
    styles = {"pass": "green", "fail": "bold red", "not here": "dim"}
    device = ""
    for finding in page.findings:
        if finding.device != device:
            device = finding.device
            table.add_row("", f"[bold]on {device}[/bold]", "", "")
        mark = "FAIL" if finding.status == "fail" else finding.status
        cells = (escape(finding.ran), escape(finding.result), f"{finding.seconds:.1f}")
        style = "dim" if finding.status == "not here" else None
        table.add_row(f"[{styles[finding.status]}]{mark}[/]", *cells, style=style)
    return Group(facts, "", table, "")


def _cell(name: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    if estimate.lone:
        return f"{format_metric(name, estimate.value)} [dim]\\[{estimate.lone}][/dim]"
    low, high = (format_metric(name, bound).removesuffix("%") for bound in (estimate.low, estimate.high))
    return f"{format_metric(name, estimate.value)} [dim]\\[{low}, {high}][/dim]"
