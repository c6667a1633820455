"""Trials side by side: the same results as one after the other, and what happens when a helper fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from fulltune import pipeline
from fulltune.compare import parallel
from fulltune.compare import run as comparing
from fulltune.errors import GuardStop
from fulltune.records.comparison import Trial
from fulltune.records.events import Said
from fulltune.records.probe import Probe
from tests.train.runs import in_this_process
from tests.train.small_comparisons import METHODS, job

FULL = Trial(name="full-seed42", arm="full", learning_rate=3e-3, seed=42)
DONE = json.dumps({"kind": "", "problems": [], "said": []})
ANSWERS = f"import sys; [print({DONE!r}, flush=True) for line in sys.stdin]"
LORA = Trial(name="lora-seed42", arm="lora", learning_rate=1e-2, seed=42)


def line_of(folder: Path, said: list[str] | None = None, **compare: Any) -> comparing.Context:
    def listen(event: Any) -> None:
        if said is not None and isinstance(event, Said):
            said.append(event.text)

    one = job(folder, METHODS, listen, compare={"side_by_side": 2, **compare})
    return comparing.Context(one, pipeline.prepare(one), "test")


@pytest.mark.long
def test_trials_side_by_side_give_what_they_give_one_after_the_other(tmp_path: Path) -> None:
    found = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        one = job(folder, METHODS, compare={"side_by_side": count})
        with in_this_process():
            found[count] = comparing.run(one, "test").comparison
    alone, beside_another = found[1], found[2]
    assert (alone.side_by_side, beside_another.side_by_side) == (1, 2)
    assert alone.decision.verdict == beside_another.decision.verdict
    for mine, its in zip(alone.rows, beside_another.rows, strict=True):
        assert (mine.arm, mine.seeds) == (its.arm, its.seeds)
        assert its.values == pytest.approx(mine.values, abs=0.05)
    parents = {
        path.parent.name: json.loads(path.read_text())["parent_pid"]
        for path in (tmp_path / "2" / "run" / "attempts").glob("*/request.json")
    }
    by_helper = {name for name, parent in parents.items() if parent != os.getpid()}
    assert {name.rsplit("-", 1)[0] for name in by_helper} in (
        {"lora-seed42", "lora-seed43"},
        {"full-seed42", "full-seed43"},
    )
    assert len(parents) == 4
    card = (tmp_path / "2" / "run" / "card.md").read_text()
    assert "2 trials side by side" in card
    one, two = (Probe.load(tmp_path / str(count) / "run" / "probe" / "probe.json") for count in (1, 2))
    assert one.head is not None
    assert two.model_copy(update={"seconds": one.seconds}) == one
    heads = [(tmp_path / str(count) / "run" / "probe" / "head.safetensors").read_bytes() for count in (1, 2)]
    assert heads[0] == heads[1]


@pytest.fixture
def settled() -> Iterator[list[str]]:
    """Names of the trials that the line itself trained."""
    names: list[str] = []
    with mock.patch.object(parallel, "run_trial", lambda line, trial: names.append(trial.name)):
        yield names


def with_helper(line: comparing.Context, says: str, trials: list[Trial]) -> None:
    """A helper that prints this when it is given trials, and ends."""
    command = f"import sys; sys.stdin.readline(); sys.stdout.write({says!r})"
    with mock.patch.object(parallel, "_COMMAND", command), parallel.helpers(line) as together:
        together(trials)


def helpers_of(together: parallel.Together) -> parallel.Helpers:
    found = together.__self__  # type: ignore[attr-defined]
    assert isinstance(found, parallel.Helpers)
    return found


def test_helper_that_ends_leaves_its_trials_to_the_line(tmp_path: Path, settled: list[str]) -> None:
    said: list[str] = []
    line = line_of(tmp_path, said)
    with (
        mock.patch.object(parallel, "_COMMAND", "import sys; sys.stdin.readline()"),
        parallel.helpers(line) as together,
    ):
        together([FULL, LORA])
        assert said[-1] == "a helper process ended (see compare/helper.txt); going on without it"
        assert len(settled) == 1  # the other one has its turn later, as without helpers
        together([FULL, LORA])
        assert len(settled) == 1
    assert line.side_by_side == 2  # which the card says: a part was trained so


def test_helper_s_problem_is_the_comparison_s(tmp_path: Path, settled: list[str]) -> None:
    answer = json.dumps({"kind": "GuardStop", "problems": ["the process crashed"], "said": []}) + "\n"
    with pytest.raises(GuardStop, match="the process crashed"):
        with_helper(line_of(tmp_path), answer, [FULL, LORA])


def test_one_trial_or_little_time_is_the_line_s_alone(tmp_path: Path, settled: list[str]) -> None:
    line = line_of(tmp_path)
    with_helper(line, "", [FULL])
    line.budget_seconds = 0.0
    with_helper(line, "", [FULL, LORA])
    assert settled == []


def test_error_of_the_line_ends_the_helper(tmp_path: Path) -> None:
    line = line_of(tmp_path)
    command = "import time; time.sleep(600)"
    started: list[subprocess.Popen[str]] = []

    def run_trial(line: comparing.Context, trial: Trial) -> None:
        started.extend(helpers_of(together).processes)
        raise KeyboardInterrupt

    with (
        mock.patch.object(parallel, "_COMMAND", command),
        mock.patch.object(parallel, "run_trial", run_trial),
        pytest.raises(KeyboardInterrupt),
        parallel.helpers(line) as together,
    ):
        together([FULL, LORA])
    assert started[0].poll() is not None


@pytest.mark.skipif(sys.platform != "linux", reason="a process can ask to be ended with its parent on Linux alone")
@pytest.mark.long
def test_killed_helper_takes_its_worker_with_it_before_the_line_goes_on(tmp_path: Path) -> None:
    one = job(tmp_path, METHODS, compare={"side_by_side": 2}, train={"max_steps": 1_000_000, "num_train_epochs": None})
    line = comparing.Context(one, pipeline.prepare(one), "test")
    below: list[psutil.Process] = []

    def run_trial(line: comparing.Context, trial: Trial) -> None:
        (helper,) = helpers_of(together).processes
        while not list((line.folder / "attempts").glob("*/metrics.jsonl")):
            time.sleep(0.1)
            assert helper.poll() is None
        below.extend(psutil.Process(helper.pid).children(recursive=True))
        helper.kill()

    with mock.patch.object(parallel, "run_trial", run_trial), parallel.helpers(line) as together:
        together([FULL, LORA])
        assert len(below) == 2  # the fork server and the worker
        assert not psutil.wait_procs(below, timeout=60)[1]


def test_cores_are_shared_out_and_given_back(tmp_path: Path, settled: list[str]) -> None:
    import torch

    before, threads = os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()
    line = line_of(tmp_path, side_by_side=3)
    with mock.patch.object(parallel, "_COMMAND", ANSWERS), parallel.helpers(line) as together:
        assert (os.environ["OMP_NUM_THREADS"], torch.get_num_threads()) == ("1", 1)
        together([FULL, LORA])
        assert len(helpers_of(together).processes) == line.side_by_side - 1 == 2
    assert (os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()) == (before, threads)


def test_fewer_at_a_time_where_memory_or_the_device_say_so(tmp_path: Path) -> None:
    said: list[str] = []
    line = line_of(tmp_path, said, side_by_side=3)
    made, needs = line.setup("full").plan, [line.setup(arm).plan.memory for arm in ("full", "lora")]
    each = max(need.peak for need in needs if need is not None) + 2 * parallel.LIBRARIES_BYTES
    line.machine = line.machine.model_copy(update={"memory_available_bytes": 3 * each - 1})
    with parallel.helpers(line):
        assert line.side_by_side == 2
    assert said[0].startswith("compare.side_by_side: 2 at a time instead of 3: each takes 1.42 GiB of 4.27 GiB")
    on_gpu = mock.Mock(plan=made.model_copy(update={"device": "cuda"}))
    with (
        mock.patch.object(comparing.Context, "setup", return_value=on_gpu),
        parallel.helpers(line) as together,
    ):
        assert line.side_by_side == 1
        together([FULL, LORA])  # nothing: no process is started
    assert said[1:] == ["compare.side_by_side is for CPUs: on cuda one trial at a time"]


def test_longest_trials_are_shared_out_first(tmp_path: Path) -> None:
    line = line_of(tmp_path)
    seconds = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 1.0}
    trials = [Trial(name=name, arm=name, learning_rate=1.0, seed=1) for name in seconds]
    with mock.patch.object(parallel, "_seconds", lambda line, trial: seconds[trial.name]):
        parts = parallel._shares(line, trials, 2)
    assert [[one.name for one in part] for part in parts] == [["a", "d"], ["b", "c"]]
