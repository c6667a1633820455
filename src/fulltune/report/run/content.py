"""A run's report, in the order in which a reader asks, and its model's card: a README.md that the Hub understands."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

from fulltune.recipe.tasks import FACTS
from fulltune.records.comparison import Searched
from fulltune.records.data import DataSummary
from fulltune.records.plan import Plan
from fulltune.records.scores import Scores
from fulltune.report.format import words
from fulltune.report.format.blocks import (
    Block,
    Bullets,
    Code,
    Facts,
    Figures,
    Folded,
    Headline,
    Paragraph,
    Report,
    Row,
    Section,
    Table,
)
from fulltune.report.format.pages import LOADING, TEMPLATES, escaped, section_in_markdown
from fulltune.report.format.plots import LEARNING_RATE, series_plot
from fulltune.report.run import about_data, about_scores, about_training, held
from fulltune.report.run.about_data import has_images, mixed_words, row_words, splits
from fulltune.report.run.read import RunView
from fulltune.report.run.verdict import facts_of, judge, next_steps
from fulltune.text import counted, format_metric, format_number, format_seconds, format_share

_SECOND_METRICS = ("f1 macro", "rougeL", "token accuracy", "r2", "exact match", "loss")
"""The first one there stands in the terminal beside the main one."""


def build(view: RunView) -> Report:
    """Turn what is known about a run into what is said about it."""
    headline, steps = conclude(view)
    sections = (
        _missing(view),
        about_scores.results(view),
        search(view),
        about_training.curves(view),
        held.section(view),
        about_scores.answers(view),
        about_scores.confusion(view),
        about_scores.mistakes(view),
        about_scores.calibration(view),
        about_data.data(view),
        about_training.training(view),
        about_training.resources(view),
        about_training.settings(view),
        about_training.environment(view),
        Section("next", "What to do next", (*_steps(steps), *_use(view, headline))),
    )
    return Report(
        title=view.name,
        subtitle=f"{words.file_name(view.model)} · {view.task}",
        headline=headline,
        key_figures=tuple(_key_figures(view)),
        sections=tuple(section for section in sections if section is not None),
    )


def conclude(view: RunView) -> tuple[Headline, tuple[str, ...]]:
    """Was it worth it, and what to change where it was not."""
    why = next((why for what, why in view.missing if what.startswith("the test scores of")), "")
    headline = replace(judge(view.scores, why), note=about_scores.scored_again(view.accesses))
    facts = facts_of(view, headline)
    return headline, next_steps(facts) if facts else ()


def in_short(view: RunView) -> list[Headline | Section | Block]:
    """What stands in the terminal: scores, answers, the verdict, how the run fits its rows, and what to try next."""
    headline, steps = conclude(view)
    parts: list[Headline | Section | Block] = []
    if view.scores:
        table = about_scores.score_table(view)
        second = next((name for name in _SECOND_METRICS if name in table.header[2:]), "")
        answers = about_scores.answers(view)
        parts += [table.only((table.header[1], second)), *about_scores.about_table(view)]
        parts += answers.blocks if answers else ()
    fit = about_training.fit_of(view)
    unfit = [Paragraph(fit.sentence)] if view.trained and fit.kind not in ("sound", "not known") else []
    return [*parts, headline, *unfit, *_steps(steps)]


def _key_figures(view: RunView) -> list[tuple[str, str]]:
    figures = []
    if outcomes := [attempt.outcome for attempt in view.attempts if attempt.outcome]:
        figures += [
            ("training", words.status(outcomes[-1].status)),
            ("steps", f"{view.attempts[-1].steps:,}"),
            ("time of the training process", format_seconds(sum(outcome.train_seconds for outcome in outcomes))),
        ]
        if view.held is not None and view.held.chosen.is_start:
            figures.append(("weights kept", "the untouched model's"))
        elif moved := outcomes[-1].moved:
            figures.append(("values moved", format_share(moved.share)))
    if view.summary and "train" in view.summary.splits:
        figures.append(("train rows", f"{view.summary.splits['train'].rows:,}"))
    if view.plan:
        figures.append(("learning rate", format_number(view.plan.learning_rate)))
    return figures


def _missing(view: RunView) -> Section | None:
    lead = Paragraph("This report is made from files alone. Not shown, and why:")
    items = Bullets(tuple(f"{what}: {why}" for what, why in view.missing))
    return Section("missing", "What is missing", (lead, items)) if view.missing else None


def _steps(steps: tuple[str, ...]) -> list[Block]:
    return [Paragraph("Run the same recipe again with one change at a time:"), Bullets(steps)] if steps else []


def _use(view: RunView, headline: Headline) -> tuple[Block, ...]:
    folder, asked = view.model_folder, row_words(view.summary).question
    if folder is None:
        blocks: tuple[Block, ...] = (Paragraph(_how_to_go_on(view.outcome.status if view.outcome else None)),)
    else:
        columns = Paragraph("ROWS.jsonl is any file with the columns that the model reads, see 'Data'.")
        blocks = (
            Paragraph("Try the model, from the folder that contains this run folder:"),
            Code(f"fulltune predict {shlex.quote(view.name)} {asked}", "sh"),
            *[columns] * ("--file" in asked),
            *how_to_load(f"{view.name}/{folder}", view),
        )
    return (Folded("how to use this model anyway", blocks),) if headline.kind == "worse" else blocks


def _how_to_go_on(status: str | None) -> str:
    match status:
        case None:
            return "There is no trained model in this run folder. 'fulltune run RECIPE' continues where the run ended."
        case "interrupted" | "killed" | "crashed" | "hung" | "lost":
            what = "A machine was lost" if status == "lost" else f"The run was {status}"
            return f"{what}: the same 'fulltune run' command continues from the last checkpoint."
        case "done":
            return "Training is done, but the model folder is gone: 'fulltune run RECIPE' makes it again."
    return "There is no trained model in this run folder. Read 'Training' above for what happened and what helps."


def search(view: RunView) -> Section | None:
    """None for a run whose learning rate was not searched."""
    found = view.searched
    if found is None:
        return None
    rate = found.rate
    chosen = f"The learning rate is {format_number(rate.chosen)}: {rate.reason}."
    chosen += " It lies at the edge of those tried: a better one may lie beyond." if rate.on_edge else ""
    times = found.seconds / found.run_seconds if found.run_seconds else 0.0
    late = "; its budget was used up before it ended: 'fulltune run' with a larger --budget and --fresh tries more"
    took = f"The search took {format_seconds(found.seconds)}, {times:.1f} times the run that was taken"
    cost = f"{took}{late if rate.time_was_up else ''}. {found.eval_rows:,} eval rows chose."
    return Section("search", "Search", (Paragraph(chosen), *_rates(found), Paragraph(cost)))


def _rates(found: Searched) -> list[Block]:
    name, search = words.metric_name(found.metric_name), found.rate
    short, whole = search.tried, search.whole

    def metric(value: float | None) -> str:
        if value is None:
            return "-"
        return "diverged" if math.isnan(value) else format_metric(found.metric_name, value)

    rows: tuple[Row, ...] = tuple(
        (
            format_number(rate),
            metric(short.get(rate)),
            metric(whole.get(rate)),
            ", ".join([*["usual"] * (rate == search.usual), *["chosen"] * (rate == search.chosen)]),
        )
        for rate in sorted({*short, *whole})
    )
    header = ("learning rate", f"short run ({search.share:.0%} of the steps)", "whole run", "")
    table = Table(f"Learning rates with their {name} on the eval rows", header, rows, frozenset({0, 1, 2}))
    series = {"short runs": tuple(short.items()), "whole runs": tuple(whole.items())}
    title, said = f"{name} on the eval rows by learning rate", "see the table; dashed: the chosen rate."
    return [Figures((series_plot(title, series, found.metric_name, LEARNING_RATE, search.chosen, said),)), table]


# ---- the model card ------------------------------------------------------------------------------------------------

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "safetensors")
_LOADING = "## How to load\n"
"""The last section."""
_BARE = "---\nlibrary_name: transformers\ntags:\n- fulltune\n---\n\n# A merged model\n\n"


def model_card(view: RunView, model_folder: Path) -> str:
    """Write the card's text."""
    plan, scores = view.plan, view.trained
    trained = "all parameters fine-tuned"
    if plan and plan.num_frozen_parameters:
        trained = f"{plan.num_trainable_parameters:,} parameters trained ({escaped(plan.method)})"
    sections = (
        _data(view.summary),
        _metrics(view, scores),
        _training(view, plan),
        _versions(view),
        Section("load", "How to load", how_to_load(model_folder.name, view)),
    )
    lead = f"{escaped(words.file_name(view.model))} with {trained} by fulltune, for {view.task}."
    head = f"{_front_matter(view, scores)}\n\n# {escaped(view.name)}\n\n{lead}\n\n"
    return head + "\n".join(section_in_markdown(one, "##") for one in sections if one is not None)


