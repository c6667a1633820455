from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from fulltune.models.encoders import saved_as
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary, RemoteSource
from fulltune.records.export import Verification
from fulltune.records.plan import Plan
from fulltune.records.scores import Estimate, Scores
from fulltune.report.format import words
from fulltune.report.format.blocks import Code, Element, Facts, Paragraph, Section, Table
from fulltune.report.format.pages import LOADING, TEMPLATES, escape_markdown, render_section
from fulltune.report.run import about_training
from fulltune.report.run.about_data import build_split_table, choose_row_form, describe_mixed_sources, has_images
from fulltune.report.run.about_scores import build_calibration_blocks, build_score_table, list_score_notes
from fulltune.report.run.read import RunView
from fulltune.report.run.verdict import judge_scores
from fulltune.text import counted, format_number

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "safetensors")
_LOADING = "## How to load\n"
_BARE = "---\nlibrary_name: transformers\ntags:\n- fulltune\n---\n\n# An exported model\n\n"


def build_model_card(view: RunView, model_folder: Path) -> str:
    """Return the model card as Markdown, with the Hub's YAML metadata and without local paths."""
    plan, scores = view.plan, view.trained
    as_before = "weights as before training (later ones were not better), saved"
    trained = escape_markdown(as_before if view.kept_step == 0 else words.describe_trained(plan))
    sections = (
        _build_data_section(view.summary, view.remote),
        _build_metrics_section(view, scores),
        _build_training_section(view, plan),
        _build_versions_section(view),
        Section("load", "How to load", build_loading_blocks(model_folder.name, view)),
    )
    lead = f"{escape_markdown(words.strip_folders(view.model))} with {trained} by fulltune, for {view.task}."
    head = f"{_build_front_matter(view, scores)}\n\n# {escape_markdown(view.name)}\n\n{lead}\n\n"
    return head + "\n".join(render_section(one, "##") for one in sections if one is not None)


def build_exported_card(trained_card: str, verification: Verification, usage: str) -> str:
    """Turn a trained model's card into an export's, with its verification and how to run it."""
    stored = f", weights stored as {verification.stored_as}" if verification.stored_as else ""
    rows = f" The model and the export answered {counted(verification.rows, 'test row')}." if verification.rows else ""
    what = f"Exported as {verification.format}{stored}.{rows}"
    sections = (
        Section("verification", "Verification", (Paragraph(what), *build_verification_tables(verification))),
        Section("load", "How to load", (Code(usage, "sh" if "\n" not in usage else "python"),)),
    )
    return (trained_card or _BARE).partition(_LOADING)[0] + "\n".join(render_section(one, "##") for one in sections)


def build_verification_tables(verification: Verification) -> tuple[Table, ...]:
    """Return tables of an export's checks and, if it was scored, of both models' metrics."""
    checks = tuple(
        (("ok" if check.passed else "FAILED") * (check.expected != "-"), check.name, check.result, check.expected)
        for check in verification.checks
    )
    metrics = tuple(
        (words.metric_name(name), f"{pair.source:.4g}", f"{pair.export:.4g}", _format_difference(pair.difference))
        for name, pair in verification.metrics.items()
    )
    header = ("metric", "model", "export", "difference")
    return (
        Table("Checks", ("", "check", "result", "expected"), checks),
        *([Table("Metrics on the same test rows", header, metrics, frozenset({1, 2, 3}))] if metrics else []),
    )


def _format_difference(value: Estimate | None) -> str:
    return "-" if value is None else f"{value.value:+.2g} [{value.low:+.2g}, {value.high:+.2g}]"


