"""The methods of a recipe: short forms, names, and what is refused, each problem with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fulltune.cli import plan as cli_plan
from fulltune.errors import RecipeError
from fulltune.footprint.records import FOOTPRINT, SHAPES
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import check_recipe, load_recipe
from fulltune.recipe.methods import RESERVED_NAMES

SMALL: dict[str, Any] = {"model": "some/model", "task": "causal-lm", "data": {"train": "a.jsonl"}}


def made(**blocks: Any) -> Recipe:
    return check_recipe({**SMALL, **blocks}, Path("recipe.yaml"))


def problems(**blocks: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        made(**blocks)
    return [problem.removeprefix("recipe.yaml  ") for problem in caught.value.problems]


@pytest.mark.parametrize("kind", ["full", "head", "lora", "adapter", "prompt"])
def test_method_as_a_text_is_its_kind(kind: str) -> None:
    assert made(method=kind) == made(method={"kind": kind})
    assert made(method=kind).method.label == kind


@pytest.mark.parametrize(
    ("method", "label"),
    [
        ({"kind": "lora", "rank": 64}, "lora-r64"),
        ({"kind": "lora", "rank": 64, "alpha": 32, "rslora": True}, "lora-r64-a32-rs"),
        ({"kind": "lora", "target_modules": ["q_proj", "self_attn.v_proj"]}, "lora-q_proj-self_attn_v_proj"),
        ({"kind": "lora", "rank": 64, "name": "wide"}, "wide"),
        ({"kind": "lora", "learning_rate": 1e-3}, "lora"),
        ({"kind": "adapter", "reduction_factor": 4, "non_linearity": "relu"}, "adapter-f4-relu"),
        ({"kind": "prompt", "num_virtual_tokens": 8, "init": "random"}, "prompt-8-random"),
        ({"kind": "peft", "type": "IA3"}, "peft-ia3"),
        ({"kind": "full", "layerwise_lr_decay": 0.9}, "full"),
    ],
)
def test_method_is_named_by_what_differs(method: dict[str, Any], label: str) -> None:
    assert made(method=method).method.label == label


def test_methods_mixed_forms_are_read_and_written_back() -> None:
    recipe = made(methods=["base", "full", {"kind": "lora", "rank": 8}, "prompt"])
    assert [one.label for one in recipe.methods] == ["base", "full", "lora-r8", "prompt"]
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (
            "methods: [full, {name: b, kind: full, train: {seed: 3}}]",
            "4  methods.1.train.seed: must be the same for all methods",
        ),
        (
            "methods: [full, {name: b, kind: full, train: {weight_decoy: 3}}]",
            "4  methods.1.train.weight_decoy: unknown",
        ),
        (
            "methods: [full, {name: b, kind: full, train: {weight_decay: lots}}]",
            "4  methods.1.train.weight_decay: expect",
        ),
        (
            "methods: [full, {name: b, kind: full, train: {bf16_rounding: kahan}}]",
            "4  methods.1.train.bf16_rounding: 'kahan' has no effect",
        ),
        ("method: {kind: full, train: {weight_decay: 0.1}}", "4  method.train: only methods of a comparison"),
    ],
)
def test_problem_of_methods_names_the_line(text: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: some/model\ntask: causal-lm\ndata: {{train: a}}\n{text}\n")
    with pytest.raises(RecipeError, match=rf"recipe\.yaml:{place}"):
        load_recipe(path)


def test_method_on_the_command_line_beside_methods_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: some/model\ntask: causal-lm\ndata: {train: a}\nmethods: [full, lora]\n")
    with pytest.raises(RecipeError, match="method and methods are both set"):
        load_recipe(path, ["method.rank=8"])
    assert load_recipe(path, ["methods=[]", "method=lora"]).method.label == "lora"


KINDS = "'full', 'head', 'lora', 'adapter', 'prompt', 'peft'"


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ({"method": "loar"}, [f"method.kind: expected {KINDS}, found 'loar'; did you mean 'lora'?"]),
        ({"method": {"kind": "base"}}, [f"method.kind: expected {KINDS}, found 'base'"]),
        ({"method": {"rank": 8}}, ["method.rank: unknown setting; the setting belongs to kind: lora"]),
        (
            {"method": {"kind": "lora", "rnak": 8, "dropout": 1}},
            [
                "method.dropout: expected less than 1, found 1",
                "method.rnak: unknown setting; did you mean 'rank'?",
            ],
        ),
        (
            {"methods": ["full", {"kind": "lroa", "rank": 0}]},
            [f"methods.1.kind: expected {KINDS}, 'base', found 'lroa'; did you mean 'lora'?"],
        ),
        ({"rank": 8}, ["rank: unknown setting; did you mean 'method.rank'?"]),
        (
            {"method": {"kind": "peft"}},
            ["method.type: missing; expected: Name of the method in PEFT, such as `IA3`, `LOHA`, `OFT` or `VERA`"],
        ),
        (
            {"method": {"kind": "lora", "target_modules": []}},
            ["method.target_modules: no matrix is listed; write all-linear, or names such as [q_proj, v_proj]"],
        ),
        (
            {"method": {"kind": "lora", "learning_rate": 0.1, "learning_rates": [0.1, 0.1, 2]}},
            [
                "method.learning_rate and learning_rates are both set; remove one",
                "method.learning_rates: expected numbers above 0 and below 1",
                "method.learning_rates: a rate is listed twice",
            ],
        ),
        ({"methods": "lora"}, ["methods: expected a list, found 'lora'; write [lora]"]),
        (
            {"methods": ["lora", {"kind": "lora", "learning_rate": 1e-3}, "full", "full"]},
            [
                "methods: two methods are called 'full'; give one of them a different 'name'",
                "methods: two methods are called 'lora'; give one of them a different 'name'",
            ],
        ),
        (
            {"methods": ["base", "lora"]},
            ["methods: 'full' is missing; add it, because the other methods are compared with it"],
        ),
        (
            {"methods": ["base", "full", "head"]},
            [
                "methods: nothing to compare full fine-tuning with ('base' and 'head' are only shown for reference); "
                "add one of lora, adapter, prompt, peft, or another full with other settings"
            ],
        ),
        (
            {"methods": ["full", {"kind": "lora", "name": "../up"}], "name": "a run"},
            [
                "methods.1.name: expected letters, digits, '.', '_' and '-', with a letter or a digit first, found "
                "'../up'",
                "name: expected letters, digits, '.', '_' and '-', with a letter or a digit first, found 'a run'",
            ],
        ),
        (
            {"methods": ["full", {"kind": "lora", "learning_rates": []}]},
            ["methods.1.learning_rates: is empty; expected: Learning rates to search"],
        ),
        (
            {"compare": {"budget": "30 parsecs"}},
            ["compare.budget: expected a time such as 30m, 2h or 90s, found '30 parsecs'"],
        ),
        ({"compare": {"margin": 0}}, ["compare.margin: expected greater than 0, found 0"]),
    ],
)
def test_problems_are_named_all_at_once(blocks: dict[str, Any], expected: list[str]) -> None:
    assert problems(**blocks) == expected


LROA, ADAPTR = "'lroa'; did you mean 'lora'?", "'adaptr'; did you mean 'adapter'?"


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ("[lroa, adaptr]", {"0.kind": LROA, "1.kind": ADAPTR}),
        ("[full, lroa, {kind: adaptr}]", {"1.kind": LROA, "2.kind": ADAPTR}),
        ("[lroa, {kind: adaptr}]", {"0.kind": LROA, "1.kind": ADAPTR}),
        ("[{kind: lora, rank: x}, {kind: adaptr}]", {"0.rank": "'x'", "1.kind": ADAPTR}),
        ("[{kind: zzzzzz}, {kind: qqqqq}]", {"0.kind": "'zzzzzz'", "1.kind": "'qqqqq'"}),
        ("[3, {kind: adaptr}]", {"0": "3", "1.kind": ADAPTR}),
    ],
)
def test_two_wrong_methods_are_both_named(methods: str, expected: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: some/model\ntask: causal-lm\ndata: {{train: a}}\nmethods: {methods}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    for name, ending in expected.items():
        begin = f"{path}:4  methods.{name}: expected"
        (problem,) = (one for one in caught.value.problems if one.startswith(begin))
        assert problem.endswith(f", found {ending}")


@pytest.mark.parametrize("name", ["footprint", "Shapes", "measured", "survey"])
def test_method_named_like_a_file_beside_its_plan_is_refused(name: str) -> None:
    problem = f"name: '{name}' is reserved for a file of the run folder; choose another name"
    assert problems(method={"kind": "lora", "name": name}) == [f"method.{problem}"]
    assert problems(methods=["full", {"kind": "lora", "name": name}]) == [f"methods.1.{problem}"]


def test_names_of_all_files_beside_plans_are_taken() -> None:
    assert {Path(file).stem for file in (FOOTPRINT, SHAPES, cli_plan.SURVEY)} < set(RESERVED_NAMES)
