"""A budget for forgetting that holds for another task too: its rows, its head, what is chosen and certified."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from fulltune import api, data, pipeline
from fulltune.errors import DataError, FulltuneError, InterruptedRun, RecipeError
from fulltune.forgetting import budget
from fulltune.records.data import DataSummary
from fulltune.records.forgetting import OTHER_TASK, Drift, OnTask, OtherTask, Point, Preserved
from fulltune.report.run.about_forgetting import about_task, verdict
from fulltune.train.worker import within_budget
from fulltune.train.worker.frozen_head import HeadRows, fallen, right, tells_nothing
from tests import tiny
from tests.preserved import preserved_record
from tests.train import runs
from tests.train.test_forgetting_budget import BLOCKS, ROWS, numbered, preserved
from tests.train.test_resume import ask_to_stop

OTHER = [
    {"text": f"{word} of the {tiny.PLACES[0]} comes as {number}", "label": label}
    for number in range(60)
    for words, label in ((tiny.WEATHER, "out"), (tiny.FOOD, "in"))
    for word in words[:4]
]
HELD: dict[str, Any] = {"preserve": {"budget": "0.3%", "task": "other.yaml"}, **BLOCKS}


def write_other(folder: Path, rows: Any = OTHER, **blocks: Any) -> Path:
    write, name = (tiny.write_csv, "other.csv") if isinstance(rows[0]["label"], str) else (tiny.write_jsonl, "o.jsonl")
    return tiny.write_recipe(folder / "other.yaml", "model", write(folder / name, rows), **blocks)


def read(folder: Path, rows: Any = ROWS, **preserve: Any) -> OtherTask:
    """What the data stage reads of another task."""
    file = tiny.write_recipe(
        folder / "recipe.yaml",
        "model",
        tiny.write_csv(folder / "rows.csv", rows),
        preserve={"budget": "1%", "task": "other.yaml", **preserve},
    )
    recipe = api.load_recipe(file)
    found = data.other_task(recipe)
    data.refuse_trained_texts(recipe, found)
    assert found is not None
    return found


# ---- pure parts ------------------------------------------------------------------------------------------------


def at(drift: float, error: float = 0.0) -> Drift:
    return Drift(drift=drift, error=error, texts=100)


def on_task(fall: float, error: float = 0.0) -> OnTask:
    return OnTask(fall=at(fall, error), accuracy_before=0.9, accuracy=0.8)


def point(share: float, drift: float, fall: float, metric: float, error: float = 0.0) -> Point:
    return Point(share=share, measured=at(drift), metric=metric, task=on_task(fall, error))


@pytest.mark.parametrize(
    ("fall", "error", "expected"),
    [
        (0.01, 0.0, 1.0),
        (-0.2, 0.01, 1.0),  # a task that got better
        (0.05, 0.0, 0.4),  # generic text is within, the other task is not
        (0.018, 0.002, 0.4),  # the sealed rows may say no
    ],
)
def test_point_is_within_only_when_the_other_task_is(fall: float, error: float, expected: float) -> None:
    points = [point(0, 0, 0, 0.5), point(0.4, 0.002, 0.01, 0.7), point(1, 0.01, fall, 0.9, error)]
    assert budget.best(points, 0.02, True).share == expected


@pytest.mark.parametrize(
    ("drift", "fall", "error", "passed"),
    [(0.01, 0.01, 0.005, True), (0.01, 0.01, 0.007, False), (0.03, 0.0, 0.0, False), (0.01, 0.03, 0.0, False)],
)
def test_certificate_passes_only_when_both_pass(drift: float, fall: float, error: float, passed: bool) -> None:
    found = budget.certified(at(drift), 0.02, on_task(fall, error))
    assert (found.passed, found.task_upper) == (passed, pytest.approx(fall + 1.645 * error))


def test_fall_is_compared_row_by_row() -> None:
    labels = np.array([0, 1, 1])
    before = right(np.log([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]]), labels)
    after = right(np.log([[0.8, 0.2], [0.3, 0.7], [0.5, 0.5]]), labels)
    assert before == pytest.approx(np.array([[0.9, 1], [0.8, 1], [0.6, 1]]))
    found = fallen(before, after)
    assert (found.fall.drift, found.fall.texts) == (pytest.approx(0.1), 3)
    assert found.fall.error == pytest.approx(0.0, abs=1e-9)  # all fell alike, however different they are
    assert (found.accuracy_before, found.accuracy) == (1.0, pytest.approx(2 / 3))


@pytest.mark.parametrize(
    ("accuracy", "frequent", "rows", "tells"), [(0.9, 0.5, 100, True), (0.55, 0.5, 100, False), (0.5, 0.9, 100, False)]
)
def test_head_that_is_no_better_than_the_most_frequent_label_tells_nothing(
    accuracy: float, frequent: float, rows: int, tells: bool
) -> None:
    why = tells_nothing(accuracy, frequent, rows)
    assert (why == "") is tells
    assert tells or "not clearly more than the most frequent label" in why


def record(chosen: Point, points: list[Point], sealed: Drift, task: OnTask) -> Preserved:
    return preserved_record(points, chosen, certificate=budget.certified(sealed, 0.02, task), task="other.yaml")


def test_verdict_and_report_name_the_other_task() -> None:
    points = [point(0, 0, 0, 0.5), point(0.5, 0.01, 0.008, 0.7), point(1, 0.012, 0.06, 0.9)]
    said = verdict(record(points[1], points, at(0.012, 0.001), on_task(0.01, 0.002)))
    assert "PASS" in said
    assert (
        "; of the other task the right label's probability fell by 1.00%, accuracy 90.0% before and 80.0% after (with "
        "95% certainty it fell by at most 1.33%), on 100 sealed rows" in said
    )
    assert "FAIL" in verdict(record(points[1], points, at(0.012, 0.001), on_task(0.03)))
    told = about_task(record(points[1], points, at(0.0), on_task(0.0)))
    assert "With the trained model the right label's probability fell by 6.00%" in told
    assert "Of the model that is kept the right label's probability fell by 0.80%" in told
    vague = point(0.5, 0.001, 0.001, 0.7, error=0.005)
    coarse = verdict(record(vague, [points[0], vague, points[2]], at(0.0), on_task(0.0)))
    assert "The other task is coarse for this budget (100 rows, standard error 0.50%): about 299 rows in each" in coarse


def test_record_of_an_earlier_version_still_loads(tmp_path: Path) -> None:
    points = [point(0, 0, 0, 0.5), point(1, 0.01, 0.0, 0.9)]
    values = json.loads(record(points[1], points, at(0.01), on_task(0.0)).model_dump_json())
    del values["task"]
    for part in (*values["points"], values["chosen"], values["certificate"]):
        del part["task"]
    del values["certificate"]["task_upper"]
    (tmp_path / "old.json").write_text(json.dumps(values), encoding="utf-8")
    found = Preserved.load(tmp_path / "old.json")
    assert found.task is found.chosen.task is None
    assert "other task" not in verdict(found)


# ---- rows ------------------------------------------------------------------------------------------------------


def test_rows_are_shared_out_alike_and_no_text_is_in_two_parts(tmp_path: Path) -> None:
    write_other(tmp_path)
    found = read(tmp_path)
    parts = (found.fitting, found.choosing, found.sealed)
    assert tuple(map(len, parts)) == (240, 120, 120)
    assert len({text for part in parts for text, _ in part}) == 480
    assert found.labels == ("in", "out")
    assert found.left_out == 0
    again = [*OTHER, *({**row, "text": row["text"].upper()} for row in OTHER[:50]), {"text": "", "label": "in"}]
    again += [{"text": "both", "label": "in"}, {"text": "Both", "label": "out"}]
    random.Random(0).shuffle(again)
    write_other(tmp_path, again)
    other = read(tmp_path)
    assert other.left_out == 2  # without a text, and with two labels
    for part in ("fitting", "choosing", "sealed"):
        shared = {(text.lower(), label) for text, label in getattr(found, part)}
        assert {(text.lower(), label) for text, label in getattr(other, part)} == shared


@pytest.mark.parametrize(
    ("rows", "blocks", "said"),
    [
        (
            OTHER[:300],
            {},
            "hold 300 different texts that have one label each; it takes at least 400 .200 to fit a head",
        ),
        (OTHER, {"task": "causal-lm", "data": {"text": "text"}}, "task: expected text-classification, found causal-lm"),
        (
            [{**row, "label": number / 7} for number, row in enumerate(OTHER)],
            {},
            "expected a text and one label in each row, found regression",
        ),
        (
            [{**row, "label": ["a", "b"][: 1 + number % 2]} for number, row in enumerate(OTHER)],
            {},
            "expected a text and one label in each row, found multi label",
        ),
        (
            [{"premise": row["text"], "hypothesis": "so", "label": row["label"]} for row in OTHER],
            {},
            "found pairs of texts .columns premise, label, hypothesis|found pairs of texts",
        ),
        (OTHER, {"data": {"label": "lable"}}, "no column 'lable' .data.label."),
        (OTHER, {"datas": {}}, r"other\.yaml:\d+  datas: unknown setting"),
        ([{**row, "label": "in"} for row in OTHER], {}, "every row has the label 'in'"),
    ],
)
def test_other_task_that_cannot_be_read_is_refused(
    rows: Any, blocks: Mapping[str, Any], said: str, tmp_path: Path
) -> None:
    write_other(tmp_path, rows, **blocks)
    with pytest.raises((RecipeError, DataError), match=rf"preserve\.task: .*({said})"):
        read(tmp_path)


def test_other_task_without_a_file_or_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"preserve\.task: .*other\.yaml: no such file"):
        read(tmp_path)
    (tmp_path / "other.yaml").write_text("text,label\na,b\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"preserve\.task: .*expected settings such as"):
        read(tmp_path)


def test_rows_that_are_trained_on_are_refused(tmp_path: Path) -> None:
    write_other(tmp_path)
    with pytest.raises(
        DataError, match=r"preserve\.task: .*: 3 rows of data\.train have a text of it \(rows\.csv:66, "
    ):
        read(tmp_path, [*ROWS, *({**row, "label": "food"} for row in OTHER[:3])])
    probe = numbered(tmp_path / "probe.txt", 200)
    replayed = tmp_path / "replay.txt"
    replayed.write_text("".join(f"{row['text']}\n" for row in OTHER[:5]), encoding="utf-8")
    with pytest.raises(DataError, match=r"preserve\.task: .*: 5 rows have a text that is replayed as generic"):
        read(tmp_path, probe=str(probe), replay=str(replayed))


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ({"preserve": {"task": "other.yaml"}}, "preserve.task: has no effect without preserve.budget"),
        (
            {"task": "causal-lm", "preserve": {"budget": "1%", "task": "other.yaml"}},
            "preserve.task: is for models that do not write",
        ),
        ({"task": "seq2seq", "preserve": {"budget": "1%", "task": "other.yaml"}}, "preserve.budget: not yet for seq2"),
        ({"task": "image-classification", "preserve": {"task": "o.yaml"}}, "preserve: is for tasks with text"),
    ],
)
def test_recipe_that_another_task_cannot_go_with_is_refused(
    blocks: Mapping[str, Any], said: str, tmp_path: Path
) -> None:
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", "model", tiny.write_csv(tmp_path / "rows.csv", ROWS), **blocks)
    with pytest.raises(RecipeError) as refused:
        api.load_recipe(recipe)
    assert said in str(refused.value)


# ---- runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held")
    write_other(folder)
    runs.run(folder, tiny_encoder, ROWS, until="report", **HELD)
    return folder


def test_whoever_reads_the_summary_of_a_run_knows_how_many_rows_there_are(tiny_encoder: Path, tmp_path: Path) -> None:
    write_other(tmp_path)
    one = runs.job(tmp_path, tiny_encoder, ROWS, **HELD)
    made = pipeline.prepare(one)
    assert made.other_task_rows == 480
    assert DataSummary.of_run(one.folder) == made
    (one.folder / "data" / OTHER_TASK).unlink()
    assert DataSummary.of_run(one.folder).other_task_rows == 0


@pytest.mark.slow
def test_run_goes_back_farther_where_generic_text_is_within_and_the_other_task_is_not(held: Path) -> None:
    found = preserved(held)
    by_text = budget.best([one.model_copy(update={"task": None}) for one in found.points], found.limit, False)
    assert by_text.task is None
    kept_by_text = next(one for one in found.points if one.share == by_text.share)
    assert not budget.both_within(kept_by_text, found.limit)
    assert found.chosen.share != by_text.share
    assert budget.both_within(found.chosen, found.limit)
    assert found.start.task == OnTask(
        fall=Drift(drift=0.0, error=0.0, texts=120),
        accuracy_before=found.start.task.accuracy_before,
        accuracy=found.start.task.accuracy_before,
    )
    assert found.certificate is not None
    assert found.certificate.task is not None
    assert found.certificate.task.fall.texts == 120
    assert found.certificate.passed
    report = (held / "run" / "report.md").read_text(encoding="utf-8")
    assert "of the other task the right label's probability" in report
    assert "240 of its rows fit a head" in (held / "run" / "resolved.json").read_text(encoding="utf-8")


@pytest.mark.long
@pytest.mark.slow
def test_sealed_rows_are_read_once_and_certify_what_they_say(tiny_encoder: Path, tmp_path: Path) -> None:
    """Planted: the selection rows do not move, the sealed ones fall."""
    write_other(tmp_path)
    reads: list[str] = []
    sealed_texts = len(read(tmp_path).sealed)

    def planted(self: HeadRows, *_: Any) -> np.ndarray:
        is_sealed = self is planted_head.sealed
        reads.append("sealed" if is_sealed else "choosing")
        falls = is_sealed and reads.count("sealed") == 2
        return np.tile([0.5 if falls else 0.9, 1.0], (len(self.labels), 1))

    planted_head: Any = None
    whole = within_budget._chosen

    def chosen(attempt: Any, *given: Any) -> Preserved:
        nonlocal planted_head
        planted_head = attempt.frozen_head
        return whole(attempt, *given)

    with mock.patch.object(HeadRows, "read", planted), mock.patch.object(within_budget, "_chosen", chosen):
        runs.run(tmp_path, tiny_encoder, ROWS, until="report", **HELD)
    assert reads == [*(len(reads) - 2) * ["choosing"], "sealed", "sealed"]
    found = preserved(tmp_path)
    assert found.certificate is not None
    assert found.certificate.task is not None
    assert found.certificate.task.fall.texts == sealed_texts
    assert found.certificate.upper <= found.limit  # generic text alone would have passed
    assert not found.certificate.passed
    assert "FAIL" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    with mock.patch.object(within_budget, "_of_sealed", side_effect=AssertionError("opened again")):
        runs.run(tmp_path, tiny_encoder, ROWS, **HELD)
    assert preserved(tmp_path) == found


@pytest.mark.long
def test_run_goes_on_with_the_same_rows_only(tiny_encoder: Path, tmp_path: Path, held: Path) -> None:
    write_other(tmp_path)
    with pytest.raises(InterruptedRun):
        runs.run(tmp_path, tiny_encoder, ROWS, options={"listener": runs.at_step(11, ask_to_stop)}, **HELD)
    write_other(tmp_path, [{**row, "label": "out"} if number == 7 else row for number, row in enumerate(OTHER)])
    with pytest.raises(FulltuneError, match=r"preserve\.task: .*other\.yaml: the rows changed since this run began"):
        runs.run(tmp_path, tiny_encoder, ROWS, **HELD)
    write_other(tmp_path)
    runs.run(tmp_path, tiny_encoder, ROWS, **HELD)
    assert preserved(tmp_path).points == preserved(held).points
    assert preserved(tmp_path).certificate == preserved(held).certificate


@pytest.mark.slow
def test_task_that_the_untouched_model_does_not_know_is_told(tiny_encoder: Path, tmp_path: Path) -> None:
    drawn = random.Random(0)
    write_other(tmp_path, [{**row, "label": drawn.choice(["one", "two"])} for row in OTHER])
    with mock.patch("fulltune.train.worker.attempt.keep_within", return_value=None):
        runs.run(tmp_path, tiny_encoder, ROWS, **HELD)
    said = [event["text"] for event in runs.events(tmp_path, "warning")]
    assert any("the task tells nothing about forgetting" in text for text in said)
