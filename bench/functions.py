"""Pairs and numbers to learn, made of what every installation has: the functions of Python and of fulltune's libraries.

    python bench/functions.py pairs|lengths FOLDER      # FOLDER/train.csv, eval.csv, test.csv

`pairs`: does this first sentence of a docstring (`text_b`) belong to this function, its name and parameters
(`text_a`)? Where not, it is of another function of the same module. `lengths`: how long is a docstring, the natural
logarithm of its words, from the first 30 of them. (The number of a function's lines cannot be told from its docstring:
ridge regression on embeddings explains nothing of it.) All rows of a module are in one split, no name with parameters
and no first sentence comes twice, and the rows depend on the installed versions alone.
"""

from __future__ import annotations

import argparse
import ast
import csv
import math
import random
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

PACKAGES = (
    *("accelerate", "datasets", "huggingface_hub", "jinja2", "matplotlib", "numpy", "pandas", "peft", "psutil"),
    *("pyarrow", "pydantic", "rich", "scipy", "sklearn", "sympy", "torch", "transformers", "typer", "yaml"),
)
"""fulltune's dependencies, and what they depend on themselves."""
LEFT_OUT = ("test", "tests", "testing", "idlelib", "site-packages", "dist-packages", "_vendor", "turtledemo")
SPLITS = {"test": 1500, "eval": 500, "train": 1500}
"""Rows of each, in the order in which modules are given to them."""
MOST_OF_A_MODULE, MOST_OF_A_PACKAGE = 12, 900


@dataclass(frozen=True)
class Function:
    """A function with a docstring."""

    call: str
    """Name and parameters."""
    docstring: str

    @property
    def sentence(self) -> str:
        """The docstring's first one."""
        paragraph = " ".join(self.docstring.split("\n\n")[0].split())
        return paragraph.split(". ")[0].rstrip(".")


def functions(file: Path) -> Iterator[Function]:
    """Those of a source file whose docstring begins with a sentence of 4 to 25 words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other packages' sources
            tree = ast.parse(file.read_text(encoding="utf-8", errors="ignore"))
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name.startswith("__"):
            continue
        names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        names = [name for name in names if name not in ("self", "cls")]
        found = Function(f"{node.name}({', '.join(names[:8])})", ast.get_docstring(node) or "")
        if len(node.body) >= 2 and 4 <= len(found.sentence.split()) <= 25 and found.sentence.isascii():
            yield found


def modules() -> list[list[Function]]:
    """The functions of each module, the modules in a random order; at least four of each."""
    draw = random.Random(0)
    seen: set[str] = set()
    all_of: list[list[Function]] = []
    for files in _files():
        draw.shuffle(files)
        rows = 0
        for file in files:
            chosen = []
            for one in functions(file):
                keys = {one.call.lower(), one.sentence.lower()}
                if not keys & seen and len(chosen) < MOST_OF_A_MODULE:
                    seen |= keys
                    chosen.append(one)
            if len(chosen) >= 4 and rows < MOST_OF_A_PACKAGE:
                rows += len(chosen)
                all_of.append(chosen)
    draw.shuffle(all_of)
    return all_of


def _files() -> Iterator[list[Path]]:
    """The source files of the standard library, then of each package that is installed."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    for name in PACKAGES:
        found = find_spec(name)
        roots += [Path(place) for place in (found and found.submodule_search_locations) or ()]
    for root in roots:
        yield [file for file in sorted(root.rglob("*.py")) if not set(LEFT_OUT) & set(file.relative_to(root).parts)]


def pairs(module: list[Function], draw: random.Random) -> list[dict[str, str]]:
    """Half of a module's functions with their sentence, half with that of another one of this half."""
    module = module[: len(module) // 2 * 2]
    draw.shuffle(module)
    half = len(module) // 2
    right = [(one.call, one.sentence, "match") for one in module[:half]]
    others = [*module[half + 1 :], module[half]]
    wrong = [(one.call, other.sentence, "other") for one, other in zip(module[half:], others, strict=True)]
    return [dict(zip(("text_a", "text_b", "label"), row, strict=True)) for row in (*right, *wrong)]


def lengths(module: list[Function], draw: random.Random) -> list[dict[str, str]]:
    """The beginning of each docstring and the logarithm of its words."""
    words = [one.docstring.split() for one in module]
    return [{"text": " ".join(each[:30]), "log_words": f"{math.log(len(each)):.4f}"} for each in words]


KINDS = {"pairs": pairs, "lengths": lengths}


def write(kind: str, folder: Path) -> None:
    """The three files."""
    draw = random.Random(1)
    rows = iter([KINDS[kind](module, draw) for module in modules()])
    for name, count in SPLITS.items():
        chosen: list[dict[str, str]] = []
        while len(chosen) < count:
            chosen += next(rows)
        chosen = chosen[:count]
        draw.shuffle(chosen)
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, list(chosen[0]))
            writer.writeheader()
            writer.writerows(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    write(given.kind, given.folder)


if __name__ == "__main__":
    main()
