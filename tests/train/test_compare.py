"""A whole comparison with tiny models: one line from data to the card, its files, going on, and its rate search."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from fulltune import comparing, pipeline, predict
from fulltune.compare import rate_search
from fulltune.compare_records import ArmStep, Look
from fulltune.comparing import rates, seeds, trials
from fulltune.errors import DataError, Diverged, GuardStop, InterruptedRun, RecipeError
from fulltune.recipe_file import load_recipe
from fulltune.run_folder import find_or_make
from fulltune.trials import Comparison, Search, Trial, TrialResult, Tried
from tests import tiny
from tests.contract.command import fulltune
from tests.train.runs import in_this_process

METHODS = ["base", {"kind": "full", "learning_rate": 3e-3}, {"kind": "lora", "learning_rate": 1e-2}]


def job(
    folder: Path, methods: list[Any], listener: Callable[[Mapping[str, Any]], None] = lambda event: None, **blocks: Any
) -> pipeline.Run:
    """A comparison of these methods in `folder/run`."""
    if not (folder / "model").exists():
        tiny.save_model(folder / "model", "bert")
        tiny.write_jsonl(folder / "rows.jsonl", tiny.topic_rows(120))
    path = tiny.write_recipe(
        folder / "recipe.yaml",
        folder / "model",
        folder / "rows.jsonl",
        methods=methods,
        train=blocks.pop("train", {"num_train_epochs": 2}),
        compare={"seeds": 2, "margin": 0.05, **blocks.pop("compare", {})},
        **blocks,
    )
    recipe = comparing.recipe_for(load_recipe(path))
    found, _ = find_or_make(recipe, path.read_text(encoding="utf-8"), "run", folder / "run", False)
    return pipeline.Run(recipe, found, listener=listener)


def compare(job: pipeline.Run) -> comparing.Compared:
    with in_this_process():
        return comparing.run(job, "fulltune compare recipe.yaml")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    """A comparison that was interrupted after its first trial, and finished by the same call."""
    folder = tmp_path_factory.mktemp("compare")
    seen: list[str] = []

    def interrupt(event: Mapping[str, Any]) -> None:
        if event["kind"] == "comparison":
            seen.append(event["text"])
            if event["text"].startswith("lora: seed 1"):
                raise InterruptedRun("interrupted by the test")

    with pytest.raises(InterruptedRun):
        compare(job(folder, METHODS, interrupt))
    assert [path.name for path in (folder / "run" / "attempts").iterdir()] == ["full-seed42-01"]
    return folder / "run", compare(job(folder, METHODS)).comparison


def test_interrupted_comparison_goes_on_and_trains_nothing_twice(finished: tuple[Path, Comparison]) -> None:
    folder, _ = finished
    names = sorted(path.name for path in (folder / "attempts").iterdir())
    assert names == ["full-seed42-01", "full-seed43-01", "lora-seed42-01", "lora-seed43-01"]


def test_only_the_first_trial_of_a_method_in_a_command_has_a_dry_run(finished: tuple[Path, Comparison]) -> None:
    folder, _ = finished
    requests = {path.parent.name: json.loads(path.read_text()) for path in (folder / "attempts").glob("*/request.json")}
    assert {name: request["dry_run"] for name, request in requests.items()} == {
        "full-seed42-01": True,  # of the interrupted command
        "full-seed43-01": True,
        "lora-seed42-01": True,
        "lora-seed43-01": False,
    }


def test_finished_comparison_is_not_done_again(finished: tuple[Path, Comparison]) -> None:
    folder, first = finished

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it trains again")

    with mock.patch.object(trials, "train", fail):
        assert compare(job(folder.parent, METHODS)).comparison == first


def test_record_has_each_arm_with_what_it_cost(finished: tuple[Path, Comparison]) -> None:
    folder, found = finished
    rows = {row.arm: row for row in found.rows}
    assert list(rows) == ["base", "full", "lora"]
    assert rows["full"].seeds == rows["lora"].seeds == (42, 43)
    assert rows["full"].num_trainable == rows["full"].num_parameters
    saved = (folder / "models" / "lora" / "adapter_model.safetensors").stat().st_size
    assert rows["lora"].saved_bytes == saved
    assert 0 < rows["lora"].num_trainable < rows["full"].num_trainable
    assert rows["lora"].train_flops > 0
    assert rows["full"].drift is not None
    assert found.decision.verdict in ("FULL", "PEFT", "EQUIVALENT", "UNDECIDED")
    assert {one.rule for one in found.findings} >= {"rate-not-searched", "few-seeds"}
    assert json.loads((folder / "proof.json").read_text(encoding="utf-8"))["decision"]["verdict"] in (
        folder / "card.md"
    ).read_text(encoding="utf-8")


def test_test_rows_are_opened_once_and_by_somebody(finished: tuple[Path, Comparison]) -> None:
    folder, found = finished
    (opening,) = found.openings
    assert opening.trials == ("full-seed42", "full-seed43", "lora-seed42", "lora-seed43")
    assert "@" in opening.by
    assert opening.command == "fulltune compare recipe.yaml"
    sealed = sorted(path.stem for path in (folder / "predictions" / "sealed").iterdir())
    assert sealed == ["full-seed42", "full-seed43", "lora-seed42", "lora-seed43"]


def test_metric_of_the_table_is_that_of_the_kept_model(finished: tuple[Path, Comparison]) -> None:
    """Predicting the test rows with `models/lora` gives the accuracy of one of its seeds."""
    folder, found = finished
    rows = [json.loads(line) for line in (folder.parent / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = {row["text"]: row["label"] for row in rows}
    from fulltune.store import load_texts

    test = load_texts(folder / "data" / "test")
    answers = predict.load(folder, "lora").predict([{"text": row["text"], "label": ""} for row in test])
    right = np.mean([answer["label"] == texts[row["text"]] for answer, row in zip(answers, test, strict=True)])
    lora = next(row for row in found.rows if row.arm == "lora")
    assert any(abs(value - right) < 1e-9 for value in lora.values)


@pytest.mark.parametrize(("verdict", "arm"), [("FULL", "full"), ("EQUIVALENT", "lora")])
def test_prediction_is_that_of_the_recommended_method_and_says_so(
    verdict: str, arm: str, finished: tuple[Path, Comparison], tmp_path: Path
) -> None:
    folder, found = tmp_path / "run", finished[1]
    shutil.copytree(finished[0], folder)
    decision = found.decision.model_copy(update={"verdict": verdict, "recommended": arm})
    found.model_copy(update={"decision": decision}).save(folder / "compare" / "comparison.json")
    said, named = (fulltune("predict", folder, "the sun", "--json", *more) for more in ([], ["--method", arm]))
    assert (said.code, said.out) == (0, named.out)
    assert said.problems == [f"{folder}: taking '{arm}': the verdict is {verdict} (another one: --method)"]
    assert named.problems == []


def test_page_of_the_run_folder_names_every_file(finished: tuple[Path, Comparison]) -> None:
    folder, _ = finished
    text = (Path(__file__).parents[2] / "docs" / "run-folder.md").read_text(encoding="utf-8")
    section = text.partition("## The folder of a comparison")[2].partition("\n## ")[0]
    there = [path for path in folder.iterdir() if path.name not in (".lock", "recipe.yaml", "recipe.json")]
    there += [*(folder / "compare").iterdir(), *(folder / "predictions").iterdir()]
    names = [str(path.relative_to(folder)) for path in there]
    assert not [name for name in names if f"`{name}`" not in section and f"`{name}/" not in section]


def test_models_of_other_seeds_are_deleted(finished: tuple[Path, Comparison]) -> None:
    folder, _ = finished
    assert sorted(path.name for path in (folder / "models").iterdir()) == ["full", "lora"]


# ---- the rate search -------------------------------------------------------------------------------------------


def result_of(trial: Trial, metric: float) -> tuple[Any, Any, TrialResult]:
    values = dict.fromkeys(("steps", "best_step", "peak_memory_bytes", "memory_growth_bytes", "tokens"), 1)
    values |= dict.fromkeys(("num_parameters", "num_trainable", "saved_bytes"), 1)
    more = {"train_seconds": 1.0, "tokens_per_second": 1.0, "train_flops": 1.0}
    kind = {"device": "cpu", "precision": "fp32", "weights_dtype": "fp32"}
    found = TrialResult(trial=trial, metric=metric, **values, **more, **kind)
    return None, mock.Mock(model_folder="models/none"), found


def searched(folder: Path, metric: Callable[[Trial], float]) -> tuple[list[Trial], Any]:
    """The trials of a search for LoRA's rate whose metric is this function, and its result."""
    one = job(folder, [METHODS[1], "lora"])
    line = comparing.Line(one, pipeline.prepare(one), "test")
    asked: list[Trial] = []

    def trained(_: Any, trial: Trial) -> tuple[Any, Any, TrialResult]:
        asked.append(trial)
        value = metric(trial)
        if np.isnan(value):
            raise Diverged("the loss is not finite")
        return result_of(trial, value)

    with mock.patch.object(trials, "trained", trained):
        found = rates.search(line, line.trained_arms[1], rates.expect(line))
    return asked, found