def merged_card(text: str, name: str, task: str) -> str:
    """Write the card of a merged model: that of what was trained, with how a whole model is loaded."""
    what = "What was trained is merged into the pretrained model's own weights. " + HOW_TO_LOAD["full"]
    blocks = (Paragraph(what), Code(loading_code(name, task, None), "python"))
    return (text or _BARE).partition(_LOADING)[0] + section_in_markdown(Section("load", "How to load", blocks), "##")


def _front_matter(view: RunView, scores: Scores | None) -> str:
    """What the Hub reads: base model, task, and the metrics on the test rows as its model index."""
    from huggingface_hub import EvalResult, ModelCardData

    facts = FACTS.get(view.task)
    tested = _place(view.summary.sources.get("test", "-") if view.summary else "-").removeprefix("file ")
    results = [
        EvalResult(
            task_type=facts.hub,
            dataset_type=re.sub(r"[^\w.-]+", "-", tested).strip("-"),
            dataset_name=tested,
            dataset_split="test",
            metric_type=name,
            metric_name=words.metric_name(name),
            metric_value=found.value,
        )
        for name, found in (scores.metrics.items() if scores and facts else ())
        if facts and math.isfinite(found.value)
    ]
    # From the plan, where folders are absolute paths.
    names = (str(one.value) for one in view.plan.settings if one.name == "model.name") if view.plan else ()
    base = next((name for name in names if _HUB_ID.fullmatch(name) and not name.endswith(".gguf")), None)
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag=facts.hub if facts else None,
        tags=["fulltune"],
        model_name=words.one_line(view.name) if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _place(source: str) -> str:
    """Where the rows of a split are from, without folders."""
    return re.sub(r"\S*[\\/](?=\S)", "", source)


