"""Several machines that train one model: each writes a file in a folder that all of them see, anew every two seconds as
a heartbeat, and reads those of the others; machine 0's says what is to be done."""

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
from typing import Any

from fulltune.errors import FulltuneError, InterruptedRun, RecipeError, SetupError
from fulltune.recipe.fields import Recipe, named_paths
from fulltune.records.base import Record
from fulltune.records.training import LostMachine
from fulltune.system import sharing, signals
from fulltune.system.hardware import Machine
from fulltune.system.run_folder import PACKAGES, flat
from fulltune.text import first_few, format_bytes, parse_seconds

_log = logging.getLogger(__name__)

FOLDER = ".fulltune-machines"
"""In the recipe's `output`; a job has a folder in it by its rendezvous."""
DEFAULT_PORT = 29500
"""torchrun's."""
BEAT_SECONDS = 2.0
GONE_SECONDS = 60.0
"""Without a sign of life for so long a machine is taken for lost: file servers may show a change half a minute late."""
POLL_SECONDS = 0.2
LINGER_SECONDS = 10.0
"""A command that ends before all machines have answered: how long it stays to tell them."""
GO_ON = "the same command on all machines continues the run"
_END_BYTES = 32 * 2**20
"""Of larger files the size and both ends are compared."""
_MOST_READ = 1000
"""Of a folder with more files, such as images, names and sizes are compared."""


@dataclass(frozen=True)
class Place:
    """Which of the machines this one is, and where all of them meet."""

    rank: int
    host: str
    port: int
    wait_seconds: float
    attempt: str = ""
    """That this machine takes part in; empty: none yet."""
    address: str = ""
    """Under which the others reach it in that attempt."""

    @property
    def rendezvous(self) -> str:
        """As torchrun reads it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def file_of(self, recipe: Recipe, rank: int) -> Path:
        """A machine's file. Not named by the recipe's settings: that these agree is found out there."""
        return Path(recipe.output) / FOLDER / f"{self.host}-{self.port}".replace(":", "-") / f"machine-{rank}.json"


def place_of(recipe: Recipe, rank: int | None, rendezvous: str | None, wait: str) -> Place | None:
    """What the command line says of this machine; None: there is only one."""
    machines = recipe.train.num_machines
    if machines == 1:
        if rank is None and rendezvous is None:
            return None
        raise RecipeError(
            "--machine-rank, --rendezvous: are for several machines, and train.num_machines is 1; leave them out, or "
            "set train.num_machines"
        )
    if rank is None and rendezvous is None:
        raise RecipeError(without_the_others(recipe))
    problems, seconds = [], 0.0
    if rank is None or not 0 <= rank < machines:
        found = "it is missing" if rank is None else f"found {rank}"
        problems.append(
            f"--machine-rank: {found}, and train.num_machines is {machines}; give each machine its number, 0 to "
            f"{machines - 1} ('fulltune launch' writes the commands)"
        )
    parts = re.fullmatch(r"(?:\[([\da-fA-F:.]+)\]|([\w.-]+))(?::(\d+))?", rendezvous or "")
    port = 0 if parts is None else int(parts[3] or DEFAULT_PORT)
    if not 0 < port < 65536:
        found = f"found '{rendezvous}'" if rendezvous else "it is missing"
        problems.append(
            f"--rendezvous: {found}, expected HOST, HOST:PORT or [IPV6]:PORT with a port from 1 to 65535; give machine "
            "0's name and a free port of it, such as node0:29500"
        )
    try:
        seconds = parse_seconds(wait)
    except ValueError as error:
        problems.append(f"--wait-for-machines: {error}")
    if problems or rank is None or parts is None:
        raise RecipeError(problems)
    return Place(rank, parts[1] or parts[2], port, seconds)


def without_the_others(recipe: Recipe) -> str:
    """Why a command that was given no place among the machines of a recipe cannot train."""
    return (
        f"train.num_machines: {recipe.train.num_machines}, and this command would train on one machine; start it on "
        "each with --machine-rank and --rendezvous, as 'fulltune launch' writes it, or set train.num_machines=1"
    )


def own_address(host: str, port: int) -> str:
    """This machine's address as the host sees it, of the interface that leads there: many machines take their own name
    for the loopback."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # of a datagram socket: nothing is sent
            return str(probe.getsockname()[0])
    except OSError as error:
        raise SetupError(
            f"--rendezvous: {host} is not known on {socket.gethostname()}, or there is no way to it "
            f"({error.strerror}); give a name or an address of machine 0 that all machines know"
        ) from None


