"""How a trained model is loaded and asked, as the report and the model card print it."""

from __future__ import annotations

import json

from fulltune.recipe.tasks import FACTS
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
    return "" if kind in ONLY_OURS else loading_code(folder, task, summary, "" if kind == "full" else base)


def loading_code(folder: str, task: str, summary: DataSummary | None, base: str = "") -> str:
    """Python that loads a model with transformers, with PEFT around `base`; what else one must know is in comments."""
    facts = FACTS.get(task, FACTS["text-classification"])
    head = facts.auto_class
    kind, name = ("AutoImageProcessor", "processor") if facts.reads == "image" else ("AutoTokenizer", "tokenizer")
    where, pretrained = json.dumps(folder, ensure_ascii=False), json.dumps(words.file_name(base), ensure_ascii=False)
    imports, loading = f"from transformers import {head}, {kind}", f"model = {head}.from_pretrained({where})\n"
    if base:
        imports = f"from peft import PeftModel\nfrom transformers import AutoConfig, {head}, {kind}"
        if base.startswith("package:"):
            package, _, inner = base.removeprefix("package:").partition("/")
            imports = f"from importlib.resources import files\n\n{imports}"
            pretrained = f"str(files({json.dumps(package)}) / {json.dumps(inner)})"
        loading = (
            f"base = {head}.from_pretrained({pretrained}, config=AutoConfig.from_pretrained({where}))\n"
            f"model = PeftModel.from_pretrained(base, {where})\n"
        )
    loading += f"{name} = {kind}.from_pretrained({where})\n"
    more = ""
    if task == "token-classification":
        # Tags are learned at the first token of each word.
        more = (
            'find = pipeline("token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="first")\n'
        )
    elif facts.reads == "image":
        more = 'classify = pipeline("image-classification", model=model, image_processor=processor)\n'
    elif task == "causal-lm" and summary:
        more = _asking(summary)
    elif task == "seq2seq" and summary and summary.joint:
        more = f"# As in training, {json.dumps(summary.joint, ensure_ascii=False)} belongs before each text.\n"
    return f"{imports}{', pipeline' * ('pipeline(' in more)}\n\n{loading}{more}"


def _asking(summary: DataSummary) -> str:
    """Python that asks a language model in the form in which it was trained."""
    special = ""
    if "messages" in summary.columns:
        prompt = (
            'messages = [{"role": "user", "content": "..."}]\n'
            "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)\n"
        )
        special = ", add_special_tokens=False"
    elif summary.form.is_raw_text:
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
