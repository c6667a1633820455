from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from fulltune.records.data import DataSummary
from fulltune.records.events import (
    Answered,
    Certified,
    ChecksDone,
    DataPrepared,
    Designed,
    Evaluated,
    Event,
    Forecast,
    Message,
    PhaseBegan,
    Planned,
    RowsRead,
    StepLogged,
    StepSkipped,
)
from fulltune.records.forgetting import OF_GENERIC_TEXT
from fulltune.records.plan import Plan
from fulltune.records.scores import Answer
from fulltune.report.comparison.content import build_expectation_section
from fulltune.report.format import pages
from fulltune.report.format.words import MetricFormatter, format_speed, one_line, text_or_empty
from fulltune.report.run.about_data import build_data_terminal_report
from fulltune.report.run.about_forgetting import describe_budget_result
from fulltune.report.run.about_training import build_check_table
from fulltune.text import first_few, format_bytes, format_metric, format_seconds

_MOST_ROWS = 8


class Display:
    """Prints a run's events, with a live line on a terminal. `details` adds tables of data and plan."""

    def __init__(self, console: Console, details: bool = True) -> None:
        self.console, self.details = console, details
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[facts]}"),
            console=console,
            transient=True,
        )
        self.task = self.progress.add_task("starting", total=None, facts="")
        self.metric, self.last_metric, self.last_line = "", "", 0.0
        self.rows_of, self.rows_began = "", 0.0
        self.sample: Answer | None = None

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress.live.is_started:  # stopping an unstarted one would print an empty line
            self.progress.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case PhaseBegan(name=name):
                self.last_line = time.monotonic()
                if not self._update_live_line(name, None, None, ""):
                    self.console.print(f"[dim]{name}[/dim]")
            case RowsRead():
                self._show_rows_read(event)
            case StepLogged():
                self._show_step(event)
            case Evaluated():
                self._show_evaluation(event)
            case Answered(answers=(sample, *_)):
                self.sample = sample  # shown below the metrics that follow
            case DataPrepared():
                self._show_data(event.summary, event.is_reused)
            case Planned(plan=plan):
                self.metric = plan.metric
                self._show_plan(plan)
            case ChecksDone(checks=checks):
                pages.print_parts(self.console, [build_check_table(checks)])
            case Forecast():
                self._show_forecast(event)
            case Message(text=text, level="progress" | "resumed"):
                self.console.print(escape(text))
            case Message(text=text, level="next attempt"):
                self.console.print(f"[yellow]next attempt:[/yellow] {escape(text)}")
            case Message(text=text):
                self.console.print(f"[yellow]{escape(text)}[/yellow]")
            case Designed(expectation=expected, metric=metric, margin=margin):
                pages.print_parts(self.console, [build_expectation_section(expected, MetricFormatter(metric, margin))])
            case Certified(result=result):
                self.console.print(escape(describe_budget_result(result)))
            case StepSkipped(step=step, reason=reason, rows=rows):
                named = first_few([f"{row + 1:,}" for row in rows], _MOST_ROWS)
                self.console.print(f"[yellow]step {step}: skipped:[/yellow] {escape(reason)}; train rows {named}")

    def _update_live_line(self, name: str, done: float | None, total: float | None, facts: str) -> bool:
        self.progress.update(self.task, description=name, completed=done, total=total, facts=facts)
        return self.progress.live.is_started

    def _show_rows_read(self, event: RowsRead) -> None:
        now = time.monotonic()
        if event.done == 0 or event.name != self.rows_of:
            self.rows_of, self.rows_began = event.name, now
        share = event.share if event.share is not None or not event.total else event.done / event.total
        done, total = ((f"{n:,}" if event.unit == "rows" else format_bytes(n)) for n in (event.done, event.total or 0))
        facts = (done if event.total is None else f"{done} of {total}") + " rows" * (event.unit == "rows")
        facts = f"{event.part}, {facts}" if event.part else facts
        if share and share < 1:
            facts += f", {format_seconds(round((now - self.rows_began) * (1 - share) / share))} left"
        if (
            not self._update_live_line(event.name, share, None if share is None else 1.0, facts)
            and now - self.last_line > 5
        ):
            self.last_line = now
            self.console.print(f"[dim]{event.name}: {facts}[/dim]")

    def _show_step(self, event: StepLogged) -> None:
        # Images have no tokens.
        speed = f"{format_speed(event.tokens_per_second)} tok/s  " if event.tokens_per_second else ""
        facts = f"loss {event.loss:.3f}{self.last_metric}  {speed}{format_seconds(round(event.seconds_left))} left"
        step, total, now = event.step, event.total_steps, time.monotonic()
        if not self._update_live_line(f"step {step}/{total}", step, total, facts) and (
            now - self.last_line > 5 or step in (1, total)
        ):
            self.last_line = now
            self.console.print(f"step {step}/{total}  {facts}")

    def _show_evaluation(self, event: Evaluated) -> None:
        metrics = event.metrics
        names, drift = [name for name in metrics if name not in (self.metric, *OF_GENERIC_TEXT)], OF_GENERIC_TEXT[0]
        shown = [self.metric, *names[: 1 if drift in metrics else 2], drift]
        values = "  ".join(f"{name} {format_metric(name, metrics[name])}" for name in shown if name in metrics)
        if self.metric in metrics:
            self.last_metric = f"  eval {self.metric} {format_metric(self.metric, metrics[self.metric])}"
        self.console.print(f"step {event.step:>5}  epoch {event.epoch:.2f}  eval {values}")
        if self.sample:
            line = Text(f"  answer: {one_line(text_or_empty(self.sample.predicted))}", style="dim")
            line.truncate(self.console.width * 2 // 3, overflow="ellipsis")
            line.append(f"  expected: {one_line(text_or_empty(self.sample.expected))}")
            line.truncate(self.console.width, overflow="ellipsis")
            self.console.print(line)
            self.sample = None

    def _show_data(self, summary: DataSummary, is_reused: bool) -> None:
        if self.details and is_reused:
            rows = ", ".join(f"{split.rows:,} {name}" for name, split in summary.splits.items())
            self.console.print(f"[dim]rows unchanged: {rows}[/dim]")
        elif self.details:
            pages.print_parts(self.console, build_data_terminal_report(summary))

    def _show_plan(self, plan: Plan) -> None:
        if self.details:
            trained = f"{plan.num_trainable_parameters:,} trained" if plan.num_frozen_parameters else "all trained"
            state = plan.stream.state_bytes if plan.stream else sum(plan.state.values())
            self.console.print(
                f"{plan.trial}: {plan.num_parameters:,} parameters, {trained}; {plan.total_steps} steps of "
                f"{plan.global_batch_size} rows ({plan.micro_batch_size} x {plan.gradient_accumulation_steps} x "
                f"{plan.num_processes}), learning rate {plan.learning_rate:g}, {plan.precision} on {plan.device}, "
                f"state {format_bytes(state)}"
            )
            if plan.busy:
                self.console.print(f"[yellow]{escape(plan.busy)}[/yellow]")

    def _show_forecast(self, event: Forecast) -> None:
        memory = f" and about {format_bytes(event.peak_memory_bytes)} of memory" if event.peak_memory_bytes else ""
        self.console.print(
            f"training with evaluations and checkpoints will take about "
            f"{format_seconds(round(event.time.total_seconds))}{memory} (from the dry run)"
        )