def test_search_best_in_the_middle_ends_it(tmp_path: Path) -> None:
    asked, found = searched(tmp_path, lambda trial: 1 - abs(np.log10(trial.learning_rate / 2e-3)))
    # 24 steps: ten of them is what a trial needs.
    assert [(one.learning_rate, round(one.share, 2)) for one in asked] == [(6.3e-4, 0.42), (2e-3, 0.42), (6.3e-3, 0.42)]
    assert (found.chosen, found.on_edge) == (2e-3, False)
    assert all(one.searches for one in asked)


def test_search_best_at_the_edge_goes_beyond_it_and_survives_divergence(tmp_path: Path) -> None:
    asked, found = searched(
        tmp_path, lambda trial: float("nan") if trial.learning_rate > 0.015 else 100 * trial.learning_rate
    )
    assert [one.learning_rate for one in asked] == [6.3e-4, 2e-3, 6.3e-3, 0.02]
    assert (found.chosen, found.on_edge) == (6.3e-3, False)


@contextlib.contextmanager
def whole_runs_given(trained: Callable[[comparing.Line, Trial], Any]) -> Iterator[None]:
    """Whole runs give what this says, and are kept as those that were trained."""
    rows = mock.Mock(outputs=lambda *given: mock.Mock(seconds_per_row=0.1))
    with (
        mock.patch.object(trials, "trained", trained),
        mock.patch.object(trials, "keep"),
        mock.patch.object(trials.evaluate, "bench_of"),
        mock.patch.object(trials, "outputs", rows),
    ):
        yield


