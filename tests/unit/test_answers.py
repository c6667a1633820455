"""Generated answers: for which rows, what is computed of them without extra packages, how many rows a metric is of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fulltune.evaluate.language import missing_metrics, rows_to_answer
from fulltune.records.scores import Estimate
from fulltune.report.format import words
from fulltune.stats.bootstrap import resample_metrics
from fulltune.tasks import Target, causal_lm, seq2seq, written

PAIRS = Target("prompt_completion", {"prompt": "mr", "completion": "ref"})


def bench(rows: list[dict[str, Any]], wanted: int, seed: int = 42, target: Target = PAIRS) -> Any:
    recipe = SimpleNamespace(evaluate=SimpleNamespace(generate_rows=wanted), data=SimpleNamespace(split_seed=seed))
    task = seq2seq if target.problem_type == "source_target" else causal_lm
    return SimpleNamespace(recipe=recipe, target=target, texts=rows, task=task)


SORTED = [{"mr": f"name[{place // 3:03}]", "ref": f"answer {place}"} for place in range(300)]
"""Three rows after another have the same prompt, as in E2E."""


def test_answers_are_drawn_among_different_prompts() -> None:
    drawn = rows_to_answer(bench(SORTED, 20))
    prompts = [row["mr"] for row in drawn.values()]
    assert len(set(prompts)) == 20
    assert list(drawn) == sorted(drawn)
    assert max(drawn) > 150, "not the first rows of a sorted file"
    assert all(SORTED[place] is row for place, row in drawn.items())


def test_draw_depends_on_the_seed_and_the_prompts_alone() -> None:
    drawn = [row["mr"] for row in rows_to_answer(bench(SORTED, 20)).values()]
    assert [row["mr"] for row in rows_to_answer(bench(SORTED, 20)).values()] == drawn
    assert [row["mr"] for row in rows_to_answer(bench(SORTED, 20, seed=1)).values()] != drawn
    more = {row["mr"] for row in rows_to_answer(bench(SORTED, 25)).values()}
    assert set(drawn) < more
    others = {row["mr"] for row in rows_to_answer(bench(SORTED[::-1], 20)).values()}
    assert others == set(drawn)


def test_all_prompts_where_there_are_fewer_and_none_where_none_is_asked() -> None:
    assert len(rows_to_answer(bench(SORTED, 1000))) == 100
    assert rows_to_answer(bench(SORTED, 0)) == {}
    assert rows_to_answer(bench([{"text": "raw"}], 5, target=Target("text", {"text": "text"}))) == {}


def test_conversation_of_several_examples_is_asked_once() -> None:
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    silent = {"messages": [{"role": "assistant", "content": "nobody asked"}]}
    assert list(rows_to_answer(bench([silent, row, row], 5, target=Target("chat", {"messages": "messages"})))) == [1]


def test_without_the_packages_their_metrics_are_left_out_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "can_score", lambda metric: metric not in ("rougeL", "chrf", "bleu"))
    target = Target("source_target", {"source": "s", "target": "t"})
    assert set(causal_lm.score_answers(["a"], ["A "])) == {"exact_match"}
    kept = seq2seq.score_answers(["a"], ["A "])
    assert seq2seq.metrics(kept, target) == {"exact_match": 1.0}
    for scoring in (bench([], 1, target=target), bench([], 1)):
        assert missing_metrics(scoring) == (
            "not computed: rougeL, chrf, bleu (to install: pip install 'fulltune[text-metrics]')"
        )


def test_metric_of_one_row_has_no_interval() -> None:
    drawn = resample_metrics({"x": np.array([0.5])}, lambda rows: {"rougeL": rows["x"].mean()}, samples=5)
    found = drawn["rougeL"].estimate(0.9)
    assert found.rows == 1
    assert words.format_estimate("rougeL", found) == "0.5 [one row]"
    assert words.format_estimate("rougeL", Estimate(value=0.5, low=0.4, high=0.6, rows=2)) == "0.5 [0.4, 0.6]"


def test_numbers_match_by_the_last_one_whatever_their_form() -> None:
    expected = ["#### 1,250", "#### 18", "#### -3", "#### .5", "no digits", "#### 7", "#### 5"]
    answers = ["so 1250.0 dollars.", "18 eggs, 2 left", "It is \u22123.00", "0.50", "none", "", "10-5"]
    found = causal_lm.score_answers(answers, expected)["number_match"]
    assert found.tolist() == [1, 0, 1, 1, 0, 0, 1]
    prose = ["one", "two 2"], ["one", "two 2"]
    assert "number_match" not in written.score_answers(*prose), "only if most expected answers have a number"
    assert written.score_answers(*prose, chosen="number_match")["number_match"].tolist() == [0, 1]


def test_json_is_equal_by_value() -> None:
    expected = ['{"a": [1, true], "b": null}', '{"a": 1}', '{"a": 1}', "[]"]
    answers = ['{"b":null,"a":[1.0,true]}', '{"a": true}', '{"a": 1', "[" * 100_000]
    assert written.score_answers(answers, expected)["json_equal"].tolist() == [1, 0, 0, 0]
    assert "json_equal" not in written.score_answers(answers, [*expected[:2], "some", "words"])
    assert "json_equal" in written.score_answers(answers, [*expected[:2], "some", "words"], chosen="json_equal")
