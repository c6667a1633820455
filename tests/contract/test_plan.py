"""`fulltune plan`: without data, for hardware that is not here, with what is refused and how it ends."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from rich.console import Console

from fulltune.cli.show import plan as display_plan
from fulltune.footprint.trace import PlannedModel
from fulltune.recipe.file import load_recipe
from fulltune.records.plan import Plan, Survey
from fulltune.report.format import pages
from tests import tiny
from tests.contract.command import Result, fulltune
from tests.train import runs

EXAMPLES = Path(__file__).parents[2] / "examples"
SEVEN_B = EXAMPLES / "plan-7b.yaml"
KNOWN: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _traced_once() -> Iterator[None]:
    """A model is traced once for all tests here: tracing has tests of its own."""
    footprint = PlannedModel.footprint

    def remembered(self: PlannedModel, recipe: Any, *chosen: str) -> Any:
        key = f"{recipe.model} {recipe.method} {recipe.train.activation_checkpointing} {chosen}"
        if key not in KNOWN:
            KNOWN[key] = footprint(self, recipe, *chosen)
        return KNOWN[key]

    with mock.patch.object(PlannedModel, "footprint", remembered):
        yield


@pytest.fixture
def recipe(tmp_path: Path, tiny_encoder: Path) -> Iterator[Path]:
    """Of a tiny model, by the rule of thumb: the commands are what is tested."""
    tiny.write_csv(tmp_path / "train.csv", tiny.topic_rows(40))
    train = {"device": "auto", "precision": "auto"}
    with runs.without_tracing():
        yield tiny.write_recipe(tmp_path / "recipe.yaml", tiny_encoder, "train.csv", train=train)


def seven_b(*options: object) -> Result:
    return fulltune("plan", SEVEN_B, "--rows", 50_000, "--tokens", 512, *options)


def shown(result: Result, width: int = 80) -> str:
    """What a terminal of so many columns would show of a plan's JSON."""
    found = json.loads(result.out)
    survey = Survey.model_validate(found.pop("survey"))
    screen = Console(file=StringIO(), width=width)
    pages.print_parts(screen, display_plan.build_plan_sections(survey, Plan.model_validate(found) if found else None))
    return screen.file.getvalue()  # type: ignore[attr-defined]  # a StringIO


@pytest.mark.slow
def test_plan_ends_with_a_command_that_can_be_copied() -> None:
    result = seven_b("--for", "1x MI325X", "--set", "train.max_grad_norm=0.5", "--json")
    assert result.code == 0, result.err
    survey = json.loads(result.out)["survey"]
    words = shlex.split(survey["command"])
    assert words[:3] == ["fulltune", "run", str(SEVEN_B)]
    assert load_recipe(SEVEN_B, words[4::2]).train.max_grad_norm == 0.5
    page = shown(result)
    lines = page.replace(" \\\n  ", " ").splitlines()
    assert survey["command"] in lines


@pytest.mark.long
def test_7b_that_does_not_fit_ends_with_3_and_alternatives() -> None:
    result = seven_b("--for", "1x RTX 4080, 16GB host, 50GB disk")
    assert result.code == 3
    assert "alternatives" in result.out
    assert "frees" in result.out
    assert len(result.problems) == 1
    assert "but only 15.5 GiB of GPU memory is available" in result.problems[0]


@pytest.mark.long
@pytest.mark.parametrize("several", ["methods=[full, lora]", "method.learning_rate=search"])
def test_lora_is_an_alternative_beside_a_budget_and_can_be_followed(several: str) -> None:
    asked = ("--for", "1x RTX 4090, 64GB host", "--set", several, "--set", "compare.budget=2h")
    found = seven_b(*asked)
    assert found.code == 3
    lines = found.out.replace(" \\\n ", "").splitlines()
    (flags,) = (line for line in lines if "--set method=lora" in line)
    assert seven_b(*asked, *shlex.split(flags)[1:]).code == 0


