"""The table of `docs/gpu.md`: a row for each function that touches a GPU, from what was measured."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.gpu_paths.sites import Site, all_sites

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
BEGIN, END = "<!-- made by `make gpu-paths` -->", "<!-- end of what `make gpu-paths` made -->"
MOST_LETTERS = 70
INTRO = """\
## Which lines were executed, and on what

{sites} places in {functions} functions of `src` touch a GPU: what they call (`torch.cuda`, autocast, loss scaling,
pinned memory, NCCL), and where they decide by a device or a number format. They are found in the syntax
(`tests/gpu_paths/sites.py`), and each is executed by a test on a stand-in; a decision counts where it goes the GPU's
way. When a place is broken, a test that its row names fails: `make gpu-paths` measures both, and breaks 20 places drawn
by `SEED`; `python -m tests.gpu_paths --broken all` breaks all of them in every way it knows. Arithmetic over records
of cards (`plan/gpus.py`) touches none, and has tables of numbers in `tests/unit/plan`. Memory that runs out is also
raised by hand at every phase of whole runs (`tests/train/test_recovery.py`), and in one of two processes
(`tests/invariant/test_one_of_two.py`).
"""
HEAD = (
    "| function | places | what touches a GPU | tests | stand-in | what only a card can show |\n"
    "|---|---:|---|---|---|---|"
)


def table(named: Mapping[Site, Sequence[str]], markers: Mapping[str, tuple[str, str]]) -> str:
    """The section.

    Args:
        named: For each place the tests that execute it, as `file.py::name`.
        markers: Of each test, what it stands on, and what only a card can show.
    """
    by_function: dict[str, list[Site]] = {}
    for site in all_sites():
        by_function.setdefault(site.name, []).append(site)
    rows = [HEAD]
    for name, places in by_function.items():
        tests = _once(test for place in places for test in named.get(place, ()))
        stands = _once(markers[test][0] for test in tests)
        cards = _once(markers[test][1] for test in tests if markers[test][1] != "-")
        cells = [
            f"`{name}`",
            str(len(places)),
            ", ".join(f"`{_short(text)}`" for text in _once(place.text for place in places)),
            ", ".join(f"`{_name(test)}`" for test in tests) or "**none**",
            "; ".join(stands) or "-",
            "; ".join(cards) or "-",
        ]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    intro = INTRO.format(sites=len(all_sites()), functions=len(by_function))
    return f"{BEGIN}\n\n{intro}\n" + "\n".join(rows) + f"\n\n{END}"


def with_table(page: str, made: str) -> str:
    """The page with this section in its place; at its end, where it has none."""
    if BEGIN not in page:
        return f"{page.rstrip()}\n\n{made}\n".lstrip()
    before, _, rest = page.partition(BEGIN)
    return before + made + rest.partition(END)[2]


def counted_in(page: str) -> Counter[str]:
    """Places by function, as the page has them."""
    return Counter({name: int(count) for name, count in re.findall(r"^\| `([^`]+)` \| (\d+) \|", page, re.MULTILINE)})


def tests_in(page: str) -> list[str]:
    """Names of the tests on the page."""
    return re.findall(r"`(test_[a-z0-9_]+)`", page)


def _once(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _name(test: str) -> str:
    return test.rpartition("::")[2]


def _short(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 3]}..."
