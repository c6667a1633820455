from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fulltune.records.events import PhaseBegan
from fulltune.records.forgetting import OF_GENERIC_TEXT
from fulltune.records.plan import Plan
from fulltune.records.training import Check, Outcome, describe_unreached, expert_shares
from fulltune.report.format import words
from fulltune.report.format.blocks import (
    Bullets,
    Cell,
    Code,
    Element,
    Facts,
    Figures,
    Folded,
    NameAndValue,
    Paragraph,
    Section,
    Table,
    TableRow,
    unless_empty,
)
from fulltune.report.format.plots import draw_learning_curve
from fulltune.report.run.about_answers import compare_loss_and_answers
from fulltune.report.run.read import RunView, after_start, before_start
from fulltune.stats.curves import Curves, Fit, Point, judge_curves
from fulltune.text import (
    counted,
    first_few,
    format_bytes,
    format_metric,
    format_number,
    format_seconds,
    format_share,
    listed,
    to_yaml,
)

_TRAIN_TITLES = {"loss": "train loss", "learning_rate": "learning rate", "grad_norm": "gradient norm"}
_OPEN = 10


def build_curves_section(view: RunView) -> Section | None:
    """Build the section of learning curves, or None without curves."""
    history, plan = view.history, view.plan
    drawn_metrics = (plan.metric, view.answer_metric, "loss") if plan else tuple(history.evaluation)
    marks = history.restarts, history.skipped
    drawn = [draw_learning_curve(_TRAIN_TITLES[name], of, name, None, *marks) for name, of in history.train.items()]
    drawn += [
        draw_learning_curve(f"{words.metric_name(name)} on the eval rows", points, name, view.kept_step, *marks)
        for name, points in history.evaluation.items()
        if name in drawn_metrics
    ]
    if not drawn:
        return None
    blocks: list[Element] = list(map(Paragraph, compare_loss_and_answers(view)))
    if (judged := judge_fit_from_curves(view)).evidence:
        helps = f" What helps: {judged.helps}." if judged.helps else ""
        blocks.append(Paragraph(f"{judged.sentence} {judged.details}{helps}"))
    blocks.append(Figures(tuple(drawn)))
    if history.restarts:
        at = listed([f"{step:,}" for step in dict.fromkeys(history.restarts)])
        lead = f"The curves join {len(history.restarts) + 1} attempts; axis ticks show where each later one began"
        blocks.append(Paragraph(f"{lead}: at step {at}."))
    if history.skipped:
        at = first_few([f"{step:,}" for step in history.skipped], _OPEN)
        lead = f"{counted(len(history.skipped), 'skipped step')} (ticks at the top; see the journal)"
        blocks.append(Paragraph(f"{lead}: {at}."))
    return Section("learning-curves", "Learning curves", (*blocks, *_build_evaluation_table(history.evaluation, plan)))


def judge_fit_from_curves(view: RunView) -> Fit:
    """Judge whether the model over- or underfits, or return `not known` if curves are missing."""
    if view.plan is None or view.outcome is None or view.summary is None or "eval" not in view.summary.splits:
        return Fit("not known")
    return judge_curves(collect_curves(view, view.plan))


def collect_curves(view: RunView, plan: Plan) -> Curves:
    """Collect train loss, eval loss and the eval metric by step."""
    history, summary = view.history, view.summary
    return Curves(
        train_loss=history.train.get("loss", ()),
        eval_loss=after_start(history.evaluation.get("loss", ())),
        metric=after_start(history.evaluation.get(plan.metric, ())),
        metric_name=plan.metric,
        greater_is_better=plan.greater_is_better,
        eval_rows=view.num_choosing_answers
        or (summary.splits["eval"].rows if summary and "eval" in summary.splits else 0),
        epochs_per_step=plan.num_train_epochs / max(1, plan.total_steps),
        kept_step=view.outcome.best_step if view.outcome else None,
        before=before_start(history.evaluation.get(plan.metric, ())),
        is_mixed=bool(summary and summary.mixed),
    )


def _build_evaluation_table(series: dict[str, tuple[Point, ...]], plan: Plan | None) -> list[Element]:
    """Build a collapsible table of all evaluations, or an empty list if the plots show all metrics."""
    series = {name: points for name, points in series.items() if name not in OF_GENERIC_TEXT}
    if plan is None or set(series) <= {plan.metric, "loss"}:
        return []
    names = sorted(series, key=lambda name: name != plan.metric)
    values = {name: dict(points) for name, points in series.items()}
    rows = tuple(
        (f"{step:,}", *(format_metric(name, of[step]) if step in (of := values[name]) else "-" for name in names))
        for step in sorted({step for points in values.values() for step in points})
    )
    header = ("step", *(words.metric_name(name) for name in names))
    table = Table("Metrics on the eval rows at each evaluation", header, rows, frozenset(range(1, len(header))))
    return [Folded("all metrics on the eval rows", (table,))]