SCALE = EXAMPLES.parent / "docs" / "guides" / "scale.md"
ROWS_OF_SCALE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in SCALE.read_text(encoding="utf-8").splitlines()
    if re.match(r"\| 70?B \| `", line)
]
assert len(ROWS_OF_SCALE) >= 6, f"{SCALE}: the table of plans is not found"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS_OF_SCALE[::2], ids=" ".join)
def test_page_on_scale_says_what_the_plan_says(row: list[str]) -> None:
    model, hardware, rows, place, gib, sent, seconds, speed = row
    recipe = EXAMPLES / ("plan-7b.yaml" if model == "7B" else "plan-70b.yaml")
    counts = [int(count) for count in re.findall(r"(\d+)x", hardware)]
    given = {"placement": place, "num_processes": math.prod(counts), "num_machines": math.prod(counts[:-1])}
    own = [word for name, value in given.items() for word in ("--set", f"train.{name}={value}")]
    own = own if place in ("zero2", "zero3", "fsdp2") else []
    options = ("--rows", 50_000, "--tokens", 512 if model == "7B" else 2048, "--for", hardware.strip("`"), *own)
    result = fulltune("plan", recipe, "--set", f"train.global_batch_size={rows}", *options, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    plan = Plan.model_validate({name: value for name, value in found.items() if name != "survey"})
    assert plan.memory is not None
    assert plan.time is not None
    assert plan.placement == place.partition(",")[0]
    assert ("8-bit" in place) == (plan.optim == "adamw_8bit")
    assert ("offload" in place) == (plan.offload != "none")
    assert plan.memory.peak / 2**30 == pytest.approx(float(gib), abs=0.06)
    assert plan.sent_bytes / 1e9 == pytest.approx(0.0 if sent == "-" else float(sent.replace(",", "")), abs=0.6)
    assert plan.time.train_seconds / plan.total_steps == pytest.approx(float(seconds), rel=0.05)
    assert plan.time.tokens_per_second == pytest.approx(float(speed.replace(",", "")), abs=51)


def test_plan_with_data_here_is_the_runs_plan_and_keeps_the_survey(recipe: Path, tmp_path: Path) -> None:
    result = fulltune("plan", recipe, "--run-folder", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert json.loads((tmp_path / "run" / "plan" / "full.json").read_text())["trial"] == found["trial"]
    survey = Survey.load(tmp_path / "run" / "plan" / "survey.json")
    assert survey.model_dump(mode="json") == found["survey"]
    assert (survey.train_rows, survey.eval_rows, survey.num_devices) == (32, 4, 1)
    assert survey.hardware.startswith("this machine: ")
    assert survey.placement == "one device, AdamW fp32"


def test_plan_for_other_hardware_needs_config_tokenizer_and_rows_but_no_weights(recipe: Path, tmp_path: Path) -> None:
    model = load_recipe(recipe).model.name
    here = tmp_path / "here"
    shutil.copytree(model, here, ignore=shutil.ignore_patterns("*.safetensors"))
    there = ("--run-folder", tmp_path / "run", "--set", f"model={here}")
    planned = fulltune("plan", recipe, *there, "--for", "1x L4", "--json")
    assert planned.code == 0, planned.err
    whole = fulltune("plan", recipe, "--run-folder", tmp_path / "whole", "--for", "1x L4", "--json")
    assert json.loads(planned.out)["num_parameters"] == json.loads(whole.out)["num_parameters"]
    assert fulltune("data", recipe, *there, "--no-labels").code == 0
    for verb in (("run",), ("plan",), ("data",)):  # the pretrained model judges labels
        refused = fulltune(*verb, recipe, *there)
        problems = [
            f"model: {here}: no weights (*.safetensors) next to config.json; only 'fulltune plan --for' works without"
        ]
        assert (refused.code, refused.problems) == (2, problems)


def test_plan_of_a_run_folder_for_other_hardware(recipe: Path, tmp_path: Path) -> None:
    assert fulltune("plan", recipe, "--run-folder", tmp_path / "run").code == 0
    result = fulltune("plan", tmp_path / "run", "--for", "2x L4")
    assert result.code == 0, result.err
    assert "2x L4, 96GB host" in result.out
    survey = Survey.load(tmp_path / "run" / "plan" / "survey.json")
    assert survey.command == "", "its recipe lies elsewhere"


@pytest.mark.parametrize(
    ("options", "problems"),
    [
        (["--rows", 10], ["--rows: a plan without data also needs --tokens"]),
        (["--for", "8x A100"], ["--for: 'A100' comes in several sizes; write A100-40GB or A100-80GB"]),
        (
            ["--rows", -5, "--for", "RTX 4900", "--price", "much"],
            [
                "--for: unknown GPU 'RTX 4900'; did you mean RTX 4090, RTX 4080 or RTX 4070 Ti?",
                "--price: 'much' is not a price; write the cost of one device per hour, such as 2.5",
                "--rows: found -5, but the number of train rows must be at least 1",
                "--rows: a plan without data also needs --tokens",
            ],
        ),
    ],
)
def test_options_that_cannot_be_are_refused_all_at_once(
    recipe: Path, options: list[object], problems: list[str]
) -> None:
    result = fulltune("plan", recipe, *options)
    assert (result.code, result.problems) == (2, problems)
    assert not (recipe.parent / "runs").exists()


def test_config_alone_is_not_enough_to_train(tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.pair_rows(40))
    result = fulltune(
        *("plan", SEVEN_B, "--run-folder", tmp_path / "run", "--set", f"data.train={tmp_path / 'rows.jsonl'}")
    )
    assert result.code == 2
    assert result.problems == [
        f"model: {EXAMPLES / 'llama-2-7b'}: no weights (*.safetensors) next to config.json; "
        "only 'fulltune plan --for' works without",
    ]
