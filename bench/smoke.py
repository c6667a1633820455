"""Whether each part of the suite still runs to its end, in seconds: tiny models, made-up rows, bars that do not count.

A new process spends ten seconds on imports, and the parts start about a hundred. So this one imports the libraries
once, and each Python that a part or one of its commands would start is a fork of it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from bench.limited import ProcessTree
from bench.runs import SMOKE, environment

from fulltune.train.parent import spawn

WARM = (
    *("datasets", "peft", "sentence_transformers", "sklearn.metrics", "transformers.trainer", "torch.distributed.run"),
    *("fulltune.cli.app", "fulltune.train.worker.attempt", "fulltune.train.worker.main", "tests.tiny"),
)
SECONDS = 300
"""After which a part hangs, also on a busy machine, and is killed."""
WORDS = "card money transfer bank app account top cash fee change pay rate coin wait limit order pin visa lost late"


def write_data(folder: Path) -> None:
    """What `bench/public_data.py` reads, in its places and forms, and small; and a model for each of its two."""
    from tests import tiny

    draw, words = random.Random(0), WORDS.split()

    def text(least: int = 6) -> str:
        return " ".join(draw.choices(words, k=least + draw.randrange(6)))

    intents = ["card_payment_fee_charged", *(f"{one}_{other}" for one, other in zip(words, words[3:], strict=False))]
    for name, count in (("train", 320), ("test", 60)):
        rows = [{"text": f"{intents[n % 4].split('_')[0]} {text()}", "category": intents[n % 4]} for n in range(count)]
        tiny.write_csv(folder / "banking77" / f"{name}.csv", rows)
        solved = [{"question": text(), "answer": f"{text()} #### {n % 9}"} for n in range(count // 4)]
        tiny.write_jsonl(folder / "gsm8k" / f"{name}.jsonl", solved)
    for name, text_of in (("shakespeare/input.txt", "\n\n"), ("wiki_sentences/sentences.txt", "\n")):
        (folder / name).parent.mkdir()
        (folder / name).write_text(text_of.join(text(8).capitalize() + "." for _ in range(400)), encoding="utf-8")
    (folder / "wnut17").mkdir()
    for name in ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated"):
        sentences = ("".join(f"{word}\tO\n" for word in text().split()) + "Paris\tB-location\n" for _ in range(40))
        (folder / "wnut17" / name).write_text("\n".join(sentences), encoding="utf-8")
    long = tiny.encoder_tokenizer(512)
    tiny.save_model(folder / "models" / "encoder", "bert", tokenizer=long, max_position_embeddings=512)
    write = {"tokenizer": tiny.smollm2_tokenizer(), "max_position_embeddings": 2048}
    tiny.save_model(folder / "models" / "decoder", "llama", **write)


# ---- forks instead of processes ------------------------------------------------------------------------------------

_start = subprocess.Popen._execute_child  # type: ignore[attr-defined]  # what a Popen does between its pipes
_PARAMETERS = inspect.signature(_start)


def _start_a_fork(*given: Any) -> None:
    """Start the process of a `Popen`: a fork of this one where it would be this Python."""
    found = _PARAMETERS.bind(*given).arguments
    process, words = found["self"], found["args"]
    # huggingface_hub reads its server's address as it is imported.
    if words[0] != sys.executable or words[1:2] == ["-S"] or "HF_ENDPOINT" in (found["env"] or {}):
        _start(*given)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    process.pid = os.fork()
    process._child_created = True
    if process.pid:
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        process._close_pipe_fds(*(found[name] for name in pipes))
        return
    with _ending():
        for name, number in (("p2cread", 0), ("c2pwrite", 1), ("errwrite", 2)):
            if found[name] != -1:
                os.dup2(found[name], number)
        # As exec does: the lock of a folder must not outlive the process that holds it.
        for number in [int(place.name) for place in Path("/proc/self/fd").iterdir()]:
            with contextlib.suppress(OSError):
                if number > 2 and not os.get_inheritable(number):
                    os.close(number)
        if found["start_new_session"]:
            os.setsid()
        if found["process_group"] != -1:
            os.setpgid(0, found["process_group"])
        if found["cwd"] is not None:
            os.chdir(found["cwd"])
        if found["preexec_fn"] is not None:
            found["preexec_fn"]()
        if found["env"] is not None:
            os.environ.clear()
            os.environ.update(found["env"])
        _show(words)
        _interpret(words[1:])


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """End this fork behind the block, with the code of an interpreter that had run it."""
    code: Any = 0
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        yield
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        code = 1
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _show(words: Sequence[str]) -> None:
    """Be seen by other processes with this command line, by which parts find processes."""
    start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    with Path("/proc/self/mem").open("r+b", buffering=0) as memory:
        memory.seek(start)
        memory.write("\0".join(words).encode()[: end - start - 1].ljust(end - start, b"\0"))


def _interpret(words: Sequence[str]) -> None:
    """Do what `python WORDS` does."""
    match [word for word in words if word != "-u"]:
        case ["-m", name, *arguments]:
            sys.argv = [name, *arguments]
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        case ["-c", program, *arguments]:
            sys.argv = ["-c", *arguments]
            exec(program, {"__name__": "__main__"})
        case [file, *arguments]:
            sys.argv = [file, *arguments]
            sys.path.insert(0, str(Path(file).parent))
            runpy.run_path(file, run_name="__main__")


# ---- the parts -----------------------------------------------------------------------------------------------------


def _run_part(part: str, folder: Path) -> None:
    """Take all figures of a part, whose output goes to `folder.log`."""
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT, 0o666)
    for number in (1, 2):
        os.dup2(log, number)
    folder.mkdir()
    os.environ["FULLTUNE_CACHE"] = str(folder / "cache")
    figures = list(importlib.import_module(f"bench.{part}").measure(folder, True))
    print("\n".join(f"{figure.name}: {figure.value}" for figure in figures))
    sys.exit(None if figures else "no figures")


def _parts_in_turn(parts: Sequence[str], folder: Path, at_once: int) -> Iterator[tuple[str, float, int]]:
    """Run the parts; yield each one's name, seconds and exit code as it ends."""
    waiting, running = list(parts), dict[int, tuple[str, float]]()
    while waiting or running:
        while waiting and len(running) < at_once:
            part = waiting.pop(0)
            if (pid := os.fork()) == 0:
                with _ending():
                    spawn.die_with_parent(os.getppid())
                    _run_part(part, folder / part)
            running[pid] = part, time.monotonic()
        for pid, (_, began) in running.items():
            if time.monotonic() - began > SECONDS:
                ProcessTree(pid).kill()
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            part, began = running.pop(pid)
            yield part, time.monotonic() - began, os.waitstatus_to_exitcode(status)
        time.sleep(0 if pid else 0.02)


