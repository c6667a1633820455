"""Reading recipes: types, paths, environment, overrides, and where a problem is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fulltune.errors import RecipeError
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import load_recipe

SMALL = "model: some/model\ntask: causal-lm\ndata:\n  train: a.jsonl\n"


def written(folder: Path, text: str = SMALL) -> Path:
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [problem.replace(f"{path}", "recipe.yaml") for problem in caught.value.problems]


def test_paths_relative_start_at_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    recipe = load_recipe(written(tmp_path, SMALL.replace("some/model", "model")))
    assert recipe.data.task_files == (str(tmp_path / "a.jsonl"),)
    assert recipe.model.name == str(tmp_path / "model")
    assert recipe.output == str(tmp_path / "runs")


@pytest.mark.parametrize("name", ["some/model", "package:thing/inner"])
def test_model_that_is_no_path_stays(tmp_path: Path, name: str) -> None:
    assert load_recipe(written(tmp_path, SMALL.replace("some/model", name))).model.name == name


def test_environment_variable_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/elsewhere")
    recipe = load_recipe(written(tmp_path, SMALL.replace("a.jsonl", "${WHERE}/a.jsonl")))
    assert recipe.data.task_files == ("/elsewhere/a.jsonl",)


@pytest.mark.parametrize(
    ("override", "block", "name", "value"),
    [
        ("train.max_steps=7", "train", "max_steps", 7),
        ("train.group_by_length=false", "train", "group_by_length", False),
        ("method.learning_rate=3e-4", "method", "learning_rate", 3e-4),
        ("train.report_to=[mlflow, wandb]", "train", "report_to", ("mlflow", "wandb")),
        ("train.extra.tf32=true", "train", "extra", {"tf32": True}),
        ("model.dropout=0.1", "model", "dropout", 0.1),
        ("data.label=null", "data", "label", None),
    ],
)
def test_override_has_the_type_of_its_value(
    tmp_path: Path, override: str, block: str, name: str, value: object
) -> None:
    path = written(tmp_path, SMALL + "method: {kind: full}\n")
    assert getattr(getattr(load_recipe(path, [override]), block), name) == value


def test_problem_of_an_override_is_found_at_the_override(tmp_path: Path) -> None:
    path = written(tmp_path, SMALL + "train: {num_train_epochs: 3}\n")
    assert problems(path, "train.num_train_epochs=ten", "trian.seed=1") == [
        "--set train.num_train_epochs=ten  train.num_train_epochs: expected number, found 'ten'",
        "--set trian.seed=1  trian: unknown setting; did you mean 'train'?",
    ]


@pytest.mark.parametrize("folder", ["2024", "1.5.0", "."])
def test_folder_with_a_number_for_its_name_is_a_path(tmp_path: Path, folder: str) -> None:
    assert load_recipe(written(tmp_path, SMALL + f"  eval: '{folder}'\n")).data.eval == str(
        (tmp_path / folder).resolve()
    )


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("methods.0.rank=4", "methods is a list; set the whole list, such as --set 'methods=[...]'"),
        ("train.=1", "expected block.name=value, for example train.num_train_epochs=3"),
    ],
)
def test_override_of_what_has_no_such_name_is_refused(tmp_path: Path, override: str, problem: str) -> None:
    path = written(tmp_path, SMALL + "methods: [full, lora]\n")
    assert problems(path, override) == [f"--set {override}: {problem}"]


def test_override_of_the_rate_needs_no_method_in_the_recipe(tmp_path: Path) -> None:
    method = load_recipe(written(tmp_path), ["method.learning_rate=1e-4"]).method
    assert (method.kind, method.learning_rate) == ("full", 1e-4)


def test_override_of_the_model_keeps_its_name(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path), ["model.dropout=0.1"]).model.name == "some/model"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("traim: {}", "recipe.yaml:5  traim: unknown setting; did you mean 'train'?"),
        ("train: {max_stepz: 1}", "recipe.yaml:5  train.max_stepz: unknown setting; did you mean 'max_steps'?"),
        ("learning_rate: 1", "recipe.yaml:5  learning_rate: unknown setting; write method.learning_rate"),
        ("train: {seed: -1}", "recipe.yaml:5  train.seed: expected greater than or equal to 0, found -1"),
        ("train: {max_steps: 1.5}", "recipe.yaml:5  train.max_steps: expected whole number, found 1.5"),
        ("train: {seed: }", "recipe.yaml:5  train.seed: expected whole number, found nothing"),
        ("train: {weight_decay: 1%}", "recipe.yaml:5  train.weight_decay: expected number, found '1%'; write 0.01"),
        (
            "a b: 3",
            "recipe.yaml:5  a b: unknown setting; expected one of compare, data, evaluate, functions, method, methods, "
            "model, name, output, preserve, task, train",
        ),
        ("train: 3", "recipe.yaml:5  train: expected settings (a block), found a number"),
        (
            "train: {max_steps: 1, num_train_epochs: 2}",
            "recipe.yaml:5  train.max_steps and num_train_epochs are both set; remove one",
        ),
        (
            "train: {eval_strategy: steps}",
            "recipe.yaml:5  train.eval_strategy is 'steps' but eval_steps is missing; add for example 'eval_steps: "
            "100'",
        ),
        (
            "train: {global_batch_size: 64, micro_batch_size: 6}",
            "recipe.yaml:5  train.global_batch_size: 64 is not a multiple of micro_batch_size 6",
        ),
        (
            "name: a/b",
            "recipe.yaml:5  name: expected letters, digits, '.', '_' and '-', with a letter or a digit first, found "
            "'a/b'",
        ),
    ],
)
def test_problem_is_told_with_line_and_near_name(tmp_path: Path, line: str, problem: str) -> None:
    assert problems(written(tmp_path, SMALL + line + "\n")) == [problem]


def test_problems_of_all_kinds_come_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, SMALL + "task: x\ntrain: {seed: a}\noutput: ${NOT_SET_ANYWHERE}\n")
    texts = problems(path, "nonsense")
    assert [problem.split("  ")[0] for problem in texts] == [
        "recipe.yaml:5",
        "recipe.yaml:7",
        "--set nonsense: expected block.name=value, for example train.num_train_epochs=3",
        "recipe.yaml:5",
        "recipe.yaml:6",
    ]


def test_data_in_place_of_a_recipe_is_told_from_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"a\.csv: no such file"):
        load_recipe(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(b"\xff")
    with pytest.raises(
        RecipeError, match=r"a\.csv: expected a recipe, found a data file; write a recipe with 'fulltune init"
    ):
        load_recipe(tmp_path / "a.csv")


def test_required_settings_missing_are_named(tmp_path: Path) -> None:
    texts = problems(written(tmp_path, "name: x\n"))
    assert [problem.split(": ")[0] for problem in texts] == [
        "recipe.yaml  model",
        "recipe.yaml  task",
        "recipe.yaml  data",
    ]


def test_fingerprint_ignores_what_does_not_shape_the_result() -> None:
    values = {"model": "m", "task": "causal-lm", "data": {"train": "a"}}
    first = Recipe.model_validate(values).fingerprint()
    assert Recipe.model_validate({**values, "name": "n", "output": "o"}).fingerprint() == first
    assert Recipe.model_validate({**values, "train": {"seed": 1}}).fingerprint() != first
    several = {"train": {"num_processes": 2, "placement": "fsdp2"}}
    assert Recipe.model_validate({**values, **several}).fingerprint() == first
    # A comparison tells memory and time of its runs, too.
    compared = {**values, "methods": ["full", "lora"]}
    before = Recipe.model_validate(compared).fingerprint()
    assert Recipe.model_validate({**compared, **several}).fingerprint() != before


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.epochs=3", "train.epochs: unknown setting; write train.num_train_epochs"),
        ("num_epochs=3", "num_epochs: unknown setting; write train.num_train_epochs"),
        ("train.bf16=true", "train.bf16: unknown setting; write train.precision: bf16"),
        ("output_dir=a", "output_dir: unknown setting; write output, the folder for run folders"),
        ("lora_r=8", "lora_r: unknown setting; write method: {kind: lora, rank: NUMBER}"),
        ("packing=true", "packing: unknown setting; did you mean 'data.packing'?"),
        ("method.rank=8", "method.rank: unknown setting; the setting belongs to kind: lora"),
        ("train.tf32=true", "train.tf32: unknown setting; write train.extra.tf32"),
        ("train.gradient_acumulation_steps=2", "train.gradient_acumulation_steps: unknown setting; write train.global"),
        ("load_in_4bit=true", "load_in_4bit: unknown setting; not supported yet: quantized weights are not trained"),
        ("search.budget=2h", "search: unknown setting; write method.learning_rate: search, and compare.budget for its"),
        (
            "compare.near_duplicates=0.8",
            "compare.near_duplicates: unknown setting; did you mean 'data.near",
        ),
        ("train.zzz=1", "train.zzz: unknown setting; docs/reference/recipe.md lists all settings"),
        (
            "train.extra.push_to_hub=true",
            "train.extra.push_to_hub: cannot be set here; not supported yet: after training use",
        ),
        (
            "train.extra.epochs=1",
            "train.extra.epochs: transformers.TrainingArguments has no such field; write train.num_train_epochs",
        ),
    ],
)
def test_setting_known_from_elsewhere_is_answered_with_what_to_write(
    tmp_path: Path, override: str, problem: str
) -> None:
    (text,) = problems(written(tmp_path), override)
    assert text.partition("  ")[2].startswith(problem)


def test_answers_name_settings_that_exist() -> None:
    """What an answer says to write is a setting, or a block, of the recipe."""
    from fulltune.recipe import file as recipe_file
    from fulltune.recipe import rules as recipe_rules

    settings = {
        *Recipe.model_fields,
        *(f"{block}.{name}" for block in Recipe.model_fields for name in recipe_file._fields_at((block,))),
    }
    for answer in recipe_rules.replacement_hints().values():
        for name in re.findall(r"(?<![\w.])(?:model|data|method|train|evaluate|compare)\.[a-z_0-9]+", answer):
            assert name in settings, answer
