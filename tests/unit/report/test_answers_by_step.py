"""Answers that were generated during training: what the report, the card and the terminal show of them."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from fulltune import report
from fulltune.cli.show.run import Display
from fulltune.records.events import Answered, Evaluated
from fulltune.records.scores import Answer
from fulltune.report.run.read import read_run

EXACT_MATCH, LOSS = (0.02, 0.1, 0.2, 0.3, 0.31, 0.32, 0.33, 0.29, 0.28), (3.2, 2.0, 1.6, 1.7, 1.8, 1.8, 1.9, 2.0, 2.1)


def answers_line(step: int, said: str, unfinished: int = 0, prompts: int = 5) -> dict[str, Any]:
    samples = [{"text": f"prompt {number}", "expected": "42", "predicted": said} for number in range(prompts)]
    return {"kind": "answers", "step": step, "answers": samples, "rows": 100, "unfinished": unfinished, "took": 30.0}


def lines(kit: SimpleNamespace, first: int = 0, last: int = 800, said: str = "at", **changes: Any) -> list[Any]:
    """Lines of an attempt that evaluates every 100 steps."""
    found: list[Any] = []
    for step in range(first, last + 1, 100):
        found += [kit.train_line(step, 1.0)] if step else []
        found.append(answers_line(step, f"{said} {step}", **changes))
        found.append(kit.eval_line(step, loss=LOSS[step // 100], exact_match=EXACT_MATCH[step // 100]))
    return found


@pytest.fixture
def answered(causal_lm: Path, kit: SimpleNamespace) -> Path:
    """A run whose weights were chosen by exact match."""
    plan = kit.plan(task="causal-lm", metric="exact_match", greater_is_better=True, total_steps=800)
    plan.save(causal_lm / "plan" / "full.json")
    attempt = causal_lm / "attempts" / "full-seed42-01"
    kit.outcome(steps=800, best_step=600, best_metric=0.33).save(attempt / "outcome.json")
    kit.write_lines(attempt / "metrics.jsonl", lines(kit))
    return causal_lm


def markdown(folder: Path) -> str:
    return report.write_run_report(folder).with_suffix(".md").read_text(encoding="utf-8")


def test_where_loss_and_answers_disagree_is_said_and_both_curves_mark_the_kept_step(answered: Path) -> None:
    page = markdown(answered)
    assert "Loss is lowest at step 200, but exact match is highest at step 600 (33.0%)." in page
    assert "The kept weights are those of step 600." in page
    assert "saved: step 600 with 1.9" in page
    assert "saved: step 600 with 33.0%" in page
    assert "At 9 evaluations, the model answered the same 100 eval rows greedily, which took 4 min 30 s" in page
    assert "length limit" not in page


def test_kept_step_that_is_neither_best_has_its_reason(answered: Path, kit: SimpleNamespace) -> None:
    kit.outcome(steps=800, best_step=400, best_metric=0.31, weights_reason="as good, and a lower loss").save(
        answered / "attempts" / "full-seed42-01" / "outcome.json"
    )
    assert "The kept weights are those of step 400: as good, and a lower loss." in markdown(answered)
    report.write_model_card(answered, answered / "models" / "full")
    card = (answered / "models" / "full" / "README.md").read_text(encoding="utf-8")
    assert "step 400, exact match 31.0% in 100 answers to eval rows; as good, and a lower loss" in card


def test_of_equal_scores_the_kept_one_is_the_highest(answered: Path, kit: SimpleNamespace) -> None:
    path = answered / "attempts" / "full-seed42-01" / "metrics.jsonl"
    flat = [
        one | {"metrics": one["metrics"] | {"exact_match": 0.2}} if one["kind"] == "eval" else one for one in lines(kit)
    ]
    kit.write_lines(path, flat)
    kit.outcome(steps=800, best_step=200, best_metric=0.2, weights_reason="a tie").save(path.with_name("outcome.json"))
    page = markdown(answered)
    assert "Loss is lowest at step 200, and exact match is highest there (20.0%). The kept weights are those" in page
    assert "of step 200: a tie" not in page


def test_answers_are_shown_by_step_from_the_first_to_the_last_and_the_kept_one(answered: Path) -> None:
    page = markdown(answered)
    shown = page[page.index("## Answers during training") : page.index("### 3 more prompts")]
    assert page.index("## Answers during training") < page.index("## Learning curves")
    assert shown.count("[expected]\n42") == 2
    first = shown[: shown.index("prompt 1")]
    steps = [line for line in first.splitlines() if line.startswith("[step")]
    assert steps == ["[step 0]", "[step 200]", "[step 300]", "[step 500]", "[step 600, kept]", "[step 800]"]
    assert "[step 600, kept]\nat 600" in first


@pytest.mark.parametrize(("unfinished", "is_said"), [(5, False), (6, True)])
def test_many_answers_without_an_end_get_advice(
    answered: Path, kit: SimpleNamespace, unfinished: int, is_said: bool
) -> None:
    path = answered / "attempts" / "full-seed42-01" / "metrics.jsonl"
    kit.write_lines(path, lines(kit, unfinished=unfinished))
    page = markdown(answered)
    assert ("At step 600, 6.0% of the answers reached the length limit" in page) == is_said
    assert ("raise evaluate.max_new_tokens" in page) == is_said


def test_later_attempt_replaces_the_answers_that_it_repeats(answered: Path, kit: SimpleNamespace) -> None:
    second = answered / "attempts" / "full-seed42-02"
    kit.outcome(attempt=2, steps=800, best_step=600, best_metric=0.33).save(second / "outcome.json")
    kit.write_lines(second / "metrics.jsonl", lines(kit, first=500, last=700, said="again"))
    answers = read_run(answered).history.answers
    assert [one.step for one in answers] == [0, 100, 200, 300, 400, 500, 600, 700]
    assert [one.answers[0].predicted for one in answers[3:6]] == ["at 300", "at 400", "again 500"]


def test_loss_may_choose_while_answers_are_only_shown(answered: Path, kit: SimpleNamespace) -> None:
    kit.plan(task="causal-lm", metric="loss", greater_is_better=False).save(answered / "plan" / "full.json")
    kit.outcome(steps=800, best_step=200, best_metric=1.6).save(
        answered / "attempts" / "full-seed42-01" / "outcome.json"
    )
    page = markdown(answered)
    assert "but exact match is highest at step 600 (33.0%). The kept weights are those of step 200." in page
    assert "step 200, loss 1.6 on the eval rows" in page


def test_long_and_hostile_answers_are_folded_and_stay_text(answered: Path, kit: SimpleNamespace) -> None:
    path = answered / "attempts" / "full-seed42-01" / "metrics.jsonl"
    kit.write_lines(path, lines(kit, said=kit.hostile * 20))
    html = report.write_run_report(answered).read_text(encoding="utf-8")
    assert "<img" not in html
    assert html.count("<details><summary>He wrote &#34;&lt;/script&gt;") == 5 * 6


def test_terminal_shows_one_answer_below_the_metrics_in_one_line() -> None:
    console = Console(width=80, file=io.StringIO())
    display = Display(console)
    display.metric = "exact_match"
    for predicted, expected in (("[red]4\n2", "42"), ("long " * 40, "short"), ("short", "長い" * 40), ("", "")):
        answers = (Answer(text="6 * 7?", expected=expected, predicted=predicted),)
        display(Answered(step=100, answers=answers, rows=100))
        display(Evaluated(step=100, metrics={"loss": 1.5, "exact_match": 0.25}))
    display(Evaluated(step=200, metrics={"loss": 1.5}))
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]  # a StringIO
    assert shown[0] == "step   100  epoch 0.00  eval exact_match 25.0%  loss 1.5"
    assert shown[1] == "  answer: [red]4 2  expected: 42"
    assert shown[3].endswith("…  expected: short")
    assert shown[7] == "  answer: (empty)  expected: (empty)"
    assert len(shown) == 9
    assert max(map(cell_len, shown)) <= 80