def made_up(line: comparing.Line, chosen: float = 1e-2) -> dict[str, Search]:
    tried = tuple(Tried(learning_rate=rate, share=0.15, metric=0.9) for rate in (1e-3, 1e-2))
    return {"lora": Search(arm="lora", tried=tried, chosen=chosen, reason="made up")}


def test_rate_whose_whole_run_ends_below_its_short_trial_is_replaced_by_the_next_lower_one(tmp_path: Path) -> None:
    one = job(tmp_path, [METHODS[1], "lora"])
    line = comparing.Line(one, pipeline.prepare(one), "test")
    searches = made_up(line)

    def final(_: Any, trial: Trial) -> TrialResult:
        return result_of(trial, 0.1 if trial.learning_rate == 1e-2 else 0.95)[2]

    with mock.patch.object(seeds, "final", final):
        result = seeds._first(line, searches, Trial(name="lora-seed42", arm="lora", learning_rate=1e-2, seed=42))
    assert (result.metric, result.trial.learning_rate) == (0.95, 1e-3)
    assert searches["lora"].chosen == 1e-3
    assert searches["lora"].reason == "a whole run with 0.01 ended below its short trial"
    assert Search.load(line.folder / "compare" / "searches" / "lora.json") == searches["lora"]


@pytest.mark.parametrize("diverges", [42, 43])
def test_rate_at_which_a_seed_diverges_is_replaced_for_all_seeds(diverges: int, tmp_path: Path) -> None:
    one = job(tmp_path, [METHODS[1], "lora"], compare={"sequential": False})
    line = comparing.Line(one, pipeline.prepare(one), "test")
    expectation = rates.expect(line)
    searches = {"full": rate_search.without_search("full", 3e-3)} | made_up(line)
    asked: list[tuple[str, float]] = []

    def trained(_: Any, trial: Trial) -> Any:
        asked.append((trial.name, trial.learning_rate))
        if (trial.learning_rate, trial.seed) == (1e-2, diverges):
            raise Diverged("the loss came apart")
        return result_of(trial, 0.95)

    with whole_runs_given(trained), mock.patch.object(seeds, "_checked", lambda *given: given[2]):
        results, _ = seeds.run_seeds(line, searches, expectation)
    assert [(one.trial.seed, one.trial.learning_rate) for one in results["lora"]] == [(42, 1e-3), (43, 1e-3)]
    assert searches["lora"].reason == f"0.01 diverged in a whole run (seed {diverges})"
    assert len([name for name, _ in asked if name.startswith("full")]) == 2


