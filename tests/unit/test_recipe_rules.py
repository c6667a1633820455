"""What a recipe alone shows to be impossible is refused at once, with the rest, without the heavy libraries."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from fulltune.errors import RecipeError
from fulltune.recipe import rules as recipe_rules
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import load_recipe
from fulltune.recipe.tasks import FACTS, FORMS
from fulltune.tasks import task_named

WRONG = """\
model: m
task: causal-lm
data: {train: x.csv, tokens: a, max_token: 5}
train:
  optim: adamw_torch_fuse
  report_to: [tensorbord]
  num_train_epochs: three
  extra: {learning_rat: 1, tf32: "perhaps", bf16: true, neftune_noise_alpha: much}
evaluate: {metric: accuracy}
"""


def test_every_problem_of_a_recipe_is_named_at_once_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(WRONG, encoding="utf-8")
    with pytest.raises(RecipeError) as refusal:
        load_recipe(path)
    assert sorted(refusal.value.problems) == [
        f"{path}:3  data.max_token: unknown setting; write data.max_length",
        f"{path}:3  data.tokens: has no effect for causal-lm; remove it",
        f"{path}:5  train.optim: transformers has no optimizer 'adamw_torch_fuse'; did you mean 'adamw_torch_fused'?",
        f"{path}:6  train.report_to: transformers has no tracker 'tensorbord'; did you mean 'tensorboard'?",
        f"{path}:7  train.num_train_epochs: expected number, found 'three'",
        f"{path}:8  train.extra.bf16: cannot be set here; write train.precision: bf16",
        f"{path}:8  train.extra.learning_rat: transformers.TrainingArguments has no such field; did you mean "
        "'learning_rate'?",
        f"{path}:8  train.extra.neftune_noise_alpha: expected a number, found 'much'",
        f"{path}:8  train.extra.tf32: expected true or false, found 'perhaps'",
        f"{path}:9  evaluate.metric: 'accuracy' is not available for causal-lm; expected one of loss, "
        "perplexity, token_accuracy, exact_match, number_match, rougeL, chrf, bleu, json_equal",
    ]


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (  # of the block with the error
            "train: {warmup_ratio: 0.1,\n  warmup_steps: 4,\n  epochs: 3}",
            ["6  train.epochs: unknown setting", "4  train.warmup_ratio and warmup_steps are both set"],
        ),
        (  # of two blocks, and of the rest of a block that contradicts itself
            "preserve: {budget: 1%, drift: false}\ntrain: {max_steps: 4, num_train_epochs: 2, optim: adam}\nnam: x",
            [
                "6  nam: unknown setting",
                "5  train.max_steps and num_train_epochs are both set",
                "5  train.optim: transformers has no optimizer 'adam'",
                "4  preserve.drift: false, but preserve.budget needs it",
            ],
        ),
        (  # a word that is no setting stands in another problem
            "train: {rows: 1, max_steps: 4}\ndata: {train: x.csv, eval: x.csv, max_rows: x}",
            [
                "5  data: set twice",
                "4  train.rows: unknown setting",
                "5  data.max_rows: expected",
                "5  data.eval: also in train, but a model must not be scored on train rows",
            ],
        ),
        (  # nothing is told of what was left out
            "train: {eval_strategy: steps, eval_steps: x}",
            ["4  train.eval_steps: expected"],
        ),
        ("data: {train: [], near_duplicates: 2}", ["4  data: set twice", "4  data.near_duplicates", "4  data.train"]),
        ("method: {kind: lorra}\ncompare: {budget: 20m}\nmethods: x", ["4  method", "4  method.kind", "6  methods"]),
        (  # a block called as a setting that was left out
            "data: {train: 5}\ntrain: {warmup_ratio: 0.1, warmup_steps: 4, epochs: 3}",
            [
                "4  data: set twice",
                "4  data.train: ",
                "5  train.epochs: unknown",
                "5  train.warmup_ratio and warmup_",
            ],
        ),
        ("train: 5\nevaluate: {metric: accuracy}", ["4  train: expected settings", "5  evaluate.metric: 'accuracy'"]),
    ],
)
def test_errors_hide_no_contradictions(tmp_path: Path, blocks: str, expected: list[str]) -> None:
    path = tmp_path / "train" / "r.yaml"
    path.parent.mkdir()
    path.write_text(f"model: m\ntask: causal-lm\ndata: {{train: x.csv}}\n{blocks}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as refusal:
        load_recipe(path)
    texts = [one.removeprefix(f"{path}:") for one in refusal.value.problems]
    assert len(texts) == len(expected), texts
    assert [one for one in expected if not any(text.startswith(one) for text in texts)] == []


def test_pairs_that_do_not_go_together_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: m\ntask: seq2seq\ndata: {train: x.csv}\ntrain:\n  bf16_rounding: kahan\n")
    with pytest.raises(RecipeError, match=rf"{path}:5  train.bf16_rounding: 'kahan' has no effect"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("blocks", "problem"),
    [
        (
            {"train": {"precision": "fp16"}},
            "train.precision: fp16 with model.weights_dtype: bf16 would compute in bf16",
        ),
        (
            {"train": {"optim": "adamw_bf16", "placement": "zero2"}},
            "train.optim: 'adamw_bf16' cannot run inside DeepSpeed, which keeps fp32 weights and shards the "
            "optimizer state itself; remove optim, or train.placement: zero2",
        ),
        (
            {"train": {"torch_compile": True, "placement": "zero3"}},
            "train.torch_compile: is not supported with train.placement",
        ),
        ({"train": {"chunked_loss": True}}, "train.chunked_loss: has no effect for text-classification, which has no"),
        ({"train": {"extra": {"optim_args": "a=1"}}}, "train.extra.optim_args: has no effect without train.optim"),
        (
            {"train": {"extra": {"dataloader_prefetch_factor": 2}}},
            "train.extra.dataloader_prefetch_factor: needs train",
        ),
        ({"preserve": {"replay": None}}, "preserve.replay: has no effect without preserve.budget"),
        ({"preserve": {"budget": "1%", "drift": False}}, "preserve.drift: false, but preserve.budget needs it"),
    ],
)
def test_settings_that_exclude_each_other_are_named(blocks: dict[str, dict[str, object]], problem: str) -> None:
    model = {"name": "m", "weights_dtype": "bf16"}
    values = {"model": model, "task": "text-classification", "data": {"train": "t.csv"}, **blocks}
    (text,) = recipe_rules.problems_of(Recipe.model_validate(values))
    assert text.startswith(problem)


def test_wrong_recipe_is_refused_without_the_heavy_libraries(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(WRONG, encoding="utf-8")
    heavy = "sorted({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    code = f"""
