"""The benches of streamed training: limits that end a process, kills, curves side by side, tables."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench import runs, stream_1b, stream_7b, stream_depth, stream_rivals, stream_shapes
from bench.limited import STATE_FILE, DiskUse, Ended, limited
from bench.results import Figure

MIB = 2**20
GROWING = "import time; blocks = []\nwhile True: blocks.append(bytearray(8 << 20)); time.sleep(0.005)"


def python(text: str) -> list[str]:
    return [sys.executable, "-S", "-c", text]


@pytest.mark.parametrize("own_session", [False, True])
def test_a_child_above_the_ceiling_is_killed_with_what_started_it(tmp_path: Path, own_session: bool) -> None:
    child = f"import os, pathlib; pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(os.getpid()))\n{GROWING}"
    options = f"start_new_session={own_session}"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}], {options})"
    ended = limited(python(program), 100 * MIB, tmp_path / "log")
    assert (ended.code, ended.over) == (-9, True)
    assert ended.peak_bytes > 100 * MIB
    stat = Path("/proc") / (tmp_path / "child").read_text() / "stat"
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_memory_below_the_ceiling_is_measured(tmp_path: Path) -> None:
    ended = limited(
        python("import time; block = bytearray(64 << 20); time.sleep(0.6); print('done')"), 500 * MIB, tmp_path / "log"
    )
    assert (ended.code, ended.over) == (0, False)
    assert ended.peak_bytes > 64 * MIB
    assert (tmp_path / "log").read_text() == "done\n"


def test_private_memory_far_beyond_the_ceiling_is_refused_before_it_is_touched(tmp_path: Path) -> None:
    ended = limited(
        python("import mmap; mmap.mmap(-1, 300 << 20, flags=mmap.MAP_PRIVATE)"), 100 * MIB, tmp_path / "log"
    )
    assert (ended.code, ended.over) == (1, False)
    assert "Cannot allocate memory" in (tmp_path / "log").read_text()


def test_a_run_is_killed_when_asked(tmp_path: Path) -> None:
    ended = limited(python("import time; time.sleep(60)"), 500 * MIB, tmp_path / "log", stop=lambda: True)
    assert (ended.code, ended.over) == (-9, False)


def write_steps(run_folder: Path, attempt: int, steps: dict[int, float]) -> None:
    """A journal of steps that take two seconds, with their losses."""
    folder = run_folder / "attempts" / f"{attempt:03}"
    folder.mkdir(parents=True)
    lines = [{"kind": "train", "step": step, "loss": loss, "seconds": 2.0 * step} for step, loss in steps.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_a_step_that_was_done_again_counts_once(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, {1: 9.0, 2: 8.0, 3: 7.5})
    write_steps(tmp_path, 2, {3: 7.0, 4: 6.0})
    assert stream_1b.losses(tmp_path) == {1: 9.0, 2: 8.0, 3: 7.0, 4: 6.0}
    assert stream_1b.step_seconds(tmp_path) == 2.0
    assert math.isnan(stream_1b.step_seconds(tmp_path / "empty"))


def test_a_step_with_an_evaluation_before_it_is_not_timed(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, {1: 9.0, 2: 8.0})
    with (tmp_path / "attempts" / "001" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for event in (
            {"kind": "eval", "step": 2, "seconds": 50.0},
            {"kind": "train", "step": 3, "loss": 7.0, "seconds": 60.0},
        ):
            file.write(json.dumps(event) + "\n")
    assert stream_1b.step_seconds(tmp_path) == 2.0


def test_a_run_is_killed_within_the_step_after_the_drawn_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("bench.stream_1b.time.monotonic", lambda: now[0])
    is_now = stream_1b.kill_moment(tmp_path, 3, share=0.5)
    write_steps(tmp_path, 1, {1: 9.0, 2: 8.0})
    assert not is_now()
    write_steps(tmp_path, 2, {3: 7.0})
    assert not is_now()
    now[0] += 0.9
    assert not is_now()
    now[0] += 0.2
    assert is_now()


def test_kills_are_drawn_within_the_run() -> None:
    kills = stream_1b.drawn_kills(20)
    assert len(kills) == stream_1b.KILLS
    assert all(2 <= step < 18 and 0 <= share < 1 for step, share in kills.items())
    assert kills == stream_1b.drawn_kills(20)


def test_curves_with_other_steps_are_infinitely_different() -> None:
    rows, difference = stream_1b.side_by_side({"2": 8.0, "10": 7.0}, {"10": 7.5, "2": 8.0})
    assert (rows, difference) == ([[2, 8.0, 8.0], [10, 7.0, 7.5]], 0.5)
    assert stream_1b.side_by_side({"1": 9.0, "2": 8.0}, {"1": 9.0})[1] == math.inf
    assert stream_1b.side_by_side({}, {})[1] == math.inf


def test_shapes_have_the_published_numbers_of_parameters() -> None:
    assert stream_shapes.parameters(stream_shapes.config(22)) == 1_100_048_384
    seven = json.loads((stream_7b.SHAPE / "config.json").read_text(encoding="utf-8"))
    assert stream_shapes.parameters(seven) == 6_738_415_616


def test_fewer_blocks_are_the_same_shape(tmp_path: Path) -> None:
    config = json.loads((stream_7b.shaped(tmp_path / "shape", 2) / "config.json").read_text(encoding="utf-8"))
    assert (config["num_hidden_layers"], config["hidden_size"]) == (2, 4096)
    assert (tmp_path / "shape" / "tokenizer.json").exists()


def test_a_step_is_compared_with_the_sum_of_its_parts() -> None:
    parts = {"forward": 10.0, "backward": 20.0, "head": 2.0, "optimizer": 8.0, "parameters": 6.74e9, "blocks": 32}
    assert stream_7b.ratio(44.0, parts) == 1.1
    took = {"step_seconds": 44.0, "length": 488, "total_bytes": 3 * 2**30, "disk_bytes": 57e9}
    text = stream_7b.described(took | {"written_bytes": 165e9, "seconds": 600.0}, parts)
    assert "a step 44.0 s; pure: forward 10.0 s, backward 20.0 s, head 2.0 s, optimizer 8.0 s" in text
    assert "3.00 GiB; disk 57.0 GB, 165.0 GB written; from start to report 10.0 min" in text


def test_the_disk_of_a_run_is_its_most(tmp_path: Path) -> None:
    disk, file = DiskUse(tmp_path), tmp_path / "other"
    file.write_bytes(bytes(MIB))
    assert not any(disk() for _ in range(20))
    file.unlink()
    assert not any(disk() for _ in range(20))
    assert disk.highest >= MIB
    assert not disk.has_state
    (tmp_path / STATE_FILE).touch()
    assert not any(disk() for _ in range(20))
    assert disk.has_state
    from fulltune.stream import state

    assert state.FILE == STATE_FILE


def test_depths_are_compared_by_highest_and_lowest() -> None:
    assert stream_depth.spread([100.0, 103.0, 101.0]) == pytest.approx(0.03)
    assert "      64     800 MB      90 MB" in stream_depth.table({64: {"peak": 800_000_000, "growth": 90_000_000}})


def ended(**changes: Any) -> Ended:
    values = {"code": 0, "seconds": 9.0, "peak_bytes": 2_000_000_000, "anonymous_bytes": 1_500_000_000}
    return Ended(**{**values, "total_bytes": 0, "written_bytes": 0, "over": False, **changes})


def test_table_says_what_each_needed_or_how_it_ended() -> None:
    outcomes = {
        "fulltune": stream_rivals.outcome(ended(), {"losses": [9.0, 8.5], "seconds": 30.0}, []),
        "trainer": stream_rivals.outcome(ended(code=-9, over=True), None, []),
        "deepspeed_nvme": stream_rivals.outcome(ended(code=1), None, ["RuntimeError: no async_io", "bye"]),
    }
    _, first, second, third = stream_rivals.table(outcomes).splitlines()
    assert first.split()[3:] == ["2.00", "GB", "1.50", "GB", "30.0", "s", "loss", "8.500"]
    assert "108 GB" in second
    assert second.endswith("killed above its ceiling after 9 s")
    assert third.endswith("code 1: RuntimeError: no async_io")


def test_a_number_given_to_a_script_reaches_measure(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def measure(folder: Path, quick: bool, layers: int | None = None) -> Iterator[Figure]:
        yield Figure("layers", float(layers or 0), "blocks", at_least=1)

    for words, code in ((["--layers", "3"], 0), ([], 1), (["--layers", "0"], 2)):
        monkeypatch.setattr(sys, "argv", ["bench", *words])
        with pytest.raises(SystemExit) as stopped:
            runs.script(measure, "What.", layers="number of blocks")
        assert stopped.value.code == code
    assert "expected 1 or more, found 0" in capsys.readouterr().err