def build_training_section(view: RunView) -> Section | None:
    """Build the section on attempts, events and changes, or None without attempts."""
    blocks: list[Element] = [_build_attempt_table(view)] if view.attempts else []
    if view.outcome:
        blocks += _build_outcome_blocks(view, view.outcome)
    # Not in a table, whose cells would cut the advice at their end.
    entries = [(attempt.name, entry) for attempt in view.attempts for entry in attempt.journal]
    journal = Bullets(tuple(f"{name}, {one.time}, {one.event}: {one.detail}" for name, one in entries))
    if len(entries) > _OPEN:
        blocks.append(Folded(f"journal of {len(entries)} events", (journal,)))
    elif entries:
        blocks += [Paragraph("Journal: what happened, in order"), journal]
    return unless_empty("Training", blocks)


def _build_attempt_table(view: RunView) -> Table:
    header = ("attempt", "status", "steps", "time of the process", "tokens/s", "peak memory", "why it ended")
    rows: list[TableRow] = []
    for attempt in view.attempts:
        status, facts = "no outcome", ("-", "-", "-", "its process wrote no outcome.json")
        if outcome := attempt.outcome:
            status = words.readable_status(outcome.status)
            speed = format_number(outcome.tokens_per_second) if outcome.tokens_per_second else "-"
            peak = format_bytes(outcome.peak_memory_bytes) if outcome.peak_memory_bytes else "-"
            facts = (format_seconds(outcome.train_seconds), speed, peak, outcome.reason)
        rows.append((attempt.name, status, f"{attempt.steps:,}", *facts[:3], Cell(facts[3], untrusted=True)))
    return Table("Attempts (each is a new process)", header, tuple(rows), numeric=frozenset(range(2, 6)))


def training_facts(view: RunView, outcome: Outcome) -> list[NameAndValue]:
    """List the numbers of trained and changed parameters, and the step whose weights were saved."""
    facts, changes, plan, answers = [], outcome.parameter_changes, view.plan, view.num_choosing_answers
    if plan:
        frozen = f"; not full: all except {', '.join(plan.freeze)}" if plan.freeze else ""
        facts.append(("parameters", f"{plan.num_trainable_parameters:,} trained of {plan.num_parameters:,}{frozen}"))
    if outcome.best_step is not None:
        best = f"step {outcome.best_step:,}"
        if plan and outcome.best_metric is not None:
            value = format_metric(plan.metric, outcome.best_metric)
            where = f"in {counted(answers, 'answer')} to eval rows" if answers else "on the eval rows"
            best += f", {words.metric_name(plan.metric)} {value} {where}"
        facts.append(("weights saved from", f"{best}; {outcome.weights_reason}" if outcome.weights_reason else best))
    if changes and outcome.best_step != 0:
        values = f"{changes.num_values_changed:,} of {changes.num_values_with_gradient:,} that received a gradient"
        facts.append(("parameter values changed", f"{format_share(changes.share)} ({values})"))
    if outcome.expert_tokens:
        facts.append(("tokens of each expert", _describe_experts(outcome.expert_tokens)))
    return facts


def _describe_experts(tokens: Sequence[Sequence[int]]) -> str:
    shares = expert_shares(tokens)
    least, *_, most = (
        f"{format_share(shares[name])} (expert {name})" for name in sorted(shares, key=shares.__getitem__)
    )
    even = f"between {least} and {most} of a layer's tokens; an even share is {format_share(1 / len(tokens[0]))}"
    return "; ".join(filter(None, (even, describe_unreached(shares))))


def _build_outcome_blocks(view: RunView, outcome: Outcome) -> list[Element]:
    facts = training_facts(view, outcome)
    blocks: list[Element] = [Facts(tuple(facts))] if facts else []
    if outcome.parameter_changes and outcome.parameter_changes.unchanged_tensors:
        names = ", ".join(outcome.parameter_changes.unchanged_tensors)
        blocks.append(Paragraph(f"Tensors that received a gradient but did not change (at most 20 listed): {names}"))
    if outcome.checks:
        blocks.append(build_check_table(outcome.checks))
    if outcome.log_tail and outcome.status != "done":
        blocks.append(Folded("last lines of the log", (Code("\n".join(outcome.log_tail)),)))
    return blocks


def build_check_table(checks: Sequence[Check]) -> Table:
    rows = tuple((check.name, "passed" if check.passed else "FAILED", check.result) for check in checks)
    return Table("Checks before step 1", ("check", "verdict", "details"), rows)


