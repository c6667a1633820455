"""`bench/gpu_day` as on a card: what its parts make of measurements, which are made up here."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench.gpu_day import cell, memory, processes, speed
from bench.gpu_day.day import Rows
from bench.gpu_day.here import Card, Here

from fulltune.files import read_json_lines
from fulltune.plan.memory import CUDA_CONTEXT_BYTES

GIB = 2**30
H100 = Card("NVIDIA H100 80GB HBM3", 79 * GIB, 78 * GIB, (9, 0))
T4 = Card("Tesla T4", 15 * GIB, 14 * GIB, (7, 5))
HERE = Here((H100,), "580.95.05", "2.13.0+cu130", "13.0", "0.1.0", 200 * GIB, 300 * GIB, ("deepspeed", "trl"))


def rows_in(folder: Path, seconds: float = 600) -> Rows:
    return Rows(folder / "rows.jsonl", time.monotonic() + seconds)


def written(rows: Rows) -> dict[str, dict[str, Any]]:
    return {row["case"]: row for row in read_json_lines(rows.path)}


def test_plan_is_compared_with_all_that_is_taken_and_with_the_tensors_alone(tmp_path: Path) -> None:
    found = {"planned_bytes": 6 * GIB, "allocated_bytes": 5 * GIB, "reserved_bytes": 5 * GIB, "outside_bytes": GIB}

    assert cell.against_plan(found) == {
        "planned_error": 0.0,
        "planned_tensors_error": (6 * GIB - CUDA_CONTEXT_BYTES) / (5 * GIB) - 1,
    }
    assert set(cell.against_plan({"problem": "memory ran out"}).values()) == {None}


@pytest.mark.parametrize(("planned", "ok"), [(6.0, True), (6.5, True), (5.8, False), (6.7, False)])
def test_grid_expects_a_plan_that_holds_and_keeps_little_out(
    planned: float, ok: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"planned_bytes": planned * GIB, "allocated_bytes": 4 * GIB, "reserved_bytes": 5 * GIB}
    monkeypatch.setattr(memory, "measured", lambda *_, **__: found | {"outside_bytes": GIB})

    memory.grid(HERE, tmp_path / "work", rows := rows_in(tmp_path))

    assert [row["ok"] for row in written(rows).values()] == [ok] * len(memory.GRID)
    assert written(rows)["bert 110 M, bf16"]["figures"]["reserved_bytes"] == 5 * GIB


def large(here: Here, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows, and the settings of what was measured, with a plan of 20 GiB for all but AdamW, which needs 50."""

    def survey(shape: Any, *_: Any) -> dict[str, Any]:
        def planned(way: memory.Way) -> dict[str, Any]:
            on_host = 150 * GIB if "placement" in way.settings else 0
            size = 50 * GIB if way.name.endswith("AdamW fp32") else 20 * GIB
            return {"device_bytes": size, "host_bytes": on_host, "file_bytes": 2 * GIB}

        return {way.name: planned(way) for way in memory.WAYS}

    asked: dict[str, Any] = {}

    def measured(one: Any, place: Path, seconds: float, **train: Any) -> dict[str, Any]:
        asked[f"{one.name} {one.weights_dtype} {train.get('optim')} {train.get('placement')}"] = train
        taken = {"planned_bytes": 20 * GIB, "planned_host_bytes": 0, "allocated_bytes": 18 * GIB}
        return taken | {"reserved_bytes": 19 * GIB, "outside_bytes": GIB, "host_bytes": 5 * GIB}

    monkeypatch.setattr(memory, "_survey", survey)
    monkeypatch.setattr(memory, "measured", measured)
    monkeypatch.setattr(memory, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))
    memory.large(here, folder / "work", rows := rows_in(folder))
    return written(rows), asked


def test_large_shapes_are_held_to_24_gb_only_where_the_plan_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, asked = large(HERE, tmp_path, monkeypatch)

    assert len(found) == len(memory.SHAPES) * len(memory.WAYS)
    assert asked["6.7 B fp32 None zero2"] == {
        "device": "cuda",
        "memory_limit": "23.5GiB",
        "placement": "zero2",
        "offload": "optimizer",
    }
    assert "memory_limit" not in asked["1.3 B fp32 None None"]
    assert "6.7 B bf16 adamw_8bit None" in asked
    assert found["6.7 B, bf16 + 8-bit"]["ok"]
    assert found["6.7 B, bf16 + 8-bit"]["note"] == "held to 23.5GiB"
    assert found["8.0 B, AdamW fp32"]["figures"]["reserved_bytes"] is None
    assert found["8.0 B, AdamW fp32"]["figures"]["in_24_GB"] == "no"


def test_contestants_take_turns_and_ratios_are_of_one_repetition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    slow = itertools.count()

    def contestant(name: str, run: Path, precision: str) -> float:
        order.append(name)
        # The card gets slower for everybody: ratios within a repetition do not see it.
        return {"fulltune": 300.0, "trainer-tuned": 200.0, "trl": 100.0}[name] / (1 + next(slow) // 3)

    monkeypatch.setattr(speed, "_contestant", contestant)
    names = ["fulltune", "trainer-tuned", "trl"]
    speed._race(HERE, "llama", names, tmp_path, "bf16", (2, 3), rows := rows_in(tmp_path), 0, "")

    assert order == [*names, "trainer-tuned", "trl", "fulltune", "trl", "fulltune", "trainer-tuned"]
    last = written(rows)["llama, bf16, median"]["figures"]
    assert last == pytest.approx({"against_trainer-tuned_ratio": 1.5, "against_trl_ratio": 3.0})
    assert len(written(rows)) == 4


def test_placements_are_compared_with_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(here: Here, one: Any, placement: str, count: int, folder: Path) -> dict[str, Any] | str:
        if placement == "zero3":
            return "NCCL error"
        off = 1.2 if placement == "fsdp2" else 1.0
        losses = {1: 2.0, 2: 1.0 * off}
        assert one.accumulation * count == 2
        return {
            "planned_bytes": 10,
            "highest_bytes": 9,
            "planned_error": 0.1,
            "losses": losses,
            "tokens_per_second": 5.0,
        }

    monkeypatch.setattr(processes, "_trained", trained)
    monkeypatch.setattr("fulltune.selfcheck.check_all_reduce", lambda device: (True, "sum 3, expected 3"))

    processes.two(replace(HERE, cards=(H100, H100)), tmp_path / "work", rows := rows_in(tmp_path))

    found = written(rows)
    assert found["all-reduce of two processes"]["note"] == "NCCL: sum 3, expected 3"
    ok = {case.split(", ")[-1]: row["ok"] for case, row in found.items() if "llama" in case}
    assert ok == {"single x 1": True, "ddp x 2": True, "fsdp2 x 2": False, "zero2 x 2": True, "zero3 x 2": False}
    assert found["llama 150 M, bf16, fsdp2 x 2"]["figures"]["largest_loss_error"] == pytest.approx(0.2)
    assert found["llama 150 M, bf16, zero3 x 2"]["note"] == "NCCL error"
