"""The folder of a comparison: commands of a single run leave it alone, its card can be written again, and of its models
the verdict takes one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fulltune import predict
from fulltune.compare import run as comparing
from fulltune.errors import SetupError
from fulltune.recipe.file import load_recipe
from fulltune.records.comparison import Comparison
from fulltune.system.run_folder import find_or_make_folder
from tests import comparisons, tiny
from tests.contract.command import fulltune

KINDS = {"full": None, "lora": "lora", "adapter": "adapter"}


@pytest.fixture
def recipe(tmp_path: Path, tiny_encoder: Path) -> Path:
    rows = tiny.write_csv(tmp_path / "train.csv", tiny.topic_rows(40))
    return tiny.write_recipe(tmp_path / "recipe.yaml", tiny_encoder, rows, methods=["base", *KINDS])


@pytest.fixture
def unfinished(recipe: Path) -> Path:
    """A comparison that was begun: its methods have a model each, and there is no verdict."""
    checked = comparing.comparison_recipe(load_recipe(recipe))
    folder = recipe.parent / "run"
    find_or_make_folder(checked, recipe.read_text(encoding="utf-8"), "run", folder, False)
    for name, kind in KINDS.items():
        model = folder / "models" / name
        model.mkdir(parents=True)
        (model / "fulltune.json").write_text(json.dumps({"method": {"kind": kind}}), encoding="utf-8")
        if kind is not None:
            (model / "adapter_config.json").write_text("{}", encoding="utf-8")
    return folder


def decided(folder: Path, verdict: str, recommended: str) -> Path:
    """The same with a verdict."""
    found = comparisons.comparison(decision={"verdict": verdict, "recommended": recommended})
    found.save(folder / "compare" / "comparison.json")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("verb", ["run", "train", "evaluate", "plan"])
@pytest.mark.parametrize("verdict", [None, "FULL"])
def test_command_of_a_single_run_refuses_it_and_touches_nothing(
    verb: str, verdict: str | None, unfinished: Path
) -> None:
    folder = unfinished if verdict is None else decided(unfinished, verdict, "full")
    before = content(folder)
    said = fulltune(verb, folder)
    assert said.code == 2
    assert said.problems == [
        f"{folder}: belongs to a comparison, not to a single run; 'fulltune compare {folder}' resumes it, "
        f"'fulltune report {folder}' writes its report again, "
        f"'fulltune predict {folder} --method METHOD' uses its models"
    ]
    assert content(folder) == before


def test_its_rows_can_be_looked_at(unfinished: Path) -> None:
    said = fulltune("data", unfinished)
    assert said.code == 0, said.err
    assert "single label, 2 labels" in said.out


def test_report_writes_the_card_again(unfinished: Path) -> None:
    folder = decided(unfinished, "EQUIVALENT", "lora")
    said = fulltune("report", folder)
    assert said.code == 0, said.err
    written = [Path(line).name for line in said.out.splitlines()]
    assert set(written) == {"card.md", "card.html", "proof.json"}
    assert all((folder / name).exists() for name in written)
    assert Comparison.load(folder / "proof.json").decision.recommended == "lora"
    assert not (folder / "report.md").exists()
    # What docs/reference/run-folder.md says may be deleted.
    shutil.rmtree(folder / "compare")
    (folder / "card.md").unlink()
    assert fulltune("report", folder).code == 0
    assert (folder / "card.md").exists()


def test_report_of_an_unfinished_one_is_an_error(unfinished: Path) -> None:
    said = fulltune("report", unfinished)
    assert said.code == 2
    assert said.problems == [
        f"{unfinished}: contains no finished comparison (compare/comparison.json is missing); run 'fulltune compare "
        "RECIPE' to the end"
    ]
    assert not (unfinished / "report.md").exists()


def test_compare_refuses_the_folder_of_a_single_run(tmp_path: Path, tiny_encoder: Path) -> None:
    rows = tiny.write_csv(tmp_path / "train.csv", tiny.topic_rows(40))
    single = tiny.write_recipe(tmp_path / "recipe.yaml", tiny_encoder, rows)
    assert fulltune("data", single, "--run-folder", tmp_path / "run").code == 0
    said = fulltune("compare", tmp_path / "run")
    assert said.code == 2
    assert "belongs to a single run; give a recipe" in said.err


# ---- more time ---------------------------------------------------------------------------------------------------


def test_recipe_again_goes_on_in_the_folder_whose_time_was_up_but_not_in_one_with_a_verdict(
    unfinished: Path, recipe: Path
) -> None:
    (unfinished / "card.html").write_text("", encoding="utf-8")
    checked = comparing.comparison_recipe(load_recipe(recipe))
    checked = checked.model_copy(update={"output": str(unfinished.parent)})
    block = checked.compare.model_copy(update={"budget": "12m"})  # more time in the recipe is the same comparison
    checked = checked.model_copy(update={"compare": block})
    for verdict, goes_on in (("UNDECIDED", True), ("FULL", False)):
        found = comparisons.comparison(decision={"verdict": verdict}, time_was_up=True)
        found.save(unfinished / "compare" / "comparison.json")
        assert find_or_make_folder(checked, "", "again", None, False)[1] is goes_on


@pytest.mark.parametrize(
    ("verdict", "time_was_up", "budget", "said"),
    [
        ("FULL", True, "9h", "finished with the verdict FULL, which more time would not change"),
        ("UNDECIDED", False, "9h", "finished with the verdict UNDECIDED, which more time would not change"),
        ("UNDECIDED", True, "6m", "the budget of 6m is used up; to continue, raise the total, such as --budget 12m"),
        ("UNDECIDED", True, None, "the budget of 6m is used up; to continue, raise the total, such as --budget 12m"),
    ],
)
def test_budget_that_changes_nothing_is_not_ignored_in_silence(
    verdict: str, time_was_up: bool, budget: str | None, said: str, unfinished: Path
) -> None:
    made = comparisons.comparison(decision={"verdict": verdict}, time_was_up=time_was_up)
    expected = made.expectation.model_copy(update={"budget_seconds": 360.0})
    made.model_copy(update={"expectation": expected}).save(unfinished / "compare" / "comparison.json")
    expected.save(unfinished / "compare" / "expectation.json")
    found = fulltune("compare", unfinished, *(["--budget", budget] if budget else []))
    assert found.code == 0, found.err
    assert said in " ".join(found.err.split())
    assert made.decision.headline in " ".join(found.out.split())


# ---- which model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("verdict", "recommended"), [("FULL", "full"), ("PEFT", "lora"), ("EQUIVALENT", "adapter")])
def test_model_is_the_one_that_the_verdict_recommends(verdict: str, recommended: str, unfinished: Path) -> None:
    chosen = predict.choose_model_folder(decided(unfinished, verdict, recommended))
    assert chosen == (unfinished / "models" / recommended, f"the verdict is {verdict}")
    assert predict.choose_model_folder(unfinished, "lora") == (unfinished / "models" / "lora", "")


@pytest.mark.parametrize(
    ("verdict", "recommended", "problem"),
    [
        (None, "", "has several models and there is no verdict yet; name one with --method: adapter, full, lora"),
        ("UNDECIDED", "lora", "has several models and the verdict UNDECIDED chooses none of them; name one"),
        ("PEFT", "prompt", "has several models and the verdict PEFT chooses none of them; name one"),
    ],
)
def test_model_without_a_recommendation_must_be_named(
    verdict: str | None, recommended: str, problem: str, unfinished: Path
) -> None:
    if verdict is not None:
        decided(unfinished, verdict, recommended)
    with pytest.raises(SetupError) as caught:
        predict.choose_model_folder(unfinished)
    assert str(caught.value).startswith(f"{unfinished}: {problem}")


def test_only_model_is_taken_without_a_verdict(unfinished: Path) -> None:
    for name in ("full", "adapter"):
        (unfinished / "models" / name / "fulltune.json").unlink()
    assert predict.choose_model_folder(unfinished) == (unfinished / "models" / "lora", "")
