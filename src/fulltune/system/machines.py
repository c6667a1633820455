"""Coordinate several machines that train one model, by heartbeat files in a shared folder."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import platform
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from fulltune.errors import FulltuneError, InterruptedRun, RecipeError, SetupError
from fulltune.recipe.fields import Recipe, local_paths
from fulltune.records.base import Record
from fulltune.records.training import LostMachine
from fulltune.system import parallel_layout, signals
from fulltune.system.hardware import Machine
from fulltune.system.run_folder import PACKAGES, flatten_settings
from fulltune.text import first_few, format_bytes, parse_seconds

_log = logging.getLogger(__name__)

FOLDER = ".fulltune-machines"
"""Folder in the recipe's `output`, with a subfolder per rendezvous."""
DEFAULT_PORT = 29500
HEARTBEAT_SECONDS = 2.0
LOST_SECONDS = 60.0
"""Time without a heartbeat after which a machine counts as lost."""
POLL_SECONDS = 0.2
LINGER_SECONDS = 10.0
"""How long an ending command waits for the other machines to notice."""
GO_ON = "run the same command on all machines to resume"
_END_BYTES = 32 * 2**20
_MAX_READ = 1000
"""In folders with more files, only names and sizes are compared."""


@dataclass(frozen=True)
class MachineAddress:
    """This machine's rank, and the rendezvous of all machines."""

    rank: int
    host: str
    port: int
    wait_seconds: float
    attempt: str = ""
    address: str = ""

    @property
    def rendezvous(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def file_of(self, recipe: Recipe, rank: int) -> Path:
        return Path(recipe.output) / FOLDER / f"{self.host}-{self.port}".replace(":", "-") / f"machine-{rank}.json"


def parse_machine_address(recipe: Recipe, rank: int | None, rendezvous: str | None, wait: str) -> MachineAddress | None:
    """Parse the options for several machines; None if the recipe uses one. Raise `RecipeError` if invalid."""
    machines = recipe.train.num_machines
    if machines == 1:
        if rank is None and rendezvous is None:
            return None
        raise RecipeError(
            "--machine-rank, --rendezvous: need several machines, but train.num_machines is 1; remove them, or set "
            "train.num_machines"
        )
    if rank is None and rendezvous is None:
        raise RecipeError(missing_rank_message(recipe))
    problems, seconds = [], 0.0
    if rank is None or not 0 <= rank < machines:
        problem = "missing" if rank is None else f"found {rank}"
        problems.append(
            f"--machine-rank: {problem}, expected this machine's number, 0 to {machines - 1}, because "
            f"train.num_machines is {machines} ('fulltune launch' writes the commands)"
        )
    parts = re.fullmatch(r"(?:\[([\da-fA-F:.]+)\]|([\w.-]+))(?::(\d+))?", rendezvous or "")
    port = 0 if parts is None else int(parts[3] or DEFAULT_PORT)
    if not 0 < port < 65536:
        problem = f"found '{rendezvous}'" if rendezvous else "missing"
        problems.append(
            f"--rendezvous: {problem}, expected HOST, HOST:PORT or [IPV6]:PORT with a port from 1 to 65535; name "
            "machine 0 and one of its free ports, such as node0:29500"
        )
    try:
        seconds = parse_seconds(wait)
    except ValueError as error:
        problems.append(f"--wait-for-machines: {error}")
    if problems or rank is None or parts is None:
        raise RecipeError(problems)
    return MachineAddress(rank, parts[1] or parts[2], port, seconds)


def missing_rank_message(recipe: Recipe) -> str:
    """Return the error message for a command without the `--machine-rank` that several machines need."""
    return (
        f"train.num_machines: {recipe.train.num_machines}, but this command would train on one machine; start it on "
        "each machine with --machine-rank and --rendezvous ('fulltune launch' writes the commands), or set "
        "train.num_machines=1"
    )


def own_address(host: str, port: int) -> str:
    """Return this machine's address on the network interface that leads to `host`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # a datagram socket sends nothing here
            return str(probe.getsockname()[0])
    except OSError as error:
        raise SetupError(
            f"--rendezvous: {host} is unknown to {socket.gethostname()} or cannot be reached ({error.strerror}); give "
            "a name or an address of machine 0 that all machines know"
        ) from None


# ---- the file of a machine -------------------------------------------------------------------------------------


class SharedAttempt(Record):
    """An attempt that machine 0 starts on all machines."""

    name: str
    request: str
    instances: tuple[str, ...]
    """Identifiers of the commands that take part; a command started later must wait."""


class AttemptEnd(Record):
    """How an attempt ended on another machine."""

    attempt: str
    lost: LostMachine | None


class Member(Record):
    """The content of a machine's heartbeat file."""

    rank: int
    token: str
    """Identifier of machine 0's command, which the other machines repeat."""
    heartbeats: int = 0
    instance: str
    """Identifier of this command. A restarted command gets a new identifier, so it cannot rejoin an attempt."""
    host: str
    address: str
    facts: dict[str, dict[str, str]]
    """Values that must be the same on all machines, by subject (such as `versions`) and name."""
    machine: Machine
    exit_code: int | None = None
    problems: tuple[str, ...] = ()
    attempt: SharedAttempt | None = None
    last_part: AttemptEnd | None = None
    """How the last attempt ended on this machine; machine 0 does not write this."""

    def must_still_end(self, attempt: SharedAttempt | None) -> bool:
        """Return whether this machine takes part in the attempt and has not reported its end."""
        if attempt is None or self.instance not in attempt.instances:
            return False
        return self.last_part is None or self.last_part.attempt != attempt.name

    @property
    def label(self) -> str:
        return f"machine {self.rank} ({self.host})"


def own_member(recipe: Recipe, machine_address: MachineAddress, machine: Machine, token: str = "") -> Member:
    """Create this machine's heartbeat record; `token` identifies machine 0's command."""
    settings = flatten_settings(recipe.model_dump(mode="json"))
    return Member(
        rank=machine_address.rank,
        token=token,
        instance=uuid.uuid4().hex,
        host=socket.gethostname(),
        address=own_address(machine_address.host, machine_address.port),
        facts={
            "versions": _package_versions(recipe),
            "settings": {name: json.dumps(value, ensure_ascii=False) for name, value in settings.items()},
            "files": {path: _content_digest(Path(path)) for path in local_paths(recipe)},
            "devices": {} if recipe.train.device == "cpu" else {"GPUs": "some" if machine.gpus else "none"},
        },
        machine=machine,
    )


def _package_versions(recipe: Recipe) -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    engine = [parallel_layout.PACKAGE] if recipe.train.zero_enabled_by else []
    for name in ("fulltune", *PACKAGES, "peft", *engine):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    return versions


def _content_digest(path: Path) -> str:
    """Return a file's or folder's total size and a digest of its content, or `missing`."""
    if not path.exists():
        return "missing"
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest, total = hashlib.blake2b(digest_size=8), 0
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        total += size
        if len(files) <= _MAX_READ:
            with file.open("rb") as opened:
                digest.update(opened.read(_END_BYTES))
                opened.seek(max(opened.tell(), size - _END_BYTES))
                digest.update(opened.read())
    return f"{format_bytes(total)}, {digest.hexdigest()}"


_COMPARED = (
    ("versions", "has different package versions", " ", "install the same versions on all machines"),
    ("settings", "uses a different recipe", " is ", "give all machines the same recipe and the same --set"),
    ("files", "sees different files", ": ", "give all machines the same files, in a shared folder"),
    ("devices", "has different devices", ": ", "run nvidia-smi there, or set train.device: cpu"),
)


def describe_differences(first: Member, others: Sequence[Member]) -> list[str]:
    """Return one message per other machine and kind of fact that differs from machine 0's (`first`)."""
    lines = []
    for other in others:
        for kind, problem, joint, remedy in _COMPARED:
            expected, actual = first.facts[kind], other.facts[kind]
            facts = [
                f"{name}{joint}{actual.get(name, 'none')} (machine 0: {expected.get(name, 'none')})"
                for name in sorted({*expected, *actual})
                if actual.get(name) != expected.get(name)
            ]
            follows_from_recipe = kind == "files" and other.facts["settings"] != first.facts["settings"]
            if facts and not follows_from_recipe:
                lines.append(f"{other.label} {problem}: {first_few(facts)}; {remedy}")
    return lines


# ---- heartbeats ------------------------------------------------------------------------------------------------


class Heartbeat:
    """Writes this machine's heartbeat file every two seconds until `end` is called."""

    def __init__(self, path: Path, record: Member) -> None:
        self.path, self.record = path, record
        # Reentrant, because a signal handler may interrupt a write and write itself.
        self._lock, self._ends = threading.RLock(), threading.Event()
        self.write()
        self._thread = threading.Thread(target=self._write_until_end, daemon=True)
        self._thread.start()

    def write(self, **changes: Any) -> None:
        """Change fields of the record, and write the file."""
        with self._lock:
            self.record = self.record.model_copy(update={**changes, "heartbeats": self.record.heartbeats + 1})
            self.record.save(self.path)

    def write_end(self, error: BaseException | None) -> None:
        """Write how this machine's command ended: the exit code and, unless `error` is None, the problems."""
        match error:
            case None:
                self.write(exit_code=0)
            case FulltuneError():
                self.write(exit_code=error.exit_code, problems=error.problems)
            case _:
                self.write(exit_code=1, problems=(f"ended with {type(error).__name__}: {error}",))

    def end(self) -> None:
        self._ends.set()
        self._thread.join()

    def _write_until_end(self) -> None:
        while not self._ends.wait(HEARTBEAT_SECONDS):
            # The file server may be unreachable for a moment.
            with contextlib.suppress(OSError):
                self.write()


class Peer:
    """Reads another machine's heartbeat file, and measures how long the file has not changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.member: Member | None = None
        self.is_alive = False
        """True once the file has changed while being watched; an earlier job's file does not change."""
        self._since, self._looked = time.monotonic(), -math.inf

    def read(self) -> Member | None:
        """Return the machine's newest record, or None before the first; reads the file at most once a second."""
        if time.monotonic() - self._looked < HEARTBEAT_SECONDS / 2:
            return self.member
        member = self.member
        # The file may be missing, half replaced, or from another version.
        with contextlib.suppress(OSError, SetupError):
            member = Member.load(self.path)
        if member != self.member:
            self.is_alive, self.member, self._since = self._looked > -math.inf, member, time.monotonic()
        self._looked = time.monotonic()
        return self.member

    def repeats_token(self, token: str) -> bool:
        """Return whether the machine's heartbeat repeats the token of machine 0's command."""
        member = self.read()
        return member is not None and member.token == token

    @property
    def silent_seconds(self) -> float:
        return time.monotonic() - self._since


@contextlib.contextmanager
def send_heartbeats(path: Path, record: Member, noticed: Callable[[], bool] = lambda: True) -> Iterator[Heartbeat]:
    """Write heartbeats in the block, then its outcome; wait until `noticed()`, at most `LINGER_SECONDS`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SetupError(
                f"{path}: another command with this rank uses this rendezvous; stop it, or use another port in "
                "--rendezvous and a different --machine-rank on each machine"
            ) from None
        except OSError:
            _log.warning("%s: locks are not supported here; make sure that no two jobs share a --rendezvous", path)
        sign = Heartbeat(path, record)
        ended: BaseException | None = None
        interrupted = InterruptedRun(f"interrupted; {GO_ON}")

        def write_and_end(number: int, frame: FrameType | None) -> None:
            sign.write_end(interrupted)
            before[number](number, frame)

        try:
            # Ignored signals, and those with the default action, keep their handlers.
            handled = [number for number in signals.ENDING if callable(signal.getsignal(number))]
            with signals.temporary_handlers(write_and_end, handled) as before:
                yield sign
        except KeyboardInterrupt:
            ended = interrupted
            raise ended from None
        except BaseException as error:
            ended = error
            raise
        finally:
            with contextlib.suppress(OSError):  # the error that is already raised says more than a full disk
                sign.write_end(ended)
                until = time.monotonic() + LINGER_SECONDS
                while time.monotonic() < until and not noticed():
                    time.sleep(POLL_SECONDS)
            sign.end()
