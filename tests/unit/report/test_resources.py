"""Plan and actual: each figure with its error in percent, and nothing where there is nothing to compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fulltune.records.plan import (
    STARTING,
    DiskNeed,
    MemoryNeed,
    Plan,
    TimeNeed,
)
from fulltune.report.format.blocks import Paragraph, Section, Table
from fulltune.report.run.about_training import build_resources_section
from fulltune.report.run.read import read_run
from tests.unit.report.conftest import environment, outcome, plan, write_lines

MIB, GIB = 2**20, 2**30
TIME = "training time (with evaluations and checkpoints)"
NEED = MemoryNeed(
    kinds={
        "weights": 90 * MIB,
        "gradients": 0,
        "optimizer": 180 * MIB,
        "activations": 200 * MIB,
        "logits": 0,
        "buffers": 30 * MIB,
    },
    phases={"loading": 90 * MIB, "step": 500 * MIB, "evaluation": 300 * MIB, "saving": 270 * MIB},
)


def time(total: float, source: str = "arithmetic") -> TimeNeed:
    return TimeNeed(
        train_seconds=total - 2, eval_seconds=1, save_seconds=1, tokens=1000, tokens_per_second=10.0, source=source
    )


def planned(**changes: Any) -> Plan:
    disk = DiskNeed(checkpoint_bytes=GIB, num_checkpoints=4, model=GIB)
    return plan(**{"memory": NEED, "disk": disk, "time": time(150.0), **changes})


def section(folder: Path, made: Plan, *, journal: Any = (), **changes: Any) -> Section | None:
    made.save(folder / "plan" / "full.json")
    attempt = folder / "attempts" / "full-seed42-01"
    measured = {
        "memory_growth_bytes": 520 * MIB,
        "dry_run_growth_bytes": 510 * MIB,
        "disk_bytes": 4 * GIB,
        "forecast": time(95.0, "dry-run step"),
    }
    outcome(**{**measured, **changes}).save(attempt / "outcome.json")
    phases = [("loading the model", 1.0), ("training", 20.0), ("saving the model", 120.0)]
    write_lines(attempt / "metrics.jsonl", [{"kind": "phase", "name": n, "seconds": s} for n, s in phases])
    write_lines(attempt / "journal.jsonl", list(journal))
    return build_resources_section(read_run(folder))


def comparison(found: Section | None) -> dict[str, tuple[Any, ...]]:
    assert found is not None
    table = next(block for block in found.blocks if isinstance(block, Table) and "planned and actual" in block.caption)
    return {str(row[0]): row[1:] for row in table.rows}


def test_plan_dry_run_and_actual_stand_side_by_side_with_their_errors(tmp_path: Path) -> None:
    assert comparison(section(tmp_path, planned())) == {
        "memory of the training process (without libraries)": ("500 MiB", "510 MiB", "520 MiB", "-4%", "-2%"),
        TIME: ("2 min 30 s", "1 min 35 s", "1 min 40 s", "+50%", "-5%"),
        "disk": ("5 GiB", "-", "4 GiB", "+25%", "-"),
    }


def test_memory_of_several_processes_is_that_of_the_largest(tmp_path: Path) -> None:
    made = planned(num_processes=2, placement="fsdp2", sent_bytes_per_micro_batch=3 * GIB)
    found = section(tmp_path, made, memory_growth_per_process=(520 * MIB, 600 * MIB))
    assert comparison(found)["memory of the training process (without libraries)"][2] == "600 MiB"


def test_a_resumed_attempt_is_not_held_against_the_time_of_the_whole_run(tmp_path: Path) -> None:
    journal = [{"time": "t", "event": "resume", "detail": "from checkpoint-100"}]
    found = comparison(section(tmp_path, planned(), journal=journal))
    assert found[TIME] == ("-", "1 min 35 s", "1 min 40 s", "-", "-5%")


def test_whole_command_stands_beside_what_the_plan_says_of_it(tmp_path: Path) -> None:
    parts = {STARTING: 10.0}
    environment().model_copy(update={"seconds": 200.0}).save(tmp_path / "environment.json")
    made = planned(time=time(150.0).model_copy(update={"overhead_seconds": parts}))
    found = comparison(section(tmp_path, made))
    assert found["the whole command"] == ("2 min 40 s", "-", "3 min 20 s", "-20%", "-")
    resumed = [{"time": "t", "event": "resume", "detail": "from checkpoint-100"}]
    assert "the whole command" not in comparison(section(tmp_path, made, journal=resumed))


def test_a_run_that_ended_early_says_so(tmp_path: Path) -> None:
    found = section(tmp_path, planned(), steps=120)
    assert found is not None
    assert Paragraph("The attempt ended after 120 of 300 steps; planned times are for all steps.") in found.blocks
