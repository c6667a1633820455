"""Several machines: what the command line says of one, how they find each other, and what becomes of a lost one."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest

from fulltune.errors import FulltuneError, InterruptedRun, RecipeError, SetupError
from fulltune.recipe.fields import Recipe
from fulltune.records.training import LostMachine, Outcome
from fulltune.system import machines
from fulltune.system.hardware import Machine
from fulltune.system.machines import (
    AttemptEnd,
    Heartbeat,
    MachineAddress,
    Member,
    Peer,
    SharedAttempt,
    describe_differences,
    parse_machine_address,
)
from fulltune.train.parent import child, spawn
from fulltune.train.parent import machines as group_of
from fulltune.train.parent.machines import MachineGroup, lead_machines
from fulltune.train.request import Request
from tests import plans

MACHINE = Machine(cpu="c", num_cores=2, memory_bytes=8, memory_available_bytes=8, cpu_bf16_speedup=1.0)


def several(output: Path, machines: int = 2) -> Recipe:
    return plans.recipe(output=str(output), train={"num_machines": machines, "num_processes": machines})


def member(recipe: Recipe, rank: int, **changes: Any) -> Member:
    record = machines.own_member(recipe, MachineAddress(rank, "127.0.0.1", 29500, 1.0), MACHINE)
    return record.model_copy(update={"host": f"host{rank}", **changes})


def leader(recipe: Recipe, token: str = "t", **changes: Any) -> Member:
    return member(recipe, 0, token=token, **changes)


def silent(phase: str) -> None:
    """Show nothing."""


@pytest.mark.parametrize(
    ("text", "host", "port", "rendezvous"),
    [
        ("node0", "node0", 29500, "node0:29500"),
        ("node0:1", "node0", 1, "node0:1"),
        ("[fd00::1]:70", "fd00::1", 70, "[fd00::1]:70"),
        ("[fd00::1]", "fd00::1", 29500, "[fd00::1]:29500"),
    ],
)
def test_rendezvous_is_read_as_torchrun_reads_it(text: str, host: str, port: int, rendezvous: str) -> None:
    place = parse_machine_address(several(Path("/o")), 1, text, "90s")
    assert place == MachineAddress(1, host, port, 90.0)
    assert place.rendezvous == rendezvous


@pytest.mark.parametrize(
    ("rank", "rendezvous", "wait", "expected"),
    [
        (None, None, "1m", ["train.num_machines: 2, but this command would train on one machine"]),
        (None, "a", "1m", ["--machine-rank: missing, expected this machine's number"]),
        (
            2,
            "a:0",
            "soon",
            ["--machine-rank: found 2", "--rendezvous: found 'a:0'", "--wait-for-machines: expected a time"],
        ),
        (0, None, "1m", ["--rendezvous: missing"]),
        (0, "a b", "1m", ["found 'a b'"]),
        (0, "$(x)", "1m", ["found '$(x)'"]),
    ],
)
def test_a_place_that_is_none_is_refused(
    rank: int | None, rendezvous: str | None, wait: str, expected: list[str]
) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_machine_address(several(Path("/o")), rank, rendezvous, wait)
    assert len(refused.value.problems) == len(expected)
    assert all(one in problem for one, problem in zip(expected, refused.value.problems, strict=True))


def test_address_is_that_of_the_way_to_machine_0() -> None:
    assert machines.own_address("127.0.0.1", 9) == "127.0.0.1"
    with pytest.raises(SetupError, match=r"no-such-host\.invalid is unknown"):
        machines.own_address("no-such-host.invalid", 9)


def test_machines_must_have_versions_settings_and_files_in_common(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\na,b\n")
    recipe = plans.recipe(data={"train": str(rows)})
    first = member(recipe, 0)
    assert describe_differences(first, [member(recipe, 1), member(recipe, 2)]) == []
    other = member(recipe, 1, facts={**first.facts, "versions": {**first.facts["versions"], "torch": "0.1"}})
    changed = member(recipe.model_copy(update={"seed_of": 1, "output": "/elsewhere"}), 2)
    rows.write_text("text,label\na,c\n")
    lines = describe_differences(first, [other, changed, member(recipe, 3)])
    assert lines[0].startswith("machine 1 (host1) has different package versions: torch 0.1 (machine 0: ")
    assert lines[1].startswith('machine 2 (host2) uses a different recipe: output is "/elsewhere" (machine 0: "runs")')
    assert lines[2].startswith(f"machine 3 (host3) sees different files: {rows}: 15 bytes, ")
    assert len(lines) == 3


def test_version_of_a_package_is_the_one_that_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, name, version in (("first", "TORCH", "1.0"), ("second", "torch", "2.0")):
        place = tmp_path / folder / f"{name}-{version}.dist-info"
        place.mkdir(parents=True)
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second"), *sys.path])
    versions = machines._package_versions(plans.recipe())
    assert (versions["torch"], versions["transformers"]) == ("1.0", metadata.version("transformers"))


def test_of_a_large_file_both_ends_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "_END_BYTES", 3)
    file = tmp_path / "model" / "weights"
    file.parent.mkdir()
    contents = []
    for content in (b"abc" + bytes(20) + b"xyz", b"abc" + bytes(20) + b"xyy", b"abb" + bytes(20) + b"xyz", b"abc"):
        file.write_bytes(content)
        contents.append(machines._content_digest(file.parent))
    assert len(set(contents)) == 4


# ---- signs of life ---------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life every few milliseconds, and little patience."""
    for module, name, value in (
        (machines, "HEARTBEAT_SECONDS", 0.02),
        (machines, "LOST_SECONDS", 0.5),
        (machines, "POLL_SECONDS", 0.01),
        (group_of, "POLL_SECONDS", 0.01),
        (machines, "LINGER_SECONDS", 0.2),
        (group_of, "GRACE_SECONDS", 0.1),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(group_of.hardware, "measure_machine", lambda: MACHINE)


@pytest.fixture
def place() -> MachineAddress:
    return MachineAddress(0, "127.0.0.1", 29500, 1.0)


@pytest.mark.usefixtures("quick")
def test_what_an_earlier_job_left_is_no_sign_of_life(tmp_path: Path) -> None:
    path, recipe = tmp_path / "machine-0.json", several(tmp_path)
    Heartbeat(path, leader(recipe, "old")).end()
    watched = Peer(path)
    assert watched.read() is not None
    assert not watched.is_alive
    with machines.send_heartbeats(path, leader(recipe, "new")):
        deadline = time.monotonic() + 10
        while not watched.is_alive and time.monotonic() < deadline:
            record = watched.read()
    assert record is not None
    assert (record.token, watched.is_alive) == ("new", True)


@pytest.fixture
def answering(place: MachineAddress, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Machine 1, which answers machine 0 with its token; `changes` are told too."""
    recipe, changes, over = several(tmp_path), {}, threading.Event()
    sign: list[Heartbeat] = []

    def answer() -> None:
        heard = Peer(place.file_of(recipe, 0))
        while not over.wait(0.01):
            record = heard.read()
            if record is not None and not sign:
                sign.append(Heartbeat(place.file_of(recipe, 1), member(recipe, 1, token=record.token, **changes)))

    thread = threading.Thread(target=answer)
    thread.start()
    yield changes
    over.set()
    thread.join()
    for heartbeat in sign:
        heartbeat.end()


@contextmanager
def led(place: MachineAddress, recipe: Recipe) -> Iterator[MachineGroup]:
    """What machine 0's command does around a run."""
    with lead_machines(place, recipe, silent) as group:
        group.wait_before_first_attempt(silent)
        yield group


@pytest.mark.usefixtures("quick", "answering")
def test_machines_find_each_other_and_are_told_how_it_ended(place: MachineAddress, tmp_path: Path) -> None:
    recipe = several(tmp_path)
    with led(place, recipe) as group:
        assert [one.host for one in group.members][1:] == ["host1"]
        assert group.weakest.num_cores == 2
    record = Member.load(place.file_of(recipe, 0))
    assert record.exit_code == 0


@pytest.mark.usefixtures("quick")
def test_machines_that_differ_are_refused_and_told_so(
    place: MachineAddress, answering: dict[str, Any], tmp_path: Path
) -> None:
    recipe = several(tmp_path)
    answering["facts"] = {**member(recipe, 1).facts, "versions": {}}
    with (
        pytest.raises(SetupError, match=r"machine 1 \(host1\) has different package versions: Python none"),
        led(place, recipe),
    ):
        raise AssertionError("it began")
    record = Member.load(place.file_of(recipe, 0))
    assert record.exit_code == 2
    assert "has different package versions" in record.problems[0]


@pytest.mark.usefixtures("quick")
def test_a_machine_that_does_not_come_is_named(place: MachineAddress, tmp_path: Path) -> None:
    recipe = several(tmp_path, machines=3)
    with (
        pytest.raises(SetupError, match=r"machines 1 and 2 \(3 in all\) did not answer in 0 s.*storage that all"),
        led(replace(place, wait_seconds=0.1), recipe),
    ):
        raise AssertionError("it began")


def follow_one(place: MachineAddress, recipe: Recipe) -> None:
    group_of.follow_machine_0(replace(place, rank=1), recipe, silent)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("code", "problem"), [(0, ""), (3, "does not fit"), (75, "interrupted")])
def test_others_end_as_machine_0_does(code: int, problem: str, place: MachineAddress, tmp_path: Path) -> None:
    recipe = several(tmp_path)
    path = place.file_of(recipe, 0)
    path.parent.mkdir(parents=True)
    sign = Heartbeat(path, leader(recipe, exit_code=code, problems=(problem,)))
    refused = pytest.raises(FulltuneError, match=rf"machine 0 \(host0\): {problem}")
    with refused if code else nullcontext() as ended:
        follow_one(place, recipe)
    assert ended is None or ended.value.exit_code == code
    sign.end()


@pytest.mark.usefixtures("quick")
def test_others_do_not_wait_for_ever_for_a_machine_0_that_is_gone(place: MachineAddress, tmp_path: Path) -> None:
    recipe = several(tmp_path)
    sign = Heartbeat(place.file_of(recipe, 0), leader(recipe))
    threading.Timer(0.3, sign.end).start()
    with pytest.raises(InterruptedRun, match=r"machine 0 \(host0\) sent no heartbeat and did not come back in 0 s"):
        follow_one(replace(place, wait_seconds=0.2), recipe)
    with pytest.raises(SetupError, match="machine 0 did not answer"):
        follow_one(replace(place, wait_seconds=0.1), recipe)
    record = Member.load(place.file_of(recipe, 1))
    assert record.exit_code == 2, "machine 0 is told, should it come"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_are_told_of_a_stop_outside_of_an_attempt(rank: int, place: MachineAddress, tmp_path: Path) -> None:
    recipe, exit_codes = several(tmp_path), list[int | None]()

    def end(*_: object) -> None:
        exit_codes.append(Member.load(place.file_of(recipe, rank)).exit_code)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGTERM)).start()
    place = replace(place, wait_seconds=60.0)
    try:
        with pytest.raises(InterruptedRun, match="the same command on all machines"):
            follow_one(place, recipe) if rank else led(place, recipe).__enter__()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert exit_codes == [75]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_signal_that_the_caller_leaves_to_the_system_is_not_taken(
    handler: signal.Handlers, place: MachineAddress, tmp_path: Path
) -> None:
    recipe = several(tmp_path)
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with machines.send_heartbeats(place.file_of(recipe, 0), leader(recipe)):
            assert signal.getsignal(signal.SIGTERM) == handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("quick")
