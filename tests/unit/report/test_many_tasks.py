"""Several comparisons on one base, put together."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from fulltune.errors import RecipeError
from fulltune.records.comparison import ManyTasks
from fulltune.report.comparison.many_tasks import build_tasks_section, combine_tasks, write_tasks_report
from fulltune.report.format import pages
from tests import comparisons


def together(shares: bool = True) -> ManyTasks:
    one = comparisons.comparison() if shares else comparisons.language()
    return combine_tasks({"intents": one, "topics": one})


def test_full_is_stored_once_a_task_and_parts_beside_one_base() -> None:
    found, rows = together(), {row.method: row for row in comparisons.comparison().rows}
    ways = {way.method: way for way in found.methods}
    assert list(ways) == ["full", "head", "lora", "adapter", "prompt"]
    assert ways["full"].stored_bytes == 2 * rows["full"].saved_bytes
    assert ways["lora"].stored_bytes == rows["full"].saved_bytes + 2 * rows["lora"].saved_bytes
    assert ways["lora"].bytes_per_task == rows["lora"].saved_bytes
    assert ways["lora"].train_seconds == pytest.approx(2 * rows["lora"].train_seconds, abs=0.1)


def test_variant_of_full_is_a_whole_model_for_each_task() -> None:
    one = comparisons.comparison()
    rows = [row.model_copy(update={"kind": "variant"} if row.method == "lora" else {}) for row in one.rows]
    found = combine_tasks(dict.fromkeys(("a", "b"), one.model_copy(update={"rows": tuple(rows)})))
    way = next(way for way in found.methods if way.method == "lora")
    assert way.stored_bytes == 2 * way.bytes_per_task


def test_difference_is_the_mean_with_the_error_of_independent_tasks() -> None:
    one = comparisons.comparison().decision.difference("lora")
    behind = next(way for way in together().methods if way.method == "lora").behind
    assert behind is not None
    assert behind.value == pytest.approx(one.estimate)
    # Each task's own interval, which is Student's with few seeds, and of all methods together.
    of_one = max(one.estimate - one.adjusted_low, one.adjusted_high - one.estimate)
    assert behind.high - behind.value == pytest.approx(of_one / math.sqrt(2))


def test_metrics_that_are_no_shares_are_not_averaged() -> None:
    assert all(way.behind is None for way in together(shares=False).methods)


def test_no_method_in_common_is_refused() -> None:
    one = comparisons.comparison()
    other = one.model_copy(update={"rows": tuple(row for row in one.rows if row.kind in ("base", "full"))})
    with pytest.raises(RecipeError, match="too short to train full and one other method for every task"):
        combine_tasks({"a": one, "b": other})


def test_files_and_terminal_say_the_same_in_80_columns(tmp_path: Path) -> None:
    page, record = write_tasks_report(tmp_path, together())
    assert ManyTasks.load(record) == together()
    text = page.read_text(encoding="utf-8")
    said = "Stored: weights on disk, with a shared pretrained model counted once"
    assert said in text
    assert re.search(r"\| adapter +\| +89.8 MiB \| +1.56 MiB \|", text)
    assert "full is better by [points], averaged over tasks" in text
    console = Console(width=80, record=True, file=(tmp_path / "out.txt").open("w", encoding="utf-8"))
    pages.print_parts(console, [build_tasks_section(together())])
    shown = console.export_text()
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert said in " ".join(shown.split())