def test_rate_that_whole_runs_chose_and_that_diverges_later_is_not_chosen_again(tmp_path: Path) -> None:
    one = job(tmp_path, [METHODS[1], "lora"], compare={"sequential": False})
    line = comparing.Line(one, pipeline.prepare(one), "test")
    tried = tuple(Tried(learning_rate=r, share=0.15, metric=m) for r, m in ((1e-3, 0.9), (1e-2, 0.5)))
    searches = {"full": rate_search.without_search("full", 3e-3)}
    searches["lora"] = Search(arm="lora", tried=tried, chosen=1e-3, reason="made up")
    begun: list[str] = []

    def trained(_: Any, trial: Trial) -> Any:
        begun.append(trial.name)
        if (trial.learning_rate, trial.seed) == (1e-2, 43):
            raise Diverged("the loss came apart")
        return result_of(trial, 0.95 if trial.learning_rate == 1e-2 else 0.9)

    with whole_runs_given(trained):
        results, _ = seeds.run_seeds(line, searches, rates.expect(line))
    mine = [name for name in begun if name.startswith("lora")]
    # Its first seed is trained again: the model was deleted when the higher rate was better.
    assert mine == ["lora-seed42", "lora-rate0.01-seed42", "lora-seed43", "lora-seed42", "lora-seed43"]
    assert [(run.trial.seed, run.trial.learning_rate) for run in results["lora"]] == [(42, 1e-3), (43, 1e-3)]
    search = searches["lora"]
    assert (search.reason, search.other_runs) == ("0.01 diverged in a whole run (seed 43)", 3)
    assert search.other_seconds == pytest.approx(2.0, abs=0.2)


def test_time_is_up_after_a_whole_run_at_another_rate_which_counts(tmp_path: Path) -> None:
    one = job(tmp_path, [METHODS[1], "lora"], compare={"sequential": False})
    line = comparing.Line(one, pipeline.prepare(one), "test", budget_seconds=100)
    arms = ("full", "lora")
    tried = tuple(Tried(learning_rate=r, share=0.15, metric=m) for r, m in ((1e-3, 0.9), (1e-2, 0.5)))
    expectation = rates.expect(line)
    begun: list[str] = []

    def trained(_: Any, trial: Trial) -> Any:
        begun.append(trial.name)
        if trial.name == "full-rate0.01-seed42":  # the last for which there is time
            comparing.line.append_line(line.folder / comparing.line.CLOCK, {"what": "", "seconds": 99.5, "ended": ""})
        return result_of(trial, 0.95 if trial.learning_rate == 1e-2 else 0.9)

    for _ in range(2):  # the second time as when it goes on later
        searches = {arm: Search(arm=arm, tried=tried, chosen=1e-3, reason="made up") for arm in arms}
        with whole_runs_given(trained):
            results, _ = seeds.run_seeds(line, searches, expectation)
        assert begun == ["full-seed42", "lora-seed42", "full-rate0.01-seed42"]
        assert {arm: [run.trial.learning_rate for run in found] for arm, found in results.items()} == {
            "full": [1e-2],
            "lora": [1e-3],
        }


def test_before_full_is_said_the_others_rates_are_chosen_by_whole_runs_too(tmp_path: Path) -> None:
    one = job(tmp_path, [METHODS[1], "lora", "adapter"])
    line = comparing.Line(one, pipeline.prepare(one), "test")
    tried = tuple(Tried(learning_rate=r, share=0.15, metric=m) for r, m in ((1e-3, 0.9), (1e-2, 0.5)))
    searches = {"full": rate_search.without_search("full", 3e-3)}
    searches |= {arm: Search(arm=arm, tried=tried, chosen=1e-3, reason="made up") for arm in ("lora", "adapter")}
    counts: list[dict[str, int]] = []

    def trained(_: Any, trial: Trial) -> Any:
        metric = {"full": 0.95, "lora": 0.8, "adapter": 0.7}[trial.arm]
        return result_of(trial, metric + (0.2 if (trial.arm, trial.learning_rate) == ("adapter", 1e-2) else 0.0))

    def look(_: Any, results: Any, __: Any, *, again: bool) -> Look:
        counts.append({arm: len(found) for arm, found in results.items()} | {"again": again})
        wanted = {"full": 2, "lora": 2} if len(counts) == 1 else {"adapter": 2} if again else {}
        steps = tuple(
            ArmStep(arm=arm, decision="more" if wanted.get(arm, 0) > len(found) else "wait", seeds=wanted.get(arm, 1))
            for arm, found in results.items()
        )
        enough = not any(step.decision == "more" for step in steps)
        count = len(results["full"])
        return Look(num_seeds=count, max_seeds=2, spent=0.01, enough=enough, reason="made up", arms=steps)

    with whole_runs_given(trained), mock.patch.object(seeds, "_look", look):
        results, _ = seeds.run_seeds(line, searches, rates.expect(line))
    assert counts == [
        {"full": 1, "lora": 1, "adapter": 1, "again": False},
        {"full": 2, "lora": 2, "adapter": 1, "again": False},
        {"full": 2, "lora": 2, "adapter": 2, "again": True},  # better than the leader, by whole runs
    ]
    assert [run.trial.learning_rate for run in results["adapter"]] == [1e-2, 1e-2]


