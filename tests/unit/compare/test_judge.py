"""The verdict and what surrounds it, with results that are given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from fulltune.compare import conclude, verdict
from fulltune.compare.conclude import note_verdict_without_leaks
from fulltune.compare.context import RECORD
from fulltune.compare.seeds import SeedRuns
from fulltune.compare.verdict import MethodOutputs
from fulltune.evaluate.scoring import Scoring
from fulltune.inference.store import CLUSTERS, IN_TRAIN
from fulltune.records.comparison import Search, Trial, TrialResult
from fulltune.stats import bootstrap
from fulltune.tasks import Target, embedding
from tests import comparisons
from tests.unit.compare.methods import ACCURACY, looks_of, method


def trial(name: str, rate: float, **more: Any) -> Trial:
    return Trial(name=name, method=name.partition("-")[0], learning_rate=rate, seed=42, **more)


def result(trial: Trial) -> TrialResult:
    return TrialResult(trial=trial, train_seconds=1.0, tokens_per_second=1.0, metric=0.9)


@pytest.fixture
def line(tmp_path: Path) -> Any:
    messages: list[str] = []
    (tmp_path / "data" / "test").mkdir(parents=True)
    np.save(tmp_path / "data" / "test" / CLUSTERS, np.arange(400))
    return mock.MagicMock(
        folder=tmp_path,
        alpha=0.05,
        full=SimpleNamespace(label="full"),
        trained_methods=[SimpleNamespace(label=method) for method in ("full", "lora", "adapter")],
        said=messages,
        say=messages.append,
        command="fulltune compare",
    )


@pytest.fixture(autouse=True)
def given() -> Iterator[dict[str, Any]]:
    """What is asked of the verdict's parts."""
    planned = {
        "score_baselines": mock.Mock(return_value=()),
        "load_method_outputs": mock.Mock(return_value=[]),
        "decide_verdict": mock.Mock(return_value=comparisons.undecided().decision),
        "resample_trials": mock.Mock(),
        "note_verdict_without_leaks": mock.Mock(return_value=[]),
        "log_test_access": mock.Mock(),
        "build_comparison": mock.Mock(return_value=comparisons.undecided()),
    }
    with mock.patch.multiple(conclude, **planned):
        yield planned


def ran(line: Any, looks: Any = (), searches: Any = None) -> SeedRuns:
    return SeedRuns(line, searches or {}, mock.Mock(), results=RESULTS, looks=list(looks))


RESULTS = {method: [result(trial(f"{method}-seed42", 1e-3))] for method in ("full", "lora")}


@pytest.mark.parametrize(
    ("leaked", "expected"),
    [
        (0, []),
        (1, ["without the test row whose text also occurs in train: full 74.9%, lora 25.1%; the verdict is "
             "still FULL"]),
        (200, ["without the 200 test rows whose text also occurs in train: full 50.0%, lora 50.0%; the verdict is "
               "EQUIVALENT instead of FULL"]),
        (395, ["without the 395 test rows whose text also occurs in train: too few rows remain for a verdict"]),
    ],
)  # fmt: skip
def test_verdict_without_test_rows_that_stand_in_train(
    line: Any, given: dict[str, Any], leaked: int, expected: list[str]
) -> None:
    """Full knows the first half by heart, and is as good as LoRA on the other."""
    rows = np.arange(400)
    half = rows % 2 == 1
    of: list[tuple[Any, np.ndarray]] = [("full", (rows < 200) | half), ("lora", (rows >= 200) & half)]
    methods = [method(name, name, np.stack([right] * 3)) for name, right in of]
    given["decide_verdict"].side_effect, given["resample_trials"].side_effect = (
        verdict.decide_verdict,
        bootstrap.resample_trials,
    )
    line.resamplable_metric, line.recipe.compare.margin, line.recipe.evaluate.confidence = ACCURACY, 0.2, 0.95
    line.recipe.data.near_duplicates = 1.0
    line.summary.columns = {"text": "t"}
    line.scoring.by_row = lambda outputs: outputs
    decision = conclude._verdict_on_rows(line, methods, rows, 0.05)
    np.save(line.folder / "data" / "test" / IN_TRAIN, rows < leaked)
    assert note_verdict_without_leaks(line, methods, rows, decision) == expected


def test_vectors_are_ranked_among_all_rows_before_those_in_train_are_left_out(line: Any, given: dict[str, Any]) -> None:
    target, rows = Target("query_and_positive", {"query": "q", "positive": "p"}), np.arange(60)
    drawn = np.random.default_rng(0).normal(size=(60, 2, 4)).astype(np.float32)
    outputs: dict[str, np.ndarray] = {"vectors": drawn, "ids": np.stack([rows, rows, rows + 60], axis=1)}
    line.scoring.by_row = lambda run: Scoring.by_row(mock.Mock(task=embedding, target=target), run)
    line.recipe.data.near_duplicates, line.summary.columns = 1.0, {"query": "q"}
    np.save(line.folder / "data" / "test" / IN_TRAIN, rows < 20)
    note_verdict_without_leaks(line, [MethodOutputs("full", "full", [outputs], 1.0)], rows, mock.MagicMock())
    [[unseen]] = given["resample_trials"].call_args.args[1]
    np.testing.assert_array_equal(unseen["ndcg@10"], embedding.row_scores(outputs, target)["ndcg@10"][20:])


def test_method_that_was_left_out_leaves_a_part_of_alpha_for_more_time(line: Any, given: dict[str, Any]) -> None:
    """All seeds were run, so that the last look would take all."""
    conclude.judge_on_test_rows(ran(line, looks_of(3, ends=True)))
    (opening,) = given["build_comparison"].call_args.args[-1]
    assert given["decide_verdict"].call_args.args[-1].alpha == opening.alpha > 0
    assert opening.left == pytest.approx(opening.alpha)
    line.trained_methods.pop()
    conclude.judge_on_test_rows(ran(line, looks_of(3, ends=True)))
    assert given["decide_verdict"].call_args.args[-1].alpha == looks_of(3)[-1].spent


def test_record_is_saved_before_the_model_cards_and_lost_models_get_none(line: Any) -> None:
    comparison = conclude.judge_on_test_rows(ran(line))  # there is no models/full, no models/lora
    assert type(comparison).load(line.folder / RECORD) == comparison
    assert line.said[1:] == [
        f"{method}: no model card was written, because models/{method} no longer exists" for method in RESULTS
    ]
    with mock.patch.object(conclude, "write_model_cards", side_effect=OSError("the disk is full")):
        (line.folder / RECORD).unlink()
        with pytest.raises(OSError, match="the disk is full"):
            conclude.judge_on_test_rows(ran(line))
    assert (line.folder / RECORD).exists()


def test_rate_that_was_not_searched_for_lack_of_time_leaves_a_part_of_alpha_too(
    line: Any, given: dict[str, Any]
) -> None:
    """The card says that a larger budget would search it, so there must be something left to test with."""
    line.trained_methods.pop()
    unsearched = Search(method="lora", chosen=1e-3, time_was_up=True)
    conclude.judge_on_test_rows(ran(line, looks_of(3, ends=True), {"lora": unsearched}))
    (opening,) = given["build_comparison"].call_args.args[-1]
    assert opening.left == pytest.approx(opening.alpha)
    assert ran(line, searches={"lora": unsearched}).lacks_time
    assert not ran(line).lacks_time