def build_settings_section(view: RunView) -> Section | None:
    """Build the section of settings, or None if none are known."""
    blocks: list[Element] = []
    if view.plan and view.plan.settings:
        rows = tuple(
            (
                setting.name,
                Cell(to_yaml(setting.value), untrusted=True),
                "fulltune" if setting.is_automatic else "recipe",
                setting.reason,
            )
            for setting in view.plan.settings
        )
        if streamed := words.describe_stream(view.plan):
            blocks.append(Facts(streamed))
        blocks.append(Table(f"Settings of {view.trial}", ("setting", "value", "chosen by", "reason"), rows))
    if view.recipe_text is not None:
        blocks.append(Folded("the recipe as written", (Code(view.recipe_text, "yaml"),)))
    return unless_empty("Settings", blocks)


def build_environment_section(view: RunView) -> Section | None:
    env = view.environment
    if env is None:
        return None
    facts = (
        ("started", env.start_time),
        ("fulltune", env.fulltune + (f", commit {env.commit}" if env.commit else "")),
        ("Python", env.python),
        ("platform", env.platform),
        ("processor", f"{env.cpu}, {counted(env.num_cores, 'core')}"),
        ("memory", format_bytes(env.memory_bytes)),
        ("devices", listed(env.devices) or "CPU only"),
        *env.machines.items(),
        *(("own function", f"{name}, file with SHA-256 {digest}...") for name, digest in env.functions.items()),
    )
    packages = Bullets(tuple(f"{name} {version}" for name, version in sorted(env.packages.items())))
    folded = Folded("package versions", (packages,))
    return Section("environment", "Environment", (Facts(facts), *([folded] if env.packages else [])))


_HEADER = ("what", "planned", "after the dry run", "actual", "error of the plan", "error of the dry run")
_MEMORY = "memory of the training process (without libraries)"
_TIME = "training time (with evaluations and checkpoints)"


def build_resources_section(view: RunView) -> Section | None:
    """Build the section that compares the last attempt's memory, time and disk with the plan, or None if either is
    missing."""
    plan, outcome = view.plan, view.outcome
    if plan is None or outcome is None:
        return None
    attempt, rows = view.attempts[-1], list[TableRow]()
    phases = {event.name: event.seconds for event in attempt.events if isinstance(event, PhaseBegan)}
    time = None if any(entry.event == "resume" for entry in attempt.journal) else plan.time
    if plan.memory or outcome.memory_growth_bytes:
        planned = plan.memory.peak if plan.memory else 0
        actual = max((outcome.memory_growth_bytes, *outcome.memory_growth_per_process))
        rows.append(_build_plan_error_row(_MEMORY, planned, outcome.dry_run_growth_bytes, actual, format_bytes))
    if outcome.forecast or time:
        planned_seconds, forecast = (one.total_seconds if one else 0.0 for one in (time, outcome.forecast))
        # From the first step to the last; 0 if training did not get that far.
        trained = phases.get("saving the model", 0.0) - phases["training"] if "training" in phases else 0.0
        rows.append(_build_plan_error_row(_TIME, planned_seconds, forecast, max(0.0, trained), format_seconds))
    seconds = view.environment.seconds if view.environment else None
    if time is not None and time.overhead_seconds and seconds and not view.searched:  # a search takes several runs
        rows.append(_build_plan_error_row("the whole command", time.whole_seconds, 0, seconds, format_seconds))
    rows.append(_build_plan_error_row("disk", plan.disk.total, 0, outcome.disk_bytes, format_bytes))
    caption = f"Attempt {outcome.attempt}: planned and actual values; +10% means that the plan was 10% too high"
    blocks: list[Element] = [Table(caption, _HEADER, tuple(rows), numeric=frozenset(range(1, 6)))]
    if outcome.status != "done" or outcome.steps != plan.total_steps:
        done = f"{outcome.steps:,} of {plan.total_steps:,} steps"
        blocks.append(Paragraph(f"The attempt ended after {done}; planned times are for all steps."))
    return Section("plan-and-actual", "Plan and actual", tuple(blocks))


def _build_plan_error_row(
    quantity: str, planned: float, after_dry_run: float, actual: float, format_value: Callable[[Any], str]
) -> TableRow:
    """Build a row of planned, forecast and actual values (0 if unknown), with the errors of plan and forecast."""

    def error(value: float) -> str:
        return f"{round(value / actual - 1, 2) or 0:+.0%}" if value and actual else "-"

    values = (format_value(value) if value else "-" for value in (planned, after_dry_run, actual))
    return (quantity, *values, error(planned), error(after_dry_run))
