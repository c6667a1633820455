"""The release suite of `bench`: results and their schema, what is run again, exit codes, the table, two releases."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from bench import results, runs, suite
from bench.results import BEGIN, END, Figure

SPEED = Figure("speed over the Trainer's", 1.02, "x", at_least=0.95)
SLOW = dataclasses.replace(SPEED, value=0.9)
MACHINE = {"cpu": "a cpu", "cores": 2, "torch": "2.13.0"}


def line(**changes: Any) -> dict[str, Any]:
    made = results.result("training_speed", SPEED, False, {"commit": "abc", "date": "2026-11-29", "machine": MACHINE})
    return made | changes


@pytest.mark.parametrize(
    ("value", "at_least", "at_most", "passed"),
    [(1, 1, None, True), (0.99, 1, None, False), (5, None, 5, True), (6, 1, 5, False), (math.nan, 0, None, False)],
)
def test_bars(value: float, at_least: float | None, at_most: float | None, passed: bool) -> None:
    assert Figure("a", value, "x", at_least, at_most).passed is passed


def test_a_figure_needs_a_bar() -> None:
    with pytest.raises(ValueError, match="without a bar"):
        Figure("a", 1, "x")


def test_a_result_has_the_schema() -> None:
    made = results.result("kill_resume", SPEED, True, results.circumstances())
    assert set(made) == {"part", "name", "figure", "unit", "bar", "passed", "quick", "commit", "date", "machine"}
    assert set(made["machine"]) == {"cpu", "cores", "torch"}
    assert made["bar"] == "at least 0.95"
    assert json.loads(json.dumps(made)) == made


class Starts:
    """Takes the place of the processes: remembers which parts were started, and returns what it was given."""

    def __init__(self, **figures: list[Figure] | None) -> None:
        self.figures, self.started = figures, list[str]()

    def __call__(self, part: str, folder: Path, quick: bool) -> list[Figure] | None:
        assert folder.is_dir()
        self.started.append(part)
        return self.figures[part]


def test_finished_parts_are_not_run_again(tmp_path: Path) -> None:
    first = Starts(predict_rows=[SPEED], kill_resume=None)
    assert suite.release(tmp_path, ["predict_rows", "kill_resume"], [], False, first) == 1
    assert [one["part"] for one in results.read(tmp_path / "results.jsonl")] == ["predict_rows"]
    second = Starts(predict_rows=[SLOW], kill_resume=[SPEED])
    assert suite.release(tmp_path, ["predict_rows", "kill_resume"], [], False, second) == 0
    assert second.started == ["kill_resume"]
    assert suite.release(tmp_path, ["predict_rows", "kill_resume"], ["predict_rows"], False, second) == 1, (
        "its bar is missed now"
    )
    assert second.started == ["kill_resume", "predict_rows"]
    assert len(results.read(tmp_path / "results.jsonl")) == 2


def test_quick_results_do_not_count_as_full_ones(tmp_path: Path) -> None:
    starts = Starts(predict_rows=[SPEED])
    assert suite.release(tmp_path, ["predict_rows"], [], True, starts) == 0
    assert suite.release(tmp_path, ["predict_rows"], [], False, starts) == 0
    assert starts.started == ["predict_rows", "predict_rows"]
    assert [one["quick"] for one in results.read(tmp_path / "results.jsonl")] == [True, False]


def test_table_stands_between_the_markers() -> None:
    page = f"# Evidence\n\n{BEGIN}\nold\n{END}\n\nMore.\n"
    made = results.with_table(page, [line(), line(figure=0.9, passed=False, quick=True)])
    assert (
        "| speed over the Trainer's | 1.02 x | at least 0.95 | `python -m bench.training_speed` | 2026-11-29 |" in made
    )
    assert "**0.9 x, missed**" in made
    assert "training_speed --quick`" in made
    assert "old" not in made
    assert made.endswith(f"{END}\n\nMore.\n")
    assert results.with_table(made, [line(), line(figure=0.9, passed=False, quick=True)]) == made
    with pytest.raises(ValueError, match="markers"):
        results.with_table("# Evidence\n", [line()])


def test_published_results_are_the_last_release(tmp_path: Path) -> None:
    page, releases = tmp_path / "page.md", tmp_path / "results"
    page.write_text(f"{BEGIN}{END}", encoding="utf-8")
    results.write(tmp_path / "measured.jsonl", [line()])
    results.publish(tmp_path / "measured.jsonl", releases, page)
    assert results.read(results.newest(releases) or tmp_path) == [line()]
    assert "1.02 x" in page.read_text(encoding="utf-8")


def test_two_releases_are_compared() -> None:
    old = [line(), line(name="gone")]
    worse, unknown, gone = results.differences(old, [line(figure=0.9, passed=False), line(name="other", unit="share")])
    assert worse == "training_speed: speed over the Trainer's: 1.02 x -> 0.9 x; MISSES ITS BAR NOW"
    assert unknown == "new: training_speed: other: 102%"
    assert gone == "not measured any more: training_speed: gone"


def test_kept_measurements_are_not_made_again(tmp_path: Path) -> None:
    assert runs.Records(tmp_path / "kept.jsonl").get("a", lambda: 1.5) == 1.5
    assert runs.Records(tmp_path / "kept.jsonl").get("a", lambda: pytest.fail("measured again")) == 1.5


def test_each_script_is_a_part_or_started_by_one() -> None:
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (results.ROOT / "bench").glob("*.py")}
    scripts = {name for name, text in texts.items() if '\nif __name__ == "__main__":' in text} - {"__main__"}
    measuring = {name for name in scripts if "\ndef measure(" in texts[name]}
    assert measuring == set(suite.PARTS)
    assert not [name for name in scripts - measuring if f'"bench.{name}"' not in "".join(texts.values())]
    for part in suite.PARTS:
        assert re.search(r"\ndef measure\(folder: Path, quick: bool[^)]*\) -> Iterator", texts[part]), part
        assert "    script(measure, __doc__" in texts[part], part


def commands_of_docs() -> dict[str, set[str]]:
    """Words behind each `bench` or `bench.PART` that a page or the Makefile names."""
    pages = [*(results.ROOT / "docs").rglob("*.md"), *results.ROOT.glob("*.md"), results.ROOT / "Makefile"]
    named: dict[str, set[str]] = {}
    for page in pages:
        text = " ".join(page.read_text(encoding="utf-8").split())
        for module, words in re.findall(r"(?:python -m |`)(bench(?:\.\w+)?)(?![\w/.])((?: -*[a-z][\w-]*)*)", text):
            named.setdefault(module, set()).update(words.split())
    return named


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", ["bench", "bench.gpu_day", *(f"bench.{part}" for part in suite.PARTS)])
def test_scripts_start_and_know_what_docs_give_them(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    helps = []
    for words in ([], ["release"], ["smoke"]) if module == "bench" else ([],):
        monkeypatch.setattr(sys, "argv", [module, *words, "--help"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        assert stop.value.code == 0
        helps.append(capsys.readouterr().out)
    assert not [word for word in commands_of_docs().get(module, ()) if word not in " ".join(helps)]


def test_docs_name_scripts_that_exist() -> None:
    known = {"bench", "bench.gpu_day", *(f"bench.{part}" for part in suite.PARTS)}
    assert set(commands_of_docs()) <= known


def test_contestants_take_turns(tmp_path: Path) -> None:
    order: list[str] = []

    def turn(name: str) -> float:
        order.append(name)
        return float(len(order))

    contestants = {name: functools.partial(turn, name) for name in "ab"}
    found = runs.interleaved(contestants, 2, runs.Records(tmp_path / "kept.jsonl"))
    assert order == ["a", "b", "b", "a"]
    assert runs.median_ratio([2, 3, 10], [1, 1, 1]) == 3
    assert found == {"a": [1.0, 4.0], "b": [2.0, 3.0]}


def test_evidence_page_has_the_figures_of_the_last_release() -> None:
    page, last = results.PAGE.read_text(encoding="utf-8"), results.newest()
    results.with_table(page, [line()])  # raises without the markers
    assert last is None or page == results.with_table(page, results.read(last)), "run `python -m bench table`"