def test_given_rate_that_diverges_is_the_users_to_change(tmp_path: Path) -> None:
    one = job(tmp_path, METHODS)
    line = comparing.Line(one, pipeline.prepare(one), "test")
    searches = {arm: rate_search.without_search(arm, 1e-2) for arm in ("full", "lora")}
    with (
        mock.patch.object(trials, "trained", mock.Mock(side_effect=Diverged("the loss came apart"))),
        pytest.raises(Diverged, match="the loss came apart"),
    ):
        seeds.run_seeds(line, searches, rates.expect(line))


def test_other_guards_are_no_matter_of_the_rate(tmp_path: Path) -> None:
    one = job(tmp_path, [METHODS[1], "lora"])
    line = comparing.Line(one, pipeline.prepare(one), "test")
    with (
        mock.patch.object(trials, "trained", mock.Mock(side_effect=GuardStop("the process crashed"))),
        pytest.raises(GuardStop, match="the process crashed"),
    ):
        rates.search(line, line.trained_arms[1], rates.expect(line))


@pytest.mark.parametrize(("lower_metric", "rate"), [(0.91, 1e-3), (0.89, 1e-2)])  # neither clearly better
def test_best_rate_of_the_search_is_checked_by_a_whole_run_at_the_second_best(
    lower_metric: float, rate: float, tmp_path: Path
) -> None:
    one = job(tmp_path, [METHODS[1], "lora"])
    line = comparing.Line(one, pipeline.prepare(one), "test")
    tried = tuple(Tried(learning_rate=r, share=0.12, metric=m) for r, m in ((1e-3, 0.5), (1e-2, 0.8)))
    searches = {"lora": Search(arm="lora", tried=tried, chosen=1e-2, reason="best of 2 rates", on_edge=True)}
    asked: list[str] = []

    def final(_: Any, trial: Trial) -> TrialResult:
        asked.append(trial.name)
        return result_of(trial, 0.9 if trial.learning_rate == 1e-2 else lower_metric)[2]

    with mock.patch.object(seeds, "final", final):
        result = seeds._first(line, searches, Trial(name="lora-seed42", arm="lora", learning_rate=1e-2, seed=42))
        assert (asked, searches["lora"].other_runs) == (["lora-seed42"], 0)
        results = [result]
        seeds._check(line, searches, results)
    assert asked == ["lora-seed42", "lora-rate0.001-seed42"]
    assert (results[0].trial.learning_rate, searches["lora"].chosen) == (rate, rate)
    assert (searches["lora"].other_runs, searches["lora"].other_seconds) == (1, 1.0)


def test_whole_runs_climb_while_they_get_better_and_one_that_diverged_is_kept(tmp_path: Path) -> None:
    one = job(tmp_path, [METHODS[1], "lora"])
    line = comparing.Line(one, pipeline.prepare(one), "test")
    tried = tuple(Tried(learning_rate=r, share=0.12, metric=m) for r, m in ((1e-4, 0.3), (3e-4, 0.2), (1e-3, 0.2)))
    metrics = {1e-4: 0.05, 3e-4: 0.5, 1e-3: 0.99}
    begun: list[str] = []

    def trained(_: Any, trial: Trial) -> Any:
        begun.append(trial.name)
        if trial.learning_rate not in metrics:
            raise Diverged("the loss came apart")
        return result_of(trial, metrics[trial.learning_rate])

    found = []
    with whole_runs_given(trained):
        for _ in range(2):  # the second time as when it goes on later
            searches = {"lora": Search(arm="lora", tried=tried, chosen=1e-4, reason="best of 3 rates")}
            first = trials.final(line, Trial(name="lora-seed42", arm="lora", learning_rate=1e-4, seed=42))
            found.append(seeds._checked(line, searches, first))
    assert begun == ["lora-seed42", "lora-rate0.0003-seed42", "lora-rate0.001-seed42", "lora-rate0.0032-seed42"]
    assert [one.trial.learning_rate for one in found] == [1e-3, 1e-3]
    search = searches["lora"]
    assert [one.learning_rate for one in search.whole] == [1e-4, 3e-4, 1e-3, 3.2e-3]
    assert (search.chosen, search.on_edge, search.reason) == (1e-3, False, "the best of 4 whole runs")
    assert search.other_seconds > 2 * found[0].train_seconds  # that of the one that diverged as well


