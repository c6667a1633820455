"""fulltune: fine-tune every parameter of a pretrained model, and see with numbers whether it was worth it.

    import fulltune

    recipe = fulltune.load_recipe("banking77.yaml", ["train.class_weights=balanced"])
    result = fulltune.run(recipe)
    print(result.folder, result.scores[-1].metrics["accuracy"])

A script written for `transformers` needs one changed line: `from fulltune import Trainer, TrainingArguments`.
Names are imported when they are first used, so `import fulltune` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fulltune.api import job, load_predictor, run
    from fulltune.classic import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
    from fulltune.classic.sft import SFTConfig as SFTConfig
    from fulltune.classic.sft import SFTTrainer as SFTTrainer
    from fulltune.errors import FulltuneError
    from fulltune.pipeline import make_plan, prepare, score_baselines, score_trial, train_trial, write_report
    from fulltune.recipe.fields import Recipe
    from fulltune.recipe.file import load_recipe
    from fulltune.train.loop.guarded_step import Guarded

_HOMES = {
    "job": "api",
    "run": "api",
    "load_predictor": "api",
    "Guarded": "train.loop.guarded_step",
    "Trainer": "classic",
    "TrainingArguments": "classic",
    "Seq2SeqTrainer": "classic",
    "Seq2SeqTrainingArguments": "classic",
    "SFTTrainer": "classic.sft",
    "SFTConfig": "classic.sft",
    "FulltuneError": "errors",
    "prepare": "pipeline",
    "make_plan": "pipeline",
    "train_trial": "pipeline",
    "score_baselines": "pipeline",
    "score_trial": "pipeline",
    "write_report": "pipeline",
    "Recipe": "recipe.fields",
    "load_recipe": "recipe.file",
}

# Without SFTTrainer and SFTConfig: `from fulltune import *` must not need TRL.
__all__ = [
    "FulltuneError",
    "Guarded",
    "Recipe",
    "Seq2SeqTrainer",
    "Seq2SeqTrainingArguments",
    "Trainer",
    "TrainingArguments",
    "job",
    "load_predictor",
    "load_recipe",
    "make_plan",
    "prepare",
    "run",
    "score_baselines",
    "score_trial",
    "train_trial",
    "write_report",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fulltune' has no attribute {name!r}")
    return getattr(import_module(f"fulltune.{_HOMES[name]}"), name)