def _data(summary: DataSummary | None) -> Section | None:
    if summary is None:
        return None
    places = {split: _place(source) for split, source in summary.sources.items()}
    blocks: list[Block] = [splits(summary.model_copy(update={"sources": places}))]
    blocks += [Paragraph(f"Mixed in: {_place(line)}.") for line in mixed_words(summary)]
    if not has_images(summary):
        longest = row_words(summary).longest.capitalize()
        blocks.append(Paragraph(f"{longest}: {counted(summary.max_length, 'token')}."))
    if summary.labels:
        labels = words.clipped(", ".join(words.named(label) for label in summary.labels), 2000)
        blocks.append(Paragraph(f"{counted(len(summary.labels), 'label')}: {labels}"))
    return Section("data", "Data", tuple(blocks))


def _metrics(view: RunView, scores: Scores | None) -> Section:
    if scores is None:
        return Section("metrics", "Metrics", (Paragraph("This model was not scored on test rows."),))
    said = Paragraph(f"Test rows were never used for choosing. {judge(view.scores).sentence}")
    return Section(
        "metrics",
        "Metrics",
        (about_scores.score_table(view), *about_scores.about_table(view), said, *about_scores.calibration_of(scores)),
    )


def _training(view: RunView, plan: Plan | None) -> Section | None:
    if plan is None:
        return None
    head_rate, outcome = plan.head_learning_rate, view.outcome
    facts = (
        ("method", plan.method),
        ("learning rate", format_number(plan.learning_rate)),
        *([] if head_rate is None else [("learning rate of the head", format_number(head_rate))]),
        ("layerwise learning rate decay", format_number(plan.layerwise_lr_decay)),
        ("schedule", f"{plan.lr_scheduler_type}, {counted(plan.warmup_steps, 'warm-up step')}"),
        ("epochs", format_number(plan.num_train_epochs)),
        ("planned steps", f"{plan.total_steps:,}"),
        ("global batch size", f"{plan.global_batch_size:,}"),
        ("precision", f"{plan.precision}, weights kept in {plan.weights_dtype}"),
        ("seed", str(plan.seed)),
        *([("steps done", f"{outcome.steps:,}"), *about_training.changed(plan, outcome)] if outcome else []),
    )
    return Section("training", "Training", (Facts(facts),))