@pytest.mark.parametrize(("num_seeds", "checked"), [(1, {"full", "lora", "adapter"}), (2, {"full", "lora"})])
def test_rates_are_checked_of_those_that_go_on(num_seeds: int, checked: set[str], tmp_path: Path) -> None:
    one = job(tmp_path, [METHODS[1], "lora", "adapter"], compare={"seeds": num_seeds})
    line = comparing.Line(one, pipeline.prepare(one), "test")
    tried = tuple(Tried(learning_rate=r, share=0.12, metric=m) for r, m in ((1e-3, 0.5), (1e-2, 0.8)))
    arms = ("full", "lora", "adapter")
    searches = {arm: Search(arm=arm, tried=tried, chosen=1e-2, reason="", on_edge=True) for arm in arms}
    asked: list[str] = []

    def final(_: Any, trial: Trial) -> TrialResult:
        asked.append(trial.name)
        return result_of(trial, 0.9 if trial.learning_rate == 1e-2 else 0.91)[2]

    def leader_goes_on(*given: Any, again: bool) -> Look:
        counts = {arm: len(found) for arm, found in given[1].items()}
        more = {} if counts["full"] == num_seeds else {"full": 2, "lora": 2}
        return Look(
            num_seeds=counts["full"],
            max_seeds=num_seeds,
            spent=0.01,
            enough=not more,
            reason="made up",
            arms=tuple(
                ArmStep(arm=arm, decision="more" if arm in more else "wait", seeds=more.get(arm, count))
                for arm, count in counts.items()
            ),
        )

    with mock.patch.object(seeds, "final", final), mock.patch.object(seeds, "_look", leader_goes_on):
        results, _ = seeds.run_seeds(line, searches, rates.expect(line))
    assert {name.split("-")[0] for name in asked if "rate0.001" in name} == checked
    assert {arm: found[0].trial.learning_rate for arm, found in results.items()} == {
        arm: 1e-3 if arm in checked else 1e-2 for arm in searches
    }


def test_time_is_counted_whole_and_from_the_first_command_on(finished: tuple[Path, Comparison]) -> None:
    folder, found = finished
    entries = [json.loads(line) for line in (folder / "compare" / "clock.jsonl").read_text().splitlines()]
    assert found.seconds == pytest.approx(sum(entry["seconds"] for entry in entries), abs=0.1)
    last = datetime.fromisoformat(entries[-1]["ended"])
    wall = (last - datetime.fromisoformat(found.started)).total_seconds()
    assert found.seconds == pytest.approx(wall, abs=4)  # both commands, and what lay between their trials


# ---- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "problem"),
    [
        ([], "methods: names nothing to compare"),
        (["base", "full"], "methods: names nothing to compare full fine-tuning with"),
        (["base", "full", "head"], "methods: names nothing to compare full fine-tuning with"),
        (["base", "lora"], "methods: a comparison has 'full' exactly once"),
    ],
)
def test_recipe_without_a_comparison_is_refused(tmp_path: Path, methods: list[Any], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        job(tmp_path, methods)


def test_lint_before_training_names_a_single_rate(tmp_path: Path) -> None:
    recipe = job(tmp_path, METHODS).recipe
    found = comparing.lint_recipe(recipe)
    assert {(one.rule, one.where) for one in found} >= {("rate-not-searched", "full"), ("rate-not-searched", "lora")}
    clean = job(tmp_path / "clean", ["base", "full", "lora"], compare={"seeds": 3})
    assert comparing.lint_recipe(clean.recipe) == ()


def test_generic_text_that_is_missing_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    one = job(tmp_path, METHODS, compare={"generic_text": "nowhere.txt"})
    with pytest.raises(DataError, match=r"compare\.generic_text: .*nowhere\.txt: cannot be read"):
        compare(one)
    assert not (one.folder / "attempts").exists()
