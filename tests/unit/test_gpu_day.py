"""`bench/gpu_day`: which parts run on which cards and why not, what is kept, what is stopped, and the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from bench.gpu_day import cell, day, here, memory, page, parts, speed
from bench.gpu_day.__main__ import _run_part as run_part
from bench.gpu_day.here import Card, Here

from fulltune.files import read_json_lines
from tests.contract.command import fulltune
from tests.forked_ranks import Forks

GIB = 2**30
H100 = Card("NVIDIA H100 80GB HBM3", 79 * GIB, 78 * GIB, (9, 0))
T4 = Card("Tesla T4", 15 * GIB, 14 * GIB, (7, 5))
SMALL = Card("NVIDIA GeForce RTX 3060 Laptop GPU", 6 * GIB, 5 * GIB, (8, 6))
CPU = Here((), "", "2.13.0+cpu", "", "0.1.0 (abc)", 20 * GIB, 60 * GIB, ("pytest",))


def machine(*cards: Card, **changes: Any) -> Here:
    return replace(CPU, cards=cards, driver="580.95.05", torch="2.13.0+cu130", torch_cuda="13.0", **changes)


def reasons(of: Here) -> dict[str, str]:
    """The parts that are skipped, with why."""
    return {one.part.name: one.reason for one in parts.decide(of) if one.how == "skip"}


# ---- which parts run -----------------------------------------------------------------------------------------------


def test_without_a_card_every_part_runs_on_a_stand_in() -> None:
    decisions = parts.decide(CPU)

    assert {one.how for one in decisions} == {"stand-in"}
    assert {one.reason for one in decisions} == {"no driver of a GPU was found on this machine"}


def test_one_large_card_runs_all_but_what_needs_two() -> None:
    assert reasons(machine(H100)) == {"processes": "needs 2 cards, there is 1"}
    assert reasons(machine(H100, H100)) == {}
    assert {one.how for one in parts.decide(machine(H100, H100))} == {"card"}


def test_small_card_is_skipped_part_by_part_with_both_sizes() -> None:
    skipped = reasons(machine(SMALL))

    assert set(skipped) == {"speed", "ladder", "large", "processes"}
    assert skipped["large"] == f"needs 12.0 GiB of memory, {SMALL.name} has 6.0 GiB"
    # 6 GiB are there, but not free.
    assert skipped["ladder"] == f"needs 6.0 GiB of memory, 5.0 GiB of {SMALL.name} are free"


def test_another_process_on_the_card_leaves_out_only_what_it_would_blur() -> None:
    shared = machine(replace(H100, free_bytes=70 * GIB))

    skipped = reasons(shared)
    assert set(skipped) == {"speed", "memory", "ladder", "large", "processes"}
    assert skipped["memory"].startswith(f"another process holds 9.0 GiB of {H100.name}")
    assert any("9.0 GiB are in use by another process" in note for note in here.notes(shared))
    # What the driver and a context of our own take is nobody else's.
    assert "memory" not in reasons(machine(replace(H100, free_bytes=H100.memory_bytes - GIB)))


def test_cards_of_different_kinds_are_not_measured_together() -> None:
    mixed = machine(H100, T4)

    assert reasons(mixed) == {
        "processes": f"the cards are of different kinds ({H100.name}, {T4.name}): each step would wait for the "
        "slower one"
    }
    assert any(note.startswith("cards of different kinds") for note in here.notes(mixed))
    assert day.environment(mixed, 1)["CUDA_VISIBLE_DEVICES"] == "0"
    assert day.environment(replace(mixed, hidden="3,5"), 1)["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (parts.Wanted(), ""),
        (parts.Wanted(packages=("deepspeed",)), "deepspeed not installed"),
        (parts.Wanted(device_bytes=90 * GIB), f"needs 90.0 GiB of {H100.name}, 78.0 GiB are free"),
        (
            parts.Wanted(host_bytes=120 * GIB, disk_bytes=61 * GIB),
            "needs 120.0 GiB of the host's memory, 20.0 GiB are free; needs 61.0 GiB of the disk, 60.0 GiB are free",
        ),
    ],
)
def test_single_measurements_are_left_out_with_what_they_lack(wanted: parts.Wanted, said: str) -> None:
    assert parts.obstacle(wanted, machine(H100)) == said


def test_shares_add_up_to_the_25_minutes() -> None:
    assert sum(part.minutes for part in parts.PARTS) <= parts.MINUTES == 25


# ---- a driver that torch cannot use --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"driver": ""}, ["no driver"]),
        ({"torch": "2.13.0+cpu", "torch_cuda": ""}, ["driver 470.57.02 is installed", "built without CUDA", "install"]),
        ({"hidden": ""}, ["CUDA_VISIBLE_DEVICES=''", "unset it"]),
        ({}, ["driver 470.57.02 is older than torch 2.13.0+cu130 needs", "CUDA 13.0", "update it to 580"]),
        ({"driver": "580.95.05", "torch_warning": "CUDA unknown error"}, ["torch sees no card: CUDA unknown error"]),
    ],
)
def test_why_torch_sees_no_card_and_what_to_do(changes: dict[str, str], words: list[str]) -> None:
    seen = replace(machine(), **{"driver": "470.57.02", **changes})
    found = here.why_no_card(seen)

    assert all(word in found for word in words), found
    assert {one.how for one in parts.decide(seen)} == {"stand-in"}


def test_looking_reads_each_card_and_what_is_in_use(tmp_path: Path) -> None:
    free = (78 * GIB, 20 * GIB)
    found = SimpleNamespace(name="NVIDIA H100", total_memory=79 * GIB, major=9, minor=0)
    stand_ins = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_properties": lambda index: found,
        "mem_get_info": lambda index: (free[index], 79 * GIB),
    }
    with mock.patch.multiple("torch.cuda", **stand_ins):
        seen = here.look(tmp_path)

    assert [(card.name, card.capability, card.is_shared) for card in seen.cards] == [
        ("NVIDIA H100", (9, 0), False),
        ("NVIDIA H100", (9, 0), True),
    ]
    assert seen.torch == torch.__version__
    assert Here.of(json.loads(json.dumps(seen.as_json()))) == seen


# ---- what is kept --------------------------------------------------------------------------------------------------


def names(decisions: list[parts.Decision]) -> list[str]:
    return [one.part.name for one in decisions]


def test_finished_parts_are_kept_for_the_same_card_driver_and_versions() -> None:
    of = machine(H100, H100)
    results = {f"{part.name} | {of.key}": {"status": "done", "rows": []} for part in parts.PARTS}
    results[f"memory | {of.key}"]["status"] = "stopped"
    results[f"large | {of.key}"]["status"] = "failed"
    kept = day.empty_day() | {"results": results}

    def open_parts(seen: Here, *again: str) -> list[str]:
        return names(day.to_run(kept, parts.decide(seen), seen.key, again))

    assert open_parts(of) == ["memory", "large"]
    assert open_parts(of, "speed") == ["speed", "memory", "large"]
    every = [part.name for part in parts.PARTS]
    assert open_parts(replace(of, driver="590.1")) == every
    assert open_parts(replace(of, torch="2.14.0+cu130")) == every
    assert open_parts(replace(of, fulltune="0.1.0 (def)")) == every
    assert open_parts(machine(T4, T4)) == every


def test_half_a_file_begins_anew(tmp_path: Path) -> None:
    (tmp_path / day.FILE).write_text('{"results": {"tests', encoding="utf-8")

    assert day.load(tmp_path) == day.empty_day()


# ---- a part's process ----------------------------------------------------------------------------------------------

SLEEPER = """
import subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
(folder / "pid").write_text(str(child.pid))
(folder / "parts" / "tests.jsonl").write_text('{"case": "first", "figures": {}, "ok": true, "note": ""}')
(time.sleep(60) if sys.argv[2] == "hangs" else sys.exit("no kernel image at /home/me/x.so"))
"""


@pytest.mark.parametrize(
    ("does", "status", "words"),
    [("hangs", "stopped", "not finished within"), ("fails", "failed", "ended with code 1: no kernel image at x.so")],
)
def test_part_that_hangs_or_fails_is_ended_with_all_it_started_and_keeps_its_rows(
    does: str, status: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(day, "command_of", lambda *_: [sys.executable, "-c", SLEEPER, str(tmp_path), does])
    quick = replace(parts.PARTS[0], minutes=0.04 if does == "hangs" else 1)
    said: list[str] = []
    decisions = [parts.Decision(quick, "card")]

    found = day.run(tmp_path, machine(H100), decisions, ["tests"], [], 5, lambda day: "the page", said.append)

    result = day.result_of(found, "tests", machine(H100).key)
    assert result is not None
    assert (result["status"], words in result["reason"]) == (status, True)
    assert [row["case"] for row in result["rows"]] == ["first"]
    assert not day.is_good(result)
    assert day.load(tmp_path) == json.loads(json.dumps(found))
    assert status in said[0]
    if does == "hangs":  # a process that ended by itself leaves no trace of what it had started
        until = time.monotonic() + 5
        while Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert _is_gone(int((tmp_path / "pid").read_text()))


def _is_gone(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or ") Z " in state.read_text()


def test_no_part_begins_when_the_minutes_are_over(tmp_path: Path) -> None:
    of = machine(H100)

    found = day.run(tmp_path, of, parts.decide(of), ["tests"], [], 0, page.markdown, lambda line: None)

    assert day.result_of(found, "tests", of.key)["status"] == "not begun"
    assert day.to_run(found, parts.decide(of), of.key, [])[0].part.name == "tests"


# ---- the page ------------------------------------------------------------------------------------------------------


def a_day(of: Here, **results: dict[str, Any]) -> dict[str, Any]:
    decisions = {one.part.name: {"how": one.how, "reason": one.reason} for one in parts.decide(of)}
    usual = {"status": "done", "how": "card", "reason": "", "seconds": 60.0, "rows": []}
    keyed = {f"{name} | {of.key}": usual | result for name, result in results.items()}
    return {"here": of.as_json() | {"key": of.key}, "decisions": decisions, "results": keyed}


def test_page_says_what_was_measured_and_what_was_not() -> None:
    row = {"case": "bert", "ok": False, "note": "a|b", "figures": {"planned_bytes": 3 * GIB, "planned_error": -0.12}}
    rows = [row, {"case": "llama", "ok": None, "note": "", "figures": {"planned_bytes": None, "planned_error": None}}]
    stopped = {"status": "stopped", "reason": "not finished within its 3.5 minutes"}

    text = page.markdown(a_day(machine(H100), memory={"rows": rows}, speed=stopped))

    assert "2 figures, 2 not measured; 1 not as they should be" in text
    assert "- Not as it should be: Memory planned and measured, bert: a|b." in text
    assert "| bert | 3 GiB | -12.0 % | **NO** | a\\|b |" in text
    assert "| llama | not measured | not measured |  |  |" in text
    assert "**Stopped** after 60 s: not finished within its 3.5 minutes." in text
    assert "Skipped: needs 2 cards, there is 1." in text
    assert text.count("Not run yet.") == 6


# ---- models of random weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("bert", False)])
def test_random_weights_are_written_whole_and_without_making_the_model(kind: str, tied: bool, tmp_path: Path) -> None:
    from bench.gpu_day.cell import save_random
    from bench.random_models import sized
    from transformers import AutoModel, AutoModelForCausalLM

    cell = sized("one", kind, (64, 2, 3000), (2, 16), config={"tie_word_embeddings": tied} if kind == "llama" else {})
    auto = AutoModel if kind == "bert" else AutoModelForCausalLM

    model, loaded = auto.from_pretrained(save_random(cell, tmp_path), output_loading_info=True)

    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    matrices = [value for name, value in model.named_parameters() if value.dim() > 1]
    assert all(0.015 < value.float().std() < 0.025 for value in matrices)
    assert all((value == 1).all() for name, value in model.named_parameters() if value.dim() == 1)


# ---- to its end ----------------------------------------------------------------------------------------------------


def assert_nothing_of_a_gpu(rows: list[dict[str, Any]]) -> None:
    assert rows
    measured = {name for row in rows for name, value in row["figures"].items() if value is not None}
    assert measured <= {"planned_bytes", "planned_host_bytes", "in_24_GB"}, "arithmetic needs no card, all else does"
    assert not any(row["ok"] is False for row in rows)


@pytest.mark.long
def test_the_command_without_a_card_runs_to_its_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu_day", "--folder", str(tmp_path / "day"), "--only", "tests"]
    root = Path(__file__).parents[2]
    # Even on a machine with a card this is about one without.
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "80"}

    done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    [result] = day.load(tmp_path / "day")["results"].values()
    assert result["status"] == "done"
    assert_nothing_of_a_gpu(result["rows"])
    *lines, page_at = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert page_at.startswith("the page: ")


def commands_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What parts start as processes is called here: commands, the survey, and all cells and contestants but one."""
    start, alone, measured = subprocess.run, speed._contestant, memory.measured

    def run(words: list[Any], **named: Any) -> Any:
        if "fulltune.cli.app" not in words:
            return start(words, **named)
        monkeypatch.chdir(named.get("cwd") or ".")
        done = fulltune(*words[words.index("fulltune.cli.app") + 1 :])
        return SimpleNamespace(returncode=done.code, stdout=done.out, stderr=done.err)

    def contestant(name: str, run: Path, precision: str) -> float:
        if name == speed.OURS:
            return alone(name, run, precision)
        return float(speed._trained(name, run, precision)["tokens_per_second"])

    def of_cell(cell_here: Any, folder: Path, seconds: float, **train: Any) -> dict[str, Any]:
        if "memory_limit" in train:
            return measured(cell_here, folder, seconds, **train)
        return cell._work(folder, cell_here, train)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(speed, "_contestant", contestant)
    monkeypatch.setattr(memory, "measured", of_cell)
    monkeypatch.setattr(memory, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))


@pytest.mark.long
@pytest.mark.parametrize("name", [part.name for part in parts.PARTS[1:]])
def test_each_other_part_without_a_card_runs_to_its_end_and_measures_nothing_of_a_gpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forks: Forks
) -> None:
    """In this process and its forks, as the command does it in others."""
    commands_in_this_process(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    seen = replace(here.look(tmp_path), cards=())
    (tmp_path / "here.json").write_text(json.dumps(seen.as_json()), encoding="utf-8")

    with forks.instead_of_torchrun():
        run_part(name, tmp_path, 60 * parts.STAND_IN_MINUTES)

    assert_nothing_of_a_gpu(read_json_lines(tmp_path / "parts" / f"{name}.jsonl"))