def _build_front_matter(view: RunView, scores: Scores | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    facts = FACTS.get(view.task)
    tested = _without_folders(view.summary.sources.get("test", "-") if view.summary else "-").removeprefix("file ")
    on_hub = list(dict.fromkeys(source.hub_name for source in view.remote if source.hub_name))
    results = [
        EvalResult(
            task_type=facts.hub,
            dataset_type=on_hub[0] if len(on_hub) == 1 else re.sub(r"[^\w.-]+", "-", tested).strip("-"),
            dataset_name=tested,
            dataset_split="test",
            metric_type=name,
            metric_name=words.metric_name(name),
            metric_value=score.value,
        )
        for name, score in (scores.metrics.items() if scores and facts else ())
        if facts and math.isfinite(score.value)
    ]
    # Names come from the plan, where folders are absolute paths.
    names = (str(one.value) for one in view.plan.settings if one.name == "model.name") if view.plan else ()
    base = next((name for name in names if _HUB_ID.fullmatch(name) and not name.endswith(".gguf")), None)
    data = ModelCardData(
        base_model=base,
        library_name="sentence-transformers" if facts and facts.completes_rows else "transformers",
        pipeline_tag=facts.hub if facts else None,
        tags=["fulltune"],
        datasets=on_hub or None,
        model_name=words.one_line(view.name) if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _without_folders(source: str) -> str:
    return re.sub(r"\S*[\\/](?=\S)", "", source)


def _build_data_section(summary: DataSummary | None, remote: Sequence[RemoteSource]) -> Section | None:
    if summary is None:
        return None
    places = {split: _without_folders(source) for split, source in summary.sources.items()}
    blocks: list[Element] = [build_split_table(summary.model_copy(update={"sources": places}))]
    blocks += [Paragraph(f"Read from {source.origin}.") for source in remote]
    blocks += [Paragraph(f"Mixed in: {_without_folders(line)}.") for line in describe_mixed_sources(summary)]
    if not has_images(summary):
        longest = choose_row_form(summary).longest.capitalize()
        blocks.append(Paragraph(f"{longest}: {counted(summary.max_length, 'token')}."))
    if summary.labels:
        labels = words.cut_text(", ".join(words.text_or_empty(label) for label in summary.labels), 2000)
        blocks.append(Paragraph(f"{counted(len(summary.labels), 'label')}: {labels}"))
    return Section("data", "Data", tuple(blocks))


def _build_metrics_section(view: RunView, scores: Scores | None) -> Section:
    if scores is None:
        return Section("metrics", "Metrics", (Paragraph("This model was not scored on test rows."),))
    writes = view.summary is not None and view.summary.form.writes_answers
    judged = judge_scores(view.scores, writes_answers=writes).sentence
    verdict = Paragraph(f"Test rows were never used to choose anything. {judged}")
    blocks = (build_score_table(view), *list_score_notes(view), verdict, *build_calibration_blocks(scores))
    if (calibration := scores.calibration) is not None and not calibration.note:
        errors = (calibration.expected_calibration_error, calibration.expected_calibration_error_scaled)
        of_pipeline, of_predict = map(format_number, errors)
        text = (
            f"Probabilities differ by program: 'fulltune predict' divides the logits by {calibration.temperature:.3g} "
            f"(calibration error {of_predict}), a transformers pipeline does not (calibration error {of_pipeline})."
        )
        blocks = (*blocks, Paragraph(text))
    return Section("metrics", "Metrics", blocks)


def _build_training_section(view: RunView, plan: Plan | None) -> Section | None:
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
        ("precision", f"{plan.precision}, weights stored in {plan.weights_dtype}"),
        ("seed", str(plan.seed)),
        *([("steps done", f"{outcome.steps:,}"), *about_training.training_facts(view, outcome)] if outcome else []),
    )
    return Section("training", "Training", (Facts(facts),))


def _build_versions_section(view: RunView) -> Section | None:
    env = view.environment
    if env is None:
        return None
    packages = [(name, env.packages[name]) for name in _PACKAGES if name in env.packages]
    facts = Facts((("fulltune", env.fulltune), ("Python", env.python), *packages))
    return Section("versions", "Versions", (facts,))


ONLY_OURS = ("head", "adapter")
HOW_TO_LOAD = {
    "full": "The model is a plain Hugging Face folder that transformers loads without fulltune:",
    "text-pairs": "The folder is an encoder for transformers and sentence-transformers, with the weights of a head on "
    "two texts' vectors beside it, which this code computes:",
    "peft": "The folder holds the trained weights in PEFT's format. PEFT adds them to the pretrained model:",
    **dict.fromkeys(
        ONLY_OURS, "The folder holds the trained weights, which 'fulltune predict' adds to the pretrained model."
    ),
}


def build_loading_blocks(folder: str, view: RunView) -> tuple[Element, ...]:
    """Build blocks on how to query and load a model, with Python code unless only fulltune can load it."""
    # A method's name may differ from its kind.
    kinds = (str(one.value) for one in (view.plan.settings if view.plan else ()) if one.name == "method.kind")
    kind = next(kinds, "full")
    if view.task in FACTS and FACTS[view.task].reads_texts_apart and kind != "full":
        kind = ONLY_OURS[0]  # PEFT would not pool
    ask = view.summary.form.how_to_ask if view.summary else ""
    how = HOW_TO_LOAD.get(view.task if kind == "full" else kind) or HOW_TO_LOAD.get(kind, HOW_TO_LOAD["peft"])
    blocks: list[Element] = [Paragraph(one) for one in (ask, how) if one]
    if kind not in ONLY_OURS:
        code = build_loading_code(folder, view.task, view.summary, "" if kind == "full" else view.model)
        blocks.append(Code(code, "python"))
    return tuple(blocks)


def build_loading_code(folder: str, task: str, summary: DataSummary | None, base_model: str = "") -> str:
    """Return Python code that loads a model. If `base_model` is set, the code adds the folder's weights to it with
    PEFT."""
    facts = FACTS.get(task, FACTS["text-classification"])
    package, _, inner = (
        base_model.removeprefix("package:").partition("/") if base_model.startswith("package:") else ("", "", "")
    )
    pretrained = json.dumps(words.strip_folders(base_model), ensure_ascii=False) if base_model else ""
    return TEMPLATES.get_template(LOADING).render(
        task=task,
        auto_class=saved_as(facts.auto_class),
        processor="AutoImageProcessor" if facts.reads == "image" else "AutoTokenizer",
        folder=json.dumps(folder, ensure_ascii=False),
        package=package,
        base=f"str(files({json.dumps(package)}) / {json.dumps(inner)})" if package else pretrained,
        form=summary.form if summary else None,
        columns=summary.columns if summary else {},
        joint=json.dumps(summary.joint, ensure_ascii=False) if summary and summary.joint else "",
    )
