from __future__ import annotations

import math
import shlex
from dataclasses import replace

from fulltune.records.comparison import Searched
from fulltune.report.format import words
from fulltune.report.format.blocks import (
    Bullets,
    Code,
    Element,
    Folded,
    Headline,
    NameAndValue,
    Paragraph,
    Report,
    Section,
    Table,
    TableRow,
    unless_empty,
)
from fulltune.report.run import about_answers, about_data, about_forgetting, about_scores, about_training
from fulltune.report.run.about_data import choose_row_form
from fulltune.report.run.model_card import build_loading_blocks
from fulltune.report.run.read import RunView
from fulltune.report.run.verdict import collect_facts, judge_scores, suggest_next_steps
from fulltune.text import format_metric, format_number, format_seconds, format_share

_SECOND_METRICS = ("f1 macro", "rougeL", "token accuracy", "r2", "exact match", "loss")
_NO_MODEL = (
    "There is no trained model in this run folder. 'Training' above says what happened. The same 'fulltune run' "
    "command resumes from the last checkpoint."
)


def build_run_report(view: RunView) -> Report:
    headline, steps = build_run_headline_and_advice(view)
    sections = (
        _build_unavailable_parts_section(view),
        about_scores.build_results_section(view),
        about_scores.build_slices_section(view),
        build_search_section(view),
        about_answers.build_training_answers_section(view),
        about_training.build_curves_section(view),
        about_forgetting.build_forgetting_section(view),
        about_scores.build_answers_section(view),
        about_scores.build_confusion_section(view),
        about_scores.build_mistakes_section(view),
        unless_empty("Calibration", about_scores.build_calibration_blocks(view.trained)),
        about_data.build_data_section(view),
        about_training.build_training_section(view),
        about_training.build_resources_section(view),
        about_training.build_settings_section(view),
        about_training.build_environment_section(view),
        Section("next", "What to do next", (*_steps_to_try(steps), *_build_how_to_use_blocks(view, headline))),
    )
    return Report(
        title=view.name,
        subtitle=f"{words.strip_folders(view.model)} · {view.task}",
        headline=headline,
        key_figures=tuple(_list_key_figures(view)),
        sections=tuple(section for section in sections if section is not None),
    )


def build_run_headline_and_advice(view: RunView) -> tuple[Headline, tuple[str, ...]]:
    """Return the headline and changes to try (none if training helped)."""
    why = next((why for what, why in view.missing if what.startswith("the test scores of")), "")
    writes = view.summary is not None and view.summary.form.writes_answers
    headline = replace(
        judge_scores(view.scores, why, writes), note=about_scores.warn_of_repeated_scoring(view.accesses)
    )
    facts = collect_facts(view, headline)
    return headline, suggest_next_steps(facts) if facts else ()


def build_run_terminal_report(view: RunView) -> list[Headline | Section | Element]:
    """Return the elements that are printed at the end of a run."""
    headline, steps = build_run_headline_and_advice(view)
    parts: list[Headline | Section | Element] = []
    if view.scores:
        table = about_scores.build_score_table(view)
        second = next((name for name in _SECOND_METRICS if name in table.header[2:]), "")
        answers = about_scores.build_answers_section(view)
        parts += [table.keep_columns((table.header[1], second)), *about_scores.list_score_notes(view)]
        parts += answers.blocks if answers else ()
    fit = about_training.judge_fit_from_curves(view)
    unfit = [Paragraph(fit.sentence)] if view.trained and fit.kind not in ("sound", "not known") else []
    return [*parts, headline, *unfit, *_steps_to_try(steps)]


def _list_key_figures(view: RunView) -> list[NameAndValue]:
    figures = []
    if outcomes := [attempt.outcome for attempt in view.attempts if attempt.outcome]:
        figures += [
            ("training", words.readable_status(outcomes[-1].status)),
            ("steps", f"{view.attempts[-1].steps:,}"),
            ("time of the training process", format_seconds(sum(outcome.train_seconds for outcome in outcomes))),
        ]
        if outcomes[-1].best_step == 0 or (view.budget is not None and view.budget.choice.is_start):
            figures.append(("saved weights", "the pretrained model's"))
        elif changes := outcomes[-1].parameter_changes:
            figures.append(("values changed", format_share(changes.share)))
    if view.summary and "train" in view.summary.splits:
        figures.append(("train rows", f"{view.summary.splits['train'].rows:,}"))
    if view.plan:
        figures.append(("learning rate", format_number(view.plan.learning_rate)))
    return figures


def _build_unavailable_parts_section(view: RunView) -> Section | None:
    lead = Paragraph("Some files of the run are missing, so these parts cannot be shown:")
    items = Bullets(tuple(f"{what}: {why}" for what, why in view.missing))
    return Section("missing", "What is missing", (lead, items)) if view.missing else None


def _steps_to_try(steps: tuple[str, ...]) -> list[Element]:
    return [Paragraph("Run the same recipe again with one change at a time:"), Bullets(steps)] if steps else []


def _build_how_to_use_blocks(view: RunView, headline: Headline) -> tuple[Element, ...]:
    folder, question = view.model_folder, choose_row_form(view.summary).question
    if folder is None:
        blocks: tuple[Element, ...] = (Paragraph(_NO_MODEL),)
    else:
        columns = Paragraph("ROWS.jsonl is any file with the columns that the model reads; see 'Data'.")
        blocks = (
            Paragraph("Try the model, from the folder that contains this run folder:"),
            Code(f"fulltune predict {shlex.quote(view.name)} {question}", "sh"),
            *([columns] if "--file" in question else []),
            *build_loading_blocks(f"{view.name}/{folder}", view),
        )
    return (Folded("how to use this model anyway", blocks),) if headline.kind == "worse" else blocks


def build_search_section(view: RunView) -> Section | None:
    """Build the section on the learning rate search, or None without a search."""
    searched = view.searched
    if searched is None:
        return None
    rate = searched.rate
    choice = f"The learning rate is {format_number(rate.chosen)}: {rate.reason}."
    choice += " This rate is at the edge of those tried, so a better one may lie beyond." if rate.on_edge else ""
    times = searched.seconds / searched.run_seconds if searched.run_seconds else 0.0
    late = " The budget ended the search early: 'fulltune run' with a larger --budget and --fresh tries more rates."
    took = f"The search took {format_seconds(searched.seconds)}, {times:.1f} times as long as the chosen run,"
    cost = f"{took} and used {searched.eval_rows:,} eval rows.{late if rate.time_was_up else ''}"
    return Section("search", "Search", (Paragraph(choice), _build_rate_table(searched), Paragraph(cost)))


def _build_rate_table(searched: Searched) -> Table:
    name, search = words.metric_name(searched.metric_name), searched.rate
    short, whole = search.tried, search.whole

    def format_score(value: float | None) -> str:
        if value is None:
            return "-"
        return "diverged" if math.isnan(value) else format_metric(searched.metric_name, value)

    rows: tuple[TableRow, ...] = tuple(
        (
            format_number(rate),
            format_score(short.get(rate)),
            format_score(whole.get(rate)),
            ", ".join(word for word, one in (("default", search.usual), ("chosen", search.chosen)) if one == rate),
        )
        for rate in sorted({*short, *whole})
    )
    header = ("learning rate", f"short run ({search.share:.0%} of the steps)", "whole run", "")
    return Table(f"Scores ({name}) on the eval rows by learning rate", header, rows, frozenset({0, 1, 2}))