# ---- what they write -------------------------------------------------------------------------------------------


class SharedAttempt(Record):
    """An attempt that machine 0 has all machines take part in."""

    name: str
    request: str
    """Path of its file."""
    instances: tuple[str, ...]
    """The other machines' commands in it: one that came later waits for the next attempt."""


class EndedPart(Record):
    """How another machine's part of an attempt ended."""

    attempt: str
    """Its name."""
    lost: LostMachine | None
    """None: without a failure."""


class Member(Record):
    """What a machine says of itself."""

    rank: int
    token: str
    """Machine 0's command; another machine repeats it: it has read that file, and can write beside it."""
    beat: int = 0
    instance: str
    """This command: a machine that was restarted is another one for the attempt at hand."""
    host: str
    address: str
    """Under which the others reach it."""
    facts: dict[str, dict[str, str]]
    """What all machines must have in common, by kind and name."""
    machine: Machine
    exit_code: int | None = None
    """Of its command; None: it goes on."""
    problems: tuple[str, ...] = ()
    """Why it ended."""
    attempt: SharedAttempt | None = None
    """That is going on; only machine 0 says it."""
    last_part: EndedPart | None = None
    """Its part of the last attempt that it took part in; only the other machines say it."""

    def is_awaited(self, attempt: SharedAttempt | None) -> bool:
        """Whether an attempt counts on this machine's command, whose part of it has not ended."""
        if attempt is None or self.instance not in attempt.instances:
            return False
        return self.last_part is None or self.last_part.attempt != attempt.name

    @property
    def label(self) -> str:
        return f"machine {self.rank} ({self.host})"


def member(recipe: Recipe, place: Place, machine: Machine, token: str = "") -> Member:
    """This machine, as the others are told of it."""
    settings = flat(recipe.model_dump(mode="json"))
    return Member(
        rank=place.rank,
        token=token,
        instance=uuid.uuid4().hex,
        host=socket.gethostname(),
        address=own_address(place.host, place.port),
        facts={
            "versions": _versions(recipe),
            "settings": {name: json.dumps(one, ensure_ascii=False) for name, one in settings.items()},
            "files": {path: _content(Path(path)) for path in named_paths(recipe)},
            "devices": {} if recipe.train.device == "cpu" else {"GPUs": "some" if machine.gpus else "none"},
        },
        machine=machine,
    )


def _versions(recipe: Recipe) -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for name in ("fulltune", *PACKAGES, "peft", *((sharing.PACKAGE,) if recipe.train.engine_by else ())):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    return versions


def _content(path: Path) -> str:
    """Size and hash of a file, or of a folder's files; of each both ends are read, of many none."""
    if not path.exists():
        return "missing"
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    found, total = hashlib.blake2b(digest_size=8), 0
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.relative_to(path)} {size}\n".encode())
        total += size
        if len(files) <= _MOST_READ:
            with file.open("rb") as opened:
                found.update(opened.read(_END_BYTES))
                opened.seek(max(opened.tell(), size - _END_BYTES))
                found.update(opened.read())
    return f"{format_bytes(total)}, {found.hexdigest()}"


_COMPARED = (
    ("versions", "has other versions", " ", "install the same ones on all machines"),
    ("settings", "reads another recipe", " is ", "give all machines the same recipe and the same --set"),
    ("files", "sees other files", ": ", "give all machines the same files, in a folder that they share"),
    ("devices", "has other devices", ": ", "see what nvidia-smi says there, or set train.device: cpu"),
)


