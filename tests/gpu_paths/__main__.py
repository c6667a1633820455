"""Is every place that touches a GPU executed by a test, and does a test fail when the place is broken?

    python -m tests.gpu_paths                       run the tests marked `stand_in`
    python -m tests.gpu_paths --broken 20 --seed 1  then break 20 places, one at a time: each must be caught
    python -m tests.gpu_paths --broken all          then break every place in every way that `hook.broken` knows

Exit code 1 when a place was not executed, a test failed or a broken place was not caught.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import os
import pickle
import random
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.gpu_paths import hook, sites
from tests.gpu_paths.sites import Site

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "accelerate", "peft", "datasets", "sklearn.linear_model", "scipy.stats")
"""Imported once; each broken place is tried in a fork."""
PATIENCE_SECONDS = 300


@dataclass
class Seen:
    """What the tests reached: by function of a test, whatever its parameters."""

    reached: dict[Site, set[str]] = field(default_factory=lambda: defaultdict(set))
    otherwise: dict[Site, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Tests in which a decision went the CPU's way."""
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def tests(self, site: Site) -> list[str]:
        """The tests whose business it is: of those that reach it the one that reaches least else, for a decision one
        on each side."""
        return list(
            dict.fromkeys(self._closest(found[site]) for found in (self.reached, self.otherwise) if found[site])
        )

    def _closest(self, tests: set[str]) -> str:
        width = {test: sum(test in found for found in self.reached.values()) for test in tests}
        return min(tests, key=lambda test: (width[test], test))


class Watch:
    """A plugin of pytest: which test reached which place."""

    def __init__(self) -> None:
        self.seen = Seen()
        self._now = ""

    def note(self, site: Site, gpus_way: bool) -> None:
        if self._now:
            (self.seen.reached if gpus_way else self.seen.otherwise)[site].add(self._now)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self._now = item.nodeid.partition("[")[0]
        try:
            return (yield)
        finally:
            self._now = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seen.seconds += report.duration
        if report.failed:
            self.seen.failed.append(f"{report.nodeid}\n{report.longreprtext}")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_paths")
    parser.add_argument("--broken", default="0", help="how many places to break, or all")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    _prepare()
    seen: Seen = _in_a_fork(_watched)
    missing = [site for site in sites.all_sites() if not seen.reached[site]]
    for site in missing:
        print(f"not executed: {site.name}, line {site.line}: {site.text}")
    print("\n".join(f"failed: {test}" for test in seen.failed), end="\n" if seen.failed else "")
    count = len(sites.all_sites())
    print(f"{count - len(missing)} of {count} sites executed by a test with an effect ({seen.seconds:.0f} s)")
    if missing or seen.failed:
        return 1
    named = {site: seen.tests(site) for site in sites.all_sites()}
    ways = _ways()
    if given.broken != "all":
        ways = random.Random(given.seed).sample(ways, min(int(given.broken), len(ways)))
    survivors = list(_survivors(ways, named))
    if ways:
        drawn = "" if given.broken == "all" else f" (seed {given.seed})"
        print(f"{len(ways) - len(survivors)} of {len(ways)} broken places caught{drawn}")
    return 1 if survivors else 0


def _prepare() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for name in HEAVY:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)


def _watched() -> Seen:
    watch = Watch()
    hook.Imports(hook.noted, watch.note).install()
    _pytest("-m", "stand_in", *_marked_files(), plugins=[watch])
    return watch.seen


def _marked_files() -> list[str]:
    """Test files in which a test is marked: the others need not be read."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file) for file in files if "mark.stand_in" in file.read_text(encoding="utf-8")]


def _pytest(*arguments: str, plugins: Sequence[Any] = ()) -> int:
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments], plugins=list(plugins)))


def _warm() -> None:
    """Import what the tests import, with a switch at each place: a fork of this process begins at once."""
    hook.Imports(hook.switched, lambda site, gpus_way: None).install()
    with contextlib.redirect_stdout(io.StringIO()):
        _pytest("--collect-only", *_marked_files())


Way = tuple[Site, int, str]
"""A place, which of its ways to be wrong, and what it reads then."""


def _ways() -> list[Way]:
    found = []
    for module in dict.fromkeys(site.module for site in sites.all_sites()):
        file = sites.root() / sites.path_of(module)
        for site, node in sites.sites_of(module, ast.parse(file.read_text(encoding="utf-8"))):
            found += [(site, way, ast.unparse(wrong)) for way, wrong in enumerate(hook.broken(node))]
    return found


def _survivors(ways: Sequence[Way], named: Mapping[Site, Sequence[str]]) -> Iterator[Way]:
    """Those that no test named for their place catches."""
    is_warm = False
    # What is read when a module is imported has to be broken before that.
    for number, (site, way, wrong) in enumerate(sorted(ways, key=lambda one: one[0].function != ""), start=1):
        if site.function and not is_warm:
            _warm()
            is_warm = True
        began = time.monotonic()
        code = _in_a_fork(lambda site=site, way=way: _broken(site, way, named[site]))
        said = "NOT CAUGHT" if code == 0 else "caught"
        took = f"{time.monotonic() - began:.1f} s"
        print(
            f"{number}/{len(ways)} {said}: {site.name}, line {site.line}: {site.text} -> {wrong} ({took})", flush=True
        )
        if code == 0:
            yield site, way, wrong


def _broken(site: Site, way: int, tests: Sequence[str]) -> int:
    hook.is_broken[:] = [(site, way)]
    if "fulltune" not in sys.modules:
        hook.Imports(hook.switched, lambda site, gpus_way: None).install()
    return _pytest("-x", *(str(ROOT / test) for test in tests))


def _in_a_fork(function: Callable[[], Any]) -> Any:
    """What it gives in a process of its own; what it prints is lost.

    A process that ends without an answer, or hangs, gives its exit code, which is not 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException), Path(os.devnull).open("w", encoding="utf-8") as nothing:
                os.dup2(nothing.fileno(), 1)
                os.dup2(nothing.fileno(), 2)
                answer.write_bytes(pickle.dumps(function()))
            os._exit(0)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.02)
        return pickle.loads(answer.read_bytes()) if answer.exists() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
