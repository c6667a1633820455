"""The report's content, from headline to next commands, in the order in which a reader asks."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary
from fulltune.records.plan import Plan
from fulltune.report.format import words
from fulltune.report.format.blocks import Block, Bullets, Code, Folded, Paragraph, Section
from fulltune.report.run import about_data, about_resources, about_scores, about_training, kinds
from fulltune.report.run.next_steps import next_steps, seen_in
from fulltune.report.run.read import RunView
from fulltune.report.verdict import Ruling, Verdict, headline_row, judge


@dataclass(frozen=True)
class Report:
    """All that is printed, before it becomes Markdown or HTML."""

    title: str
    subtitle: str
    verdict: Verdict | Ruling
    key_figures: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]


def build(view: RunView) -> Report:
    """Turn what is known about a run into what is said about it."""
    verdict, steps = conclude(view)
    sections = (
        _missing(view),
        about_scores.results(view),
        about_training.curves(view),
        about_scores.answers(view),
        about_scores.confusion(view),
        about_scores.mistakes(view),
        about_scores.calibration(view),
        about_data.data(view),
        about_training.training(view),
        about_resources.resources(view),
        about_training.settings(view),
        about_training.environment(view),
        _next(view, verdict, steps),
    )
    return Report(
        title=view.name,
        subtitle=f"{words.file_name(view.model)} · {view.task}",
        verdict=verdict,
        key_figures=_key_figures(view),
        sections=tuple(section for section in sections if section is not None),
    )


def conclude(view: RunView) -> tuple[Verdict, tuple[str, ...]]:
    """Was it worth it, and what to change where it was not."""
    why = next((part.why for part in view.missing if part.what.startswith("the test scores of")), "")
    verdict = judge(view.scores, why)
    seen = seen_in(view, verdict)
    return verdict, next_steps(seen) if seen else ()


def main_trial(view: RunView) -> str | None:
    """The trial that the headline is about: the first one scored, else the first one known."""
    row = headline_row(view.scores)
    return row.name if row else next(iter(view.trials), None)


def _key_figures(view: RunView) -> tuple[tuple[str, str], ...]:
    figures = []
    trial = main_trial(view)
    attempts = view.attempts_of(trial) if trial else ()
    outcomes = [attempt.outcome for attempt in attempts if attempt.outcome]
    if outcomes:
        last = outcomes[-1]
        figures.append(("training", last.status.replace("_", " ")))
        figures.append(("steps", words.count(attempts[-1].steps)))
        figures.append(
            ("time of the training process", words.duration(sum(outcome.train_seconds for outcome in outcomes)))
        )
        if last.moved:
            figures.append(("values moved", words.share(last.moved.share)))
    if view.summary and "train" in view.summary.splits:
        figures.append(("train rows", words.count(view.summary.splits["train"].rows)))
    plan = view.plan_of(trial) if trial else None
    if plan:
        figures.append(("learning rate", words.number(plan.learning_rate)))
    return tuple(figures)


def _missing(view: RunView) -> Section | None:
    items = [f"{part.what}: {part.why}" for part in view.missing]
    if view.unreadable_lines:
        lines = words.counted(view.unreadable_lines, "line")
        items.append(
            f"{lines} of a .jsonl file could not be read: a process was stopped while writing. The rest is used."
        )
    if not items:
        return None
    lead = Paragraph("This report is made from the files in the run folder alone. Not shown, and why:")
    return Section("missing", "What is missing", (lead, Bullets(tuple(items))))


def _next(view: RunView, verdict: Verdict, steps: tuple[str, ...]) -> Section:
    blocks: list[Block] = []
    if steps:
        blocks += [Paragraph("Run the same recipe again with one change at a time:"), Bullets(steps)]
    use = _use(view)
    worse = verdict.kind == "worse" and main_trial(view) is not None
    blocks += [Folded("how to use this model all the same", use)] if worse else use
    return Section("next", "What to do next", tuple(blocks))


def _use(view: RunView) -> tuple[Block, ...]:
    trial = main_trial(view)
    folder = view.model_folder_of(trial) if trial else None
    outcome = view.outcome_of(trial) if trial else None
    blocks: list[Block] = []
    if folder is None:
        blocks.append(Paragraph(_how_to_go_on(outcome.status if outcome else None)))
    else:
        blocks.append(Paragraph("From the folder that holds this run folder, try the model:"))
        asked = kinds.question(view.summary) if view.summary else '"a text"'
        blocks.append(Code(f"fulltune predict {shlex.quote(view.name)} {asked}", "sh"))
        if "--file" in asked:
            blocks.append(Paragraph("ROWS.jsonl is any file with the columns that the model reads, see 'Data'."))
        kind = method_kind(view.plan_of(trial)) if trial else "full"
        blocks.append(Paragraph(HOW_TO_LOAD.get(kind, HOW_TO_LOAD["peft"])))
        if kind not in _OURS:
            code = loading_code(f"{view.name}/{folder}", view.task, view.summary)
            blocks.append(Code(around_base(code, view.model) if kind != "full" else code, "python"))
    return tuple(blocks)


def _how_to_go_on(status: str | None) -> str:
    match status:
        case None:
            return "There is no trained model in this run folder. 'fulltune run RECIPE' again continues where it ended."
        case "interrupted" | "killed" | "crashed":
            return f"The run was {status}: the same 'fulltune run' command continues from the last checkpoint."
        case "done":
            return "Training is done, but the model folder is not there any more: 'fulltune run RECIPE' makes it anew."
        case _:
            return (
                "There is no trained model in this run folder. Read 'Training' above for what happened, change the "
                "recipe accordingly (for a loss that is not finite: a lower learning rate), and run it again."
            )


_OURS = ("head", "adapter")
"""Kinds of methods whose folders only fulltune reads."""
HOW_TO_LOAD = {
    "full": "The model is a plain Hugging Face folder; transformers loads it without fulltune:",
    "peft": "The folder holds what was trained, as PEFT keeps it; PEFT loads it around the pretrained model:",
    **dict.fromkeys(_OURS, "The folder holds what was trained; 'fulltune predict' puts it into the pretrained model."),
}
"""Kind of method to how its model is loaded; `peft` stands for LoRA and prompts too."""


def method_kind(plan: Plan | None) -> str:
    """The kind of method of a plan; its name may be another."""
    found = (setting.value for setting in plan.settings if setting.name == "method.kind") if plan else ()
    return str(next(iter(found), "full"))


def around_base(code: str, base: str) -> str:
    """The code that loads a plain model, for one that PEFT puts around a pretrained one."""
    lines = []
    for line in code.splitlines():
        if line.startswith("model = "):
            head, _, folder = line.removeprefix("model = ").removesuffix(")").partition("(")
            config = f"AutoConfig.from_pretrained({folder})"
            lines.append(f"base = {head}({json.dumps(words.file_name(base), ensure_ascii=False)}, config={config})")
            line = f"model = PeftModel.from_pretrained(base, {folder})"
        elif line.startswith("from transformers import "):
            lines.append("from peft import PeftModel")
            line = line.replace("import ", "import AutoConfig, ", 1)
        lines.append(line)
    return "\n".join(lines) + "\n"


def loading_code(folder: str, task: str, summary: DataSummary | None) -> str:
    """Python that loads the trained model with plain transformers; what else one must know stands in comments."""
    facts = FACTS.get(task, FACTS["text-classification"])
    head = facts.auto_class
    kind, name = ("AutoImageProcessor", "processor") if facts.reads == "image" else ("AutoTokenizer", "tokenizer")
    where = json.dumps(folder, ensure_ascii=False)
    loading = f"model = {head}.from_pretrained({where})\n{name} = {kind}.from_pretrained({where})\n"
    more, imports = "", f"{head}, {kind}"
    if task == "token-classification":
        # Tags are learned at the first token of each word.
        more = (
            'find = pipeline("token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="first")\n'
        )
        imports += ", pipeline"
    if facts.reads == "image":
        more = 'classify = pipeline("image-classification", model=model, image_processor=processor)\n'
        imports += ", pipeline"
    if task == "causal-lm" and summary:
        more = _asking(summary)
    if task == "seq2seq" and summary and summary.joint:
        more = f"# As in training, {json.dumps(summary.joint, ensure_ascii=False)} belongs before each text.\n"
    return f"from transformers import {imports}\n\n{loading}{more}"


def _asking(summary: DataSummary) -> str:
    """Python that asks a language model in the form in which it was trained."""
    special = ""
    if summary.problem_type == "chat":
        prompt = (
            'messages = [{"role": "user", "content": "..."}]\n'
            "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)\n"
        )
        special = ", add_special_tokens=False"
    elif summary.problem_type == "text":
        prompt = 'prompt = "..."  # the model goes on from here\n'
    else:
        added = f" + {json.dumps(summary.joint)}" if summary.joint else ""
        prompt = f'prompt = "..."{added}  # as in training\n'
    return (
        f"\n{prompt}"
        f'ids = tokenizer(prompt, return_tensors="pt"{special}).input_ids\n'
        "made = model.generate(ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=128, do_sample=False)\n"
        "print(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))\n"
    )


HOW_TO_ASK = {
    "prompt_completion": (
        "The model was trained on prompts and answers, without the chat template of the pretrained model. A prompt "
        "must look as below; if this folder has a chat template, it writes a user's message in just that form."
    ),
    "chat": "The model was trained on conversations, in the form of the chat template in this folder.",
    "text": "The model was trained on raw text, without a chat template: it goes on from the beginning of a text.",
}
"""Problem type to how a language model is asked."""
