"""A large labelled file made of what every installation has: sentences of docstrings and comments, by package.

    python bench/corpus.py ROWS FILE.csv [--words 4 14] [--labels 20]

The label of a sentence is the package it comes from. When there are fewer different sentences than rows, they are
repeated with one word left out and two exchanged: enough where only the size matters, and the script says so.
"""

from __future__ import annotations

import argparse
import ast
import csv
import io
import random
import re
import sysconfig
import tokenize
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path


def texts(file: Path) -> Iterator[str]:
    """Docstrings and runs of comment lines of a source file."""
    source = file.read_text(encoding="utf-8", errors="ignore")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""
    comments = [
        token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    yield " ".join(comments)


def sentences(file: Path, least: int, most: int) -> Iterator[str]:
    try:
        found = list(texts(file))
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError):
        return
    for text in found:
        for part in re.split(r"(?<=[.!?:;])\s+|\n\s*\n|\n\s*[-*]\s", text):
            sentence = " ".join(part.split())
            words = sentence.split(" ")
            letters = sum(character.isalpha() or character == " " for character in sentence)
            if least <= len(words) <= most and letters > 0.85 * len(sentence):
                yield sentence


def noisy(sentence: str, draw: random.Random) -> str:
    words = sentence.split(" ")
    words.pop(draw.randrange(len(words)))
    one, two = draw.randrange(len(words)), draw.randrange(len(words))
    words[one], words[two] = words[two], words[one]
    return " ".join(words)


def collect(least: int, most: int, labels: int) -> list[tuple[str, str]]:
    """Different sentences of the packages that have most of them."""
    by_package: dict[str, dict[str, None]] = defaultdict(dict)
    seen: set[str] = set()
    roots = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib")}
    for root in sorted(roots):
        for file in sorted(root.rglob("*.py")):
            package = file.relative_to(root).parts[0].removesuffix(".py")
            if package in ("site-packages", "dist-packages", "test", "tests"):
                continue
            for sentence in sentences(file, least, most):
                key = sentence.lower()
                if key not in seen:
                    seen.add(key)
                    by_package[package][sentence] = None
    largest = sorted(by_package, key=lambda name: -len(by_package[name]))[:labels]
    return [(sentence, name) for name in largest for sentence in by_package[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int)
    parser.add_argument("file", type=Path)
    parser.add_argument("--words", type=int, nargs=2, default=(4, 14))
    parser.add_argument("--labels", type=int, default=20)
    given = parser.parse_args()
    draw = random.Random(0)
    real = collect(*given.words, given.labels)
    draw.shuffle(real)
    chosen = real[: given.rows]
    made = len(chosen)
    while len(chosen) < given.rows:
        sentence, label = real[draw.randrange(len(real))]
        chosen.append((noisy(sentence, draw), label))
    with given.file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(("text", "label"))
        writer.writerows(chosen)
    print(f"{given.file}: {len(chosen):,} rows, {made:,} different sentences, {len(chosen) - made:,} made by noise")


if __name__ == "__main__":
    main()