def differences(first: Member, others: Sequence[Member]) -> list[str]:
    """What the machines must have in common and do not, a line for each machine and kind: a pure function."""
    lines = []
    for other in others:
        for kind, what, joint, remedy in _COMPARED:
            mine, its = first.facts[kind], other.facts[kind]
            found = [
                f"{name}{joint}{its.get(name, 'none')} (machine 0: {mine.get(name, 'none')})"
                for name in sorted({*mine, *its})
                if its.get(name) != mine.get(name)
            ]
            is_of_recipe = kind == "files" and other.facts["settings"] != first.facts["settings"]
            if found and not is_of_recipe:
                lines.append(f"{other.label} {what}: {first_few(found)}; {remedy}")
    return lines


# ---- signs of life ---------------------------------------------------------------------------------------------


class SignOfLife:
    """This machine's file, written anew every two seconds until `end`."""

    def __init__(self, path: Path, record: Member) -> None:
        self.path, self.record = path, record
        # A signal may have it written anew while it is written.
        self._lock, self._ends = threading.RLock(), threading.Event()
        self.tell()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def tell(self, **changes: Any) -> None:
        """Write it at once, with these changes."""
        with self._lock:
            self.record = self.record.model_copy(update={**changes, "beat": self.record.beat + 1})
            self.record.save(self.path)

    def tell_end(self, error: BaseException | None) -> None:
        """Write how this machine's command ended."""
        match error:
            case None:
                self.tell(exit_code=0)
            case FulltuneError():
                self.tell(exit_code=error.exit_code, problems=error.problems)
            case _:
                self.tell(exit_code=1, problems=(f"ended with {type(error).__name__}: {error}",))

    def end(self) -> None:
        """Nothing more is written."""
        self._ends.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._ends.wait(BEAT_SECONDS):
            # A file server that is away for a moment; while it is, the others see no sign of life.
            with contextlib.suppress(OSError):
                self.tell()


class HeardFrom:
    """Another machine's file, which may not be there yet, and for how long it has not changed, by this clock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told: Member | None = None
        self.is_alive = False
        """It has changed while we looked: what lies there from an earlier job does not."""
        self._since, self._looked = time.monotonic(), -math.inf

    def look(self) -> Member | None:
        """What it says; read anew twice for each sign of life."""
        if time.monotonic() - self._looked < BEAT_SECONDS / 2:
            return self.told
        told = self.told
        # Not there, just replaced on a file server, or of another version.
        with contextlib.suppress(OSError, SetupError):
            told = Member.load(self.path)
        if told != self.told:
            self.is_alive, self.told, self._since = self._looked > -math.inf, told, time.monotonic()
        self._looked = time.monotonic()
        return self.told

    def answers(self, token: str) -> bool:
        """It repeats the token of machine 0's command."""
        told = self.look()
        return told is not None and told.token == token

    @property
    def silent_seconds(self) -> float:
        return time.monotonic() - self._since


@contextlib.contextmanager
def telling(path: Path, record: Member, others_know: Callable[[], bool] = lambda: True) -> Iterator[SignOfLife]:
    """A sign of life for as long as the block runs, which says at last how the block, or a signal, ended the command;
    it stays a little until the others know."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SetupError(
                f"{path}: another command is running as this machine of this rendezvous; end it, or give this job "
                "another port in --rendezvous, and each machine a --machine-rank of its own"
            ) from None
        except OSError:
            _log.warning("%s: locks are not supported here; see that no two jobs have the same --rendezvous", path)
        sign = SignOfLife(path, record)
        ended: BaseException | None = None
        interrupted = InterruptedRun(f"interrupted; {GO_ON}")

        def tell_and_end(number: int, frame: Any) -> None:
            sign.tell_end(interrupted)
            before[number](number, frame)

        try:
            # From Python a signal may be ignored, or end the process at once: that stays the caller's own way.
            handled = [number for number in signals.ENDING if callable(signal.getsignal(number))]
            with signals.answered(tell_and_end, handled) as before:
                yield sign
        except KeyboardInterrupt:
            ended = interrupted
            raise ended from None
        except BaseException as error:
            ended = error
            raise
        finally:
            with contextlib.suppress(OSError):  # a full disk: what is raised already says more
                sign.tell_end(ended)
                until = time.monotonic() + LINGER_SECONDS
                while time.monotonic() < until and not others_know():
                    time.sleep(POLL_SECONDS)
            sign.end()
