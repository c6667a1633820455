"""The trained model's card: a README.md that the Hub understands and that names no folder of this machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fulltune.recipe.tasks import FACTS
from fulltune.records.plan import Plan
from fulltune.records.scores import Scores
from fulltune.report.format import words
from fulltune.report.format.markdown import escaped, fenced, table
from fulltune.report.run import kinds
from fulltune.report.run.about_scores import OF_ANSWERS, about_answers, calibration_in_words
from fulltune.report.run.content import HOW_TO_ASK, HOW_TO_LOAD, around_base, loading_code, main_trial, method_kind
from fulltune.report.run.read import RunView
from fulltune.report.verdict import judge

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "safetensors")


def card(view: RunView, model_folder: Path) -> str:
    """Write the card's text.

    Args:
        view: The run.
        model_folder: Where the model lies; tells which trial it is.

    Returns:
        Markdown with YAML front matter.
    """
    trial = _trial_of(view, model_folder)
    plan = view.plan_of(trial) if trial else None
    scores = next((row for row in view.trained if row.name == trial), None)
    parts = [
        _front_matter(view),
        f"# {escaped(view.name)}",
        f"{escaped(words.file_name(view.model))} with {_how_much(plan)} by fulltune, for {view.task}.",
        *_data(view),
        *_metrics(view, scores),
        *(_training(view, plan) if plan else ()),
        *_versions(view),
        "## How to load",
        *_loading(view, plan, model_folder),
    ]
    return "\n\n".join(parts) + "\n"


def _how_much(plan: Plan | None) -> str:
    if plan is None or not plan.num_frozen_parameters:
        return "all parameters fine-tuned"
    return f"{words.count(plan.num_trainable_parameters)} parameters trained ({escaped(plan.method)})"


def _loading(view: RunView, plan: Plan | None, model_folder: Path) -> list[str]:
    asked = HOW_TO_ASK.get(view.summary.problem_type) if view.summary else None
    first = [asked] if asked else []
    kind, code = method_kind(plan), loading_code(model_folder.name, view.task, view.summary)
    if kind == "full":
        return [*first, fenced(code, "python")]
    if kind in ("head", "adapter"):
        return [*first, HOW_TO_LOAD[kind]]
    return [*first, HOW_TO_LOAD["peft"], fenced(around_base(code, view.model), "python")]


def base_model(view: RunView) -> str | None:
    """The Hub id of the model that was trained; None for a folder, a file or a package.

    Only the plan is asked: there a relative folder has become an absolute path, so that it cannot pass for a Hub id.
    """
    names = [
        setting.value for plan in view.plans for setting in plan.settings if setting.name in ("model", "model.name")
    ]
    found = next((name for name in names if isinstance(name, str)), "")
    return found if _HUB_ID.fullmatch(found) and not found.endswith(".gguf") else None


def _trial_of(view: RunView, model_folder: Path) -> str | None:
    """The trial whose outcome names this folder, else the one of the report's headline."""
    for attempt in view.attempts:
        named = attempt.outcome.model_folder if attempt.outcome else None
        if named and (view.folder / named).resolve() == model_folder.resolve():
            return attempt.trial
    return main_trial(view)


def _front_matter(view: RunView) -> str:
    # A JSON string is a YAML string: no YAML library is needed to write four keys.
    lines = ["---", "library_name: transformers"]
    if base := base_model(view):
        lines.append(f"base_model: {json.dumps(base)}")
    if facts := FACTS.get(view.task):
        lines.append(f"pipeline_tag: {facts.hub}")
    return "\n".join([*lines, "tags:", "- fulltune", "---"])


def _data(view: RunView) -> list[str]:
    if view.summary is None:
        return []
    rows = [
        (
            split,
            words.count(found.rows),
            words.count(found.tokens),
            _without_folders(view.summary.sources.get(split, "-")),
        )
        for split, found in view.summary.splits.items()
    ]
    parts = ["## Data", table(("split", "rows", "tokens", "where from"), rows, frozenset({1, 2}))]
    if not kinds.has_images(view.summary):
        parts.append(f"{kinds.longest(view.summary).capitalize()}: {words.counted(view.summary.max_length, 'token')}.")
    if view.summary.labels:
        labels = ", ".join(words.named(label) for label in view.summary.labels)
        parts.append(f"{len(view.summary.labels)} labels: {escaped(words.clipped(labels, 2000))}")
    return parts


def _without_folders(text: str) -> str:
    return re.sub(r"\S*[\\/](?=\S)", "", text)


def _metrics(view: RunView, scores: Scores | None) -> list[str]:
    if scores is None:
        return ["## Metrics", "This model was not scored on test rows."]
    rows = [
        (
            words.metric_name(name),
            words.metric(name, found.value),
            words.interval(name, found),
            words.count(found.rows or (len(scores.answers) if name in OF_ANSWERS else scores.rows)),
        )
        for name, found in scores.metrics.items()
    ]
    level = f"{100 * scores.confidence:g}% interval"
    untrained = [row for row in view.scores if row.kind != "trained"]
    parts = [
        "## Metrics",
        f"On {words.counted(scores.rows, 'test row')}, which were never used for choosing:",
        table(("metric", "value", level, "test rows"), rows, frozenset({1, 2, 3})),
        *((about_answers(scores),) if 0 < len(scores.answers) < scores.rows else ()),
        escaped(judge([scores, *untrained]).sentence),
    ]
    if scores.calibration and scores.calibration.note:
        found = scores.calibration
        error = words.number(found.expected_calibration_error)
        parts.append(f"Calibration: {calibration_in_words(found)} Expected calibration error: {error}.")
    elif scores.calibration:
        found = scores.calibration
        parts.append(
            f"Calibration: divide the logits by {words.number(found.temperature)} (fitted on the eval rows). "
            f"{calibration_in_words(found)} Expected calibration error: "
            f"{words.number(found.expected_calibration_error)} before, "
            f"{words.number(found.expected_calibration_error_scaled)} after."
        )
    return parts


def _training(view: RunView, plan: Plan) -> list[str]:
    facts: list[tuple[str, str]] = [
        ("method", plan.method),
        ("trained parameters", f"{words.count(plan.num_trainable_parameters)} of {words.count(plan.num_parameters)}"),
        ("learning rate", words.number(plan.learning_rate)),
        ("layerwise learning rate decay", words.number(plan.layerwise_lr_decay)),
        ("schedule", f"{plan.lr_scheduler_type}, {words.counted(plan.warmup_steps, 'warm-up step')}"),
        ("epochs", words.number(plan.num_train_epochs)),
        ("planned steps", words.count(plan.total_steps)),
        ("global batch size", words.count(plan.global_batch_size)),
        ("precision", f"{plan.precision}, weights kept in {plan.weights_dtype}"),
        ("seed", str(plan.seed)),
    ]
    outcome = view.outcome_of(plan.trial)
    if outcome:
        facts.append(("steps done", words.count(outcome.steps)))
        if outcome.best_step is not None:
            facts.append(("weights kept from step", words.count(outcome.best_step)))
        if outcome.moved:
            facts.append(("parameter values that moved", words.share(outcome.moved.share)))
    return ["## Training", table(("setting", "value"), facts)]


def _versions(view: RunView) -> list[str]:
    found = view.environment
    if found is None:
        return []
    packages = [(name, found.packages[name]) for name in _PACKAGES if name in found.packages]
    rows = [("fulltune", found.fulltune), ("Python", found.python), *packages]
    return ["## Versions", table(("package", "version"), rows)]