def test_one_command_is_one_machine(place: MachineAddress, tmp_path: Path) -> None:
    recipe = several(tmp_path)
    refused = pytest.raises(SetupError, match="another command with this rank uses this rendezvous")
    with lead_machines(place, recipe, silent), refused, lead_machines(place, recipe, silent):
        raise AssertionError("it began")


@pytest.mark.usefixtures("quick")
def test_others_take_part_only_in_attempts_that_count_on_them(
    place: MachineAddress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, begun = several(tmp_path), list[str]()
    request = request_of(tmp_path, recipe)
    request.save(request.folder / "request.json")
    path = str(request.folder / "request.json")

    def start(request: Request, log: Path, meeting: MachineAddress) -> Ran:
        begun.append(meeting.attempt)
        return Ran(3)

    monkeypatch.setattr(spawn, "start_in_new_process", start)
    with machines.send_heartbeats(place.file_of(recipe, 0), leader(recipe)) as sign:

        def lead() -> None:
            peer = Peer(place.file_of(recipe, 1))
            for number, instances in enumerate(("another", "mine")):
                while peer.read() is None or peer.member is None or peer.member.token != "t":
                    time.sleep(0.01)
                own = peer.member.instance if instances == "mine" else instances
                sign.write(attempt=SharedAttempt(name=f"a{number}", request=path, instances=(own,)))
                time.sleep(0.3)
            while peer.read() is None or peer.member is None or peer.member.last_part is None:
                time.sleep(0.01)
            failed = LostMachine(rank=1, host=peer.member.host, reason="torchrun ended with code 3", kind="failed")
            assert peer.member.last_part == AttemptEnd(attempt="a1", lost=failed)
            sign.write(attempt=None, exit_code=0)

        thread = threading.Thread(target=lead)
        thread.start()
        follow_one(replace(place, wait_seconds=30.0), recipe)
        thread.join()
    assert begun == ["a1"]


# ---- what is lost ----------------------------------------------------------------------------------------------


def request_of(folder: Path, recipe: Recipe) -> Request:
    """An attempt, with its folder."""
    request = Request(
        run_folder=str(folder), recipe=recipe, plan=plans.plan(), attempt=1, checkpoint=None, parent_pid=None
    )
    request.folder.mkdir(parents=True)
    return request


FAILED = AttemptEnd(
    attempt="a", lost=LostMachine(rank=1, host="host1", kind="failed", reason="torchrun ended with code 1")
)


class Ran:
    """Processes of an attempt that have ended with a code, or run until they are killed."""

    pid, args = 0, ()

    def __init__(self, code: int | None) -> None:
        self.code = code

    def poll(self) -> int | None:
        return self.code


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("code", "changes", "ends_with", "expected"),
    [
        (1, {"last_part": FAILED}, 1, ("failed",)),
        (0, {"last_part": AttemptEnd(attempt="a", lost=None)}, 0, ()),
        (None, {"last_part": FAILED}, 1, ("failed",)),
        (None, {"exit_code": 75}, 1, ("interrupted",)),
        (None, {"exit_code": 2}, 1, ("machine",)),
        (None, {"instance": "another"}, 1, ("machine",)),
        (None, {"silent": True}, 1, ("machine",)),
        (1, {"silent": True}, 1, ("machine",)),
    ],
)
def test_what_became_of_another_machine(
    code: int | None,
    changes: dict[str, Any],
    ends_with: int,
    expected: tuple[str, ...],
    place: MachineAddress,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, ran = several(tmp_path), Ran(code)
    monkeypatch.setattr(spawn, "kill_workers", lambda child: setattr(child, "code", -9))
    gives_none = changes.pop("silent", False)
    with lead_machines(place, recipe, silent) as group:
        record = member(recipe, 1, token=group.members[0].token, instance="i")
        sign = Heartbeat(place.file_of(recipe, 1), record)
        group.wait_before_first_attempt(silent)
        attempt = group_of._AttemptOnAllMachines(ran, group._heartbeat, "a", {group._others[1]: "i"})
        if gives_none:
            sign.end()
        else:
            sign.write(**changes)
        assert attempt.wait() == ends_with
        sign.end()
    assert tuple(one.kind for one in attempt.lost) == expected


@pytest.mark.usefixtures("quick", "answering")
def test_an_attempt_goes_on_until_the_others_have_ended(place: MachineAddress, tmp_path: Path) -> None:
    recipe = several(tmp_path)
    with led(place, recipe) as group:
        attempt = group_of._AttemptOnAllMachines(
            Ran(0), group._heartbeat, "a", {group._others[1]: group.members[1].instance}
        )
        assert attempt.poll() is None, "the first process may be there, saving the model"


@pytest.mark.usefixtures("quick")
def test_a_machine_that_came_back_otherwise_is_refused(
    place: MachineAddress, answering: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = several(tmp_path)
    monkeypatch.setattr(spawn, "start_in_new_process", lambda *_: pytest.fail("it began"))
    with led(place, recipe) as group:
        monkeypatch.setattr(machines, "describe_differences", lambda first, others: ["other versions"])
        with pytest.raises(SetupError, match="other versions"):
            group.start(request_of(tmp_path, recipe), tmp_path / "log.txt")


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        with pytest.raises(SetupError, match=r"port \d+ of this machine cannot be used"):
            group_of._check_port(MachineAddress(0, "127.0.0.1", listener.getsockname()[1], 1.0))


CLOSED = "Connection closed by peer"


@pytest.mark.parametrize(
    ("code", "written", "kind", "stop_requested", "status", "words"),
    [
        (1, {"": "error"}, None, False, "error", CLOSED),
        (1, {"": "error"}, "machine", False, "lost", "machine 1 (b) was lost: it went"),
        (1, {"": "error"}, "killed", False, "killed", "the training processes on machine 1 (b) were killed"),
        (
            1,
            {"": "error"},
            "out_of_memory",
            False,
            "out_of_memory",
            "the kernel killed a training process on machine 1",
        ),
        (1, {"": "error"}, "interrupted", False, "interrupted", "interrupted before step 1"),
        (1, {"": "error"}, "failed", False, "error", CLOSED),
        # A torchrun that loses the others asks its processes to stop.
        (1, {"": "interrupted"}, "failed", False, "lost", "torchrun ended on one machine"),
        (1, {"": "interrupted"}, "failed", True, "interrupted", CLOSED),
        (-9, {"-rank1": "error"}, "failed", False, "killed", "the training process was killed"),
        (1, {}, "failed", False, "crashed", "the training process ended with code 1 and wrote no outcome; machine 1"),
    ],
)
def test_what_was_lost_elsewhere_says_more_than_a_closed_connection(
    code: int, written: dict[str, Any], kind: Any, stop_requested: bool, status: str, words: str, tmp_path: Path
) -> None:
    request = request_of(tmp_path, several(tmp_path))
    (request.folder / "log.txt").write_text(f"RuntimeError: {CLOSED}")
    for rank, status_of_rank in written.items():
        outcome = Outcome(status=status_of_rank, reason=CLOSED, trial=request.plan.trial, attempt=1, steps=19)
        outcome.save(request.folder / f"outcome{rank}.json")
    lost = [] if kind is None else [LostMachine(rank=1, host="b", reason="went", kind=kind)]
    result = child._determine_outcome(request, code, stop_requested, lost=lost)
    assert (result.status, result.reason.startswith(words)) == (status, True), result.reason


def test_torchrun_is_told_where_the_machines_meet(tmp_path: Path) -> None:
    recipe = plans.recipe(output=str(tmp_path), train={"num_machines": 2, "num_processes": 16})
    plan = plans.plan().model_copy(update={"num_processes": 16})
    request = Request(run_folder=str(tmp_path), recipe=recipe, plan=plan, attempt=1, checkpoint=None, parent_pid=None)
    meeting = group_of.rendezvous_address(MachineAddress(0, "127.0.0.1", 70, 600.0), "token-1", "127.0.0.1")
    command = spawn.worker_command(request, tmp_path / "request.json", meeting)
    expected = {"--nnodes=2", "--nproc-per-node=8", "--node-rank=0", "--rdzv-id=token-1", "--rdzv-conf=timeout=600"}
    assert expected <= set(command)
    assert " listen 127.0.0.1:70 " in " ".join(command)
    other = group_of.rendezvous_address(MachineAddress(1, "node0", 70, 600.0), "token-1", "10.0.0.2")
    assert " join node0:70 --node-rank=1 " in " ".join(spawn.worker_command(request, tmp_path / "request.json", other))
    first = group_of.rendezvous_address(MachineAddress(0, "node0", 70, 600.0), "token-1", "fd00::1")
    assert first.rendezvous == "[fd00::1]:70", "where the others reach it, not on all interfaces"
    variables = spawn.multi_machine_variables(meeting)
    assert "127.0.0.1" in {one.address for one in psutil.net_if_addrs()[variables["GLOO_SOCKET_IFNAME"]]}