import sys
from fulltune.errors import RecipeError
from fulltune.recipe.file import load_recipe
from fulltune.recipe.tasks import FACTS
from fulltune.recipe.tasks import FACTS
try:
    load_recipe({str(path)!r})
except RecipeError as error:
    print(len(error.problems), {heavy})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "10 []\n"


@pytest.mark.parametrize(
    ("task", "data", "metric", "problem"),
    [
        ("text-classification", {}, "f1_micro", None),
        ("text-classification", {"problem_type": "regression"}, "spearman", None),
        ("text-classification", {"problem_type": "regression"}, "accuracy", "for regression; expected one of spearman"),
        (
            "text-classification",
            {},
            "f2",
            "for text-classification; expected one of accuracy, f1_macro, mcc, bal",
        ),
        ("token-classification", {}, "f1", None),
    ],
)
def test_metric_must_be_one_of_the_tasks(task: str, data: dict[str, str], metric: str, problem: str | None) -> None:
    values = {"model": "m", "task": task, "data": {"train": "t.csv", **data}, "evaluate": {"metric": metric}}
    texts = recipe_rules.problems_of(Recipe.model_validate(values))
    assert (problem is None and not texts) or (problem is not None and problem in texts[0])


@pytest.mark.parametrize(
    ("blocks", "problem"),
    [
        (
            "task: causal-lm\nmethod:\n  head_learning_rate: 0.1",
            "4  method.head_learning_rate: has no effect for causal-lm",
        ),
        (
            "task: text-classification\nmethod: {kind: head, head_learning_rate: 0.1}",
            "3  method.head_learning_rate: method head trains only the head; write learning_rate",
        ),
        (
            "task: text-classification\nmethods:\n- full\n- lora\n- {kind: head, head_learning_rate: 0.1}",
            "6  methods.2.head_learning_rate: method head trains only the head",
        ),
        (
            "task: text-classification\nmethod: {head_learning_rate: 0.1}\ntrain: {optim: galore_adamw}",
            "3  method.head_learning_rate: cannot be combined with train.optim: 'galore_adamw'",
        ),
        (
            "task: causal-lm\nmethod: {layerwise_lr_decay: 0.9}\ntrain: {optim: lomo}",
            "3  method.layerwise_lr_decay: cannot be combined with train.optim: 'lomo'",
        ),
        ("task: seq2seq\nmethod: {kind: lora, head_init: random}", "3  method.head_init: has no effect for seq2seq"),
        (
            "task: causal-lm\nmethods: [base, full, {kind: lora, head_init: probe}]",
            "3  methods.2.head_init: has no effect for causal-lm",
        ),
    ],
)
def test_setting_of_the_head_that_cannot_be_is_refused_with_its_line(blocks: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: m\n{blocks}\ndata: {{train: x.csv}}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as refusal:
        load_recipe(path)
    assert len(refusal.value.problems) == 1
    assert refusal.value.problems[0].startswith(f"{path}:{problem}")


def test_every_task_has_facts_and_a_module_with_the_same() -> None:
    assert {form for facts in FACTS.values() for form in facts.types} == set(FORMS)
    for name in FACTS:
        assert task_named(name).FACTS is FACTS[name]


def test_names_of_transformers_are_those_that_it_has() -> None:
    from transformers import TrainingArguments
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.training_args import OptimizerNames

    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert set(recipe_rules.training_arguments()) == fields
    assert recipe_rules.optimizers() == sorted(name.value for name in OptimizerNames)
    assert recipe_rules.trackers() == sorted(INTEGRATION_TO_CALLBACK)


def test_extra_values_that_transformers_takes_are_let_through_as_it_takes_them() -> None:
    extra = {"run_name": 2024, "ddp_timeout": 1800.0, "dataloader_num_workers": None, "hub_model_id": None}
    values = {"model": "m", "task": "causal-lm", "data": {"train": "t.csv"}, "train": {"extra": extra}}
    assert recipe_rules.problems_of(Recipe.model_validate(values)) == []
    arguments = recipe_rules.as_training_arguments(extra)
    assert arguments == {"run_name": "2024", "ddp_timeout": 1800, "hub_model_id": None}
    assert type(arguments["ddp_timeout"]) is int
    values["train"] = {"extra": {"ddp_timeout": 1800.5, "run_name": True}}
    assert len(recipe_rules.problems_of(Recipe.model_validate(values))) == 2
