"""How a trained model is loaded and asked, as the report and the model card print it."""

from __future__ import annotations

import json

from fulltune.recipe.tasks import FACTS, ProblemType
from fulltune.records.data import DataSummary
from fulltune.records.plan import Plan
from fulltune.report.format import words

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
HOW_TO_ASK: dict[ProblemType, str] = {
    "prompt_completion": (
        "The model was trained on prompts and answers, without the chat template of the pretrained model. A prompt "
        "must look as below; if this folder has a chat template, it writes a user's message in just that form."
    ),
    "chat": "The model was trained on conversations, in the form of the chat template in this folder.",
    "text": "The model was trained on raw text, without a chat template: it continues a text from its beginning.",
}
"""Problem type to how a language model is asked."""


def method_kind(plan: Plan | None) -> str:
    """The kind of method of a plan; its name may be another."""
    found = (setting.value for setting in plan.settings if setting.name == "method.kind") if plan else ()
    return str(next(iter(found), "full"))


def how_to_load(plan: Plan | None) -> str:
    """How a model of the plan's method is loaded, in words."""
    return HOW_TO_LOAD.get(method_kind(plan), HOW_TO_LOAD["peft"])


def loading_code_of(folder: str, task: str, summary: DataSummary | None, plan: Plan | None, base: str) -> str:
    """Python that loads a trained model of any method; empty where only fulltune can load it.

    Args:
        folder: The model's, as the code shall name it.
        task: What the model does.
        summary: Of the rows, where it is known.
        plan: Tells the method.
        base: The pretrained model.
    """
    kind = method_kind(plan)
    if kind in ONLY_OURS:
        return ""
    code = loading_code(folder, task, summary)
    return code if kind == "full" else _around_base(code, base)


def loading_code(folder: str, task: str, summary: DataSummary | None) -> str:
    """Python that loads a whole model with plain transformers; what else one must know stands in comments."""
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
    elif facts.reads == "image":
        more = 'classify = pipeline("image-classification", model=model, image_processor=processor)\n'
    elif task == "causal-lm" and summary:
        return f"from transformers import {imports}\n\n{loading}{_asking(summary)}"
    elif task == "seq2seq" and summary and summary.joint:
        more = f"# As in training, {json.dumps(summary.joint, ensure_ascii=False)} belongs before each text.\n"
    return f"from transformers import {imports}{', pipeline' * ('pipeline(' in more)}\n\n{loading}{more}"


def _around_base(code: str, base: str) -> str:
    """The code that loads a whole model, for one that PEFT puts around a pretrained one."""
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