def smoke(parts: Sequence[str]) -> int:
    """Run the parts with a line for each; the exit code is 1 if one of them ends in an error."""
    if not SMOKE:  # a new process: models and sizes are read as modules are imported
        with tempfile.TemporaryDirectory(prefix="fulltune-bench-") as place:
            variables = {"FULLTUNE_BENCH_SMOKE": "1", "FULLTUNE_BENCH_DATA": place, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-X", f"{' ' * 4000}", "-m", "bench", "smoke", "--only", *parts]
            return subprocess.run(command, env=environment(**variables), check=False).returncode
    from tests.train.runs import without_tracing

    began, folder = time.monotonic(), Path(os.environ["FULLTUNE_BENCH_DATA"])
    for name in WARM:
        importlib.import_module(name)
    importlib.import_module("transformers.utils.logging").disable_progress_bar()
    os.getloadavg = lambda: (0.0, 0.0, 0.0)  # a plan of a busy machine is made again before anything begins
    write_data(folder)
    print(f"imports, models, rows: {time.monotonic() - began:.0f} s", flush=True)
    gc.collect()
    gc.freeze()
    failed = []
    with mock.patch.object(subprocess.Popen, "_execute_child", _start_a_fork), without_tracing():
        for part, seconds, code in _parts_in_turn(parts, folder, min(os.cpu_count() or 1, 2)):
            print(f"{part}: {'ended' if code == 0 else f'FAILED with {code}'} after {seconds:.0f} s", flush=True)
            if code:
                failed.append(part)
                print((folder / f"{part}.log").read_text(encoding="utf-8", errors="replace")[-4000:], flush=True)
    print(f"{len(parts)} parts in {time.monotonic() - began:.0f} s; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0