def _versions(view: RunView) -> Section | None:
    found = view.environment
    if found is None:
        return None
    packages = [(name, found.packages[name]) for name in _PACKAGES if name in found.packages]
    facts = Facts((("fulltune", found.fulltune), ("Python", found.python), *packages))
    return Section("versions", "Versions", (facts,))


ONLY_OURS = ("head", "adapter")
"""Kinds of methods whose folders only fulltune reads."""
HOW_TO_LOAD = {
    "full": "The model is a plain Hugging Face folder; transformers loads it without fulltune:",
    "peft": "The folder holds what was trained, in PEFT's format; PEFT loads it around the pretrained model:",
    **dict.fromkeys(
        ONLY_OURS, "The folder holds what was trained; 'fulltune predict' puts it into the pretrained model."
    ),
}
"""Kind of method to how its model is loaded; `peft` stands for LoRA and prompts too."""


def how_to_load(folder: str, view: RunView) -> tuple[Block, ...]:
    """How a run's model is asked and loaded, in words, and in Python where not only fulltune can load it."""
    # A method's name may be another than its kind.
    kinds = (str(one.value) for one in (view.plan.settings if view.plan else ()) if one.name == "method.kind")
    kind = next(kinds, "full")
    ask = view.summary.form.how_to_ask if view.summary else ""
    blocks: list[Block] = [Paragraph(one) for one in (ask, HOW_TO_LOAD.get(kind, HOW_TO_LOAD["peft"])) if one]
    if kind not in ONLY_OURS:
        code = loading_code(folder, view.task, view.summary, "" if kind == "full" else view.model)
        blocks.append(Code(code, "python"))
    return tuple(blocks)


def loading_code(folder: str, task: str, summary: DataSummary | None, base: str = "") -> str:
    """Python that loads a model with transformers, with PEFT around `base`."""
    facts = FACTS.get(task, FACTS["text-classification"])
    package, _, inner = base.removeprefix("package:").partition("/") if base.startswith("package:") else ("", "", "")
    pretrained = json.dumps(words.file_name(base), ensure_ascii=False) if base else ""
    return TEMPLATES.get_template(LOADING).render(
        task=task,
        auto_class=facts.auto_class,
        processor="AutoImageProcessor" if facts.reads == "image" else "AutoTokenizer",
        folder=json.dumps(folder, ensure_ascii=False),
        package=package,
        base=f"str(files({json.dumps(package)}) / {json.dumps(inner)})" if package else pretrained,
        form=summary.form if summary else None,
        joint=json.dumps(summary.joint, ensure_ascii=False) if summary and summary.joint else "",
    )
