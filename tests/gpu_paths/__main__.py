"""Is every place that touches a GPU executed by a test, and does a test fail when it is broken?

    python -m tests.gpu_paths              run the tests marked `stand_in`, print what no test reached, write the page
    python -m tests.gpu_paths break 20 1   break 20 places, drawn with seed 1, one at a time: each must be caught
    python -m tests.gpu_paths break all    break each place in every way there is
"""

from __future__ import annotations

import ast
import os
import random
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.gpu_paths import hook, page, sites
from tests.gpu_paths.sites import Site

TESTS = Path(__file__).parents[1]
FASTER = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist")


class Watch:
    """A plugin of pytest: which test reached which place, and what its marker says."""

    def __init__(self) -> None:
        self.reached: dict[Site, set[str]] = defaultdict(set)
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()
        self._now: str | None = None

    def note(self, site: Site) -> None:
        if self._now is not None:
            self.reached[site].add(self._now)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self._now = item.nodeid
        try:
            return (yield)
        finally:
            self._now = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.add(report.nodeid)


def marked_files() -> list[str]:
    """Test files in which a test is marked."""
    return [str(file) for file in sorted(TESTS.rglob("test_*.py")) if "mark.stand_in" in file.read_text("utf-8")]


def watched(*arguments: str) -> tuple[int, Watch]:
    """Run tests in this process, and see what they reach."""
    watch = Watch()
    hook.Imports(hook.noted, watch.note).install()
    code = pytest.main([*FASTER, *arguments], plugins=[watch])
    return int(code), watch


if __name__ == "__main__":
    code, watch = watched(*sys.argv[1:])
    import json
    out = {f"{s.module}:{s.number}": sorted(v) for s, v in watch.reached.items()}
    Path("/tmp/reached.json").write_text(json.dumps({"reached": out, "seconds": watch.seconds, "failed": sorted(watch.failed)}))
    for s in sites.all_sites():
        print(len(watch.reached.get(s, ())), s.name, s.line, s.text)
