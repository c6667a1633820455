"""Whether the tests notice one-line faults, drawn with a fixed seed and planted in the source one at a time.

    python bench/planted_faults.py FOLDER --count 40            # draw, plant, run the tests near each of them
    python bench/planted_faults.py FOLDER --count 40 --before REV   # and those of an older commit on the same faults

A fault is a changed comparison, sign, `and`/`or`, `not`, truth value or small number. The tests that are run are those
of `make test` whose file names the module, unit tests first, until one fails. With `--before`, a fault is drawn only
where the line is the same in both commits; what the old tests caught and the new ones do not is printed as LOST, and
the exit code is 1.

Equal programs are possible (a `<` for a `<=` that never meets equality): a fault that neither suite catches says
little.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SWAPS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.In: (" in ", " not in "),
    ast.Is: (" is ", " is not "),
    ast.IsNot: (" is not ", " is "),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.And: (" and ", " or "),
    ast.Or: (" or ", " and "),
}
NOT_OURS = ("selfcheck", "quickstart.py", "samples.py", "display", "cli")
NOT_OURS += ("report/words", "report/curves", "report/scatter")
"""Paths of words and drawings, and of what the suite runs only in part."""
TIMED_OUT = "did not end"


@dataclass(frozen=True)
class Fault:
    """A line of `file` (from the repository's root) and what it becomes."""

    file: str
    line: int
    before: str
    after: str


def candidates(file: Path) -> Iterator[Fault]:
    """All possible faults of a file, each on one line."""
    text = file.read_text(encoding="utf-8")
    lines, name = text.splitlines(), file.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(text)):
        for line, start, end, swap in _edits(node):
            before = lines[line - 1]
            part = before[start:end]
            if swap[0] in part and part.count(swap[0]) == 1:
                after = before[:start] + part.replace(*swap) + before[end:]
                yield Fault(name, line, before, after)


def _edits(node: ast.AST) -> Iterator[tuple[int, int, int, tuple[str, str]]]:
    """Line, first and last column, and what is replaced by what between them."""
    between: list[tuple[ast.expr, ast.AST, ast.expr]] = []
    match node:
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            between.append((left, op, right))
        case ast.BinOp(left=left, op=op, right=right):
            between.append((left, op, right))
        case ast.BoolOp(op=op, values=[left, right]):
            between.append((left, op, right))
        case ast.UnaryOp(op=ast.Not(), operand=operand) if node.lineno == operand.lineno:
            yield node.lineno, node.col_offset, operand.col_offset, ("not ", "")
        case ast.Constant(value=bool(value)) if node.lineno == node.end_lineno:
            yield node.lineno, node.col_offset, node.end_col_offset or 0, (str(value), str(not value))
        case ast.Constant(value=int(value)) if not isinstance(value, bool) and 0 <= value <= 20:
            yield node.lineno, node.col_offset, node.end_col_offset or 0, (str(value), str(value + 1))
    for left, op, right in between:
        if type(op) in SWAPS and left.end_lineno == right.lineno:
            yield right.lineno, left.end_col_offset or 0, right.col_offset, SWAPS[type(op)]


def draw(count: int, seed: int, same_as: Path | None) -> list[Fault]:
    """Draw faults, each in another file as far as there are enough files."""
    files = sorted((ROOT / "src").rglob("*.py"))
    files = [file for file in files if not any(word in file.as_posix() for word in NOT_OURS)]
    chance = random.Random(seed)
    chance.shuffle(files)
    faults: list[Fault] = []
    while files and len(faults) < count:
        for file in list(files):
            possible = [fault for fault in candidates(file) if fault not in faults and _is_in(same_as, fault)]
            if not possible:
                files.remove(file)
                continue
            faults.append(chance.choice(possible))
            if len(faults) == count:
                break
    return faults


def _is_in(tree: Path | None, fault: Fault) -> bool:
    """Whether the line occurs exactly once in the same file of that tree."""
    if tree is None:
        return True
    file = tree / fault.file
    return file.exists() and file.read_text(encoding="utf-8").splitlines().count(fault.before) == 1


def tests_near(tree: Path, file: str) -> list[str]:
    """Test files that name the module, those of `unit` first; when none does, the unit tests of its folder."""
    parts = Path(file).with_suffix("").parts[2:]  # of src/fulltune
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    room, name = ".".join(("fulltune", *parts[:-1])), parts[-1] if parts else "fulltune"
    top = parts[0] if parts else name
    named = re.compile(
        rf"from {room} import [^\n]*\b{name}\b|{re.escape(room)}\.{name}\b|from fulltune import [^\n]*\b{top}\b"
    )
    tests = [path for path in (tree / "tests").rglob("test_*.py") if named.search(path.read_text(encoding="utf-8"))]
    near = tree / "tests" / "unit" / Path(*parts[:-1])
    tests += [path for path in near.glob("test_*.py") if path not in tests and (not tests or path.stem[5:] == name)]
    order = {"unit": 0, "contract": 1, "train": 2, "invariant": 3, "gpu": 4, "gpu_paths": 4}
    tests.sort(key=lambda path: (order[path.relative_to(tree / "tests").parts[0]], path.as_posix()))
    return [path.relative_to(tree).as_posix() for path in tests]


def failing(tree: Path, fault: Fault, tests: list[str], seconds: int) -> str:
    """The first test that fails with the fault; empty if all pass."""
    file = tree / fault.file
    source = file.read_text(encoding="utf-8")
    file.write_text(
        "\n".join(fault.after if line == fault.before else line for line in source.split("\n")), encoding="utf-8"
    )
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-x", "-q", "--tb=no", "-rfE"]
    if '"long: ' in (tree / "pyproject.toml").read_text(encoding="utf-8"):  # an older suite has no long ones
        options += ["-m", "not long"]
    command = [sys.executable, *options, *tests]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return TIMED_OUT
    finally:
        file.write_text(source, encoding="utf-8")
    if done.returncode in (0, 4, 5):  # passed, or there is no such test
        return ""
    named = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.M)
    return named[1] if named else "(collecting)"


def tree_of(revision: str, folder: Path) -> Path:
    """A clone of that commit in this folder."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    subprocess.run(["git", "checkout", "--quiet", revision], cwd=folder, check=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where copies and results are written")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--before", default=None, help="a commit whose tests are compared with today's")
    parser.add_argument("--seconds", type=int, default=300, help="for the tests near one fault")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    new = tree_of("HEAD", options.folder / "now")
    old = tree_of(options.before, options.folder / "before") if options.before else None
    counts = {TIMED_OUT: 0, "caught": 0, "missed by both": 0, "missed": 0, "LOST": 0, "new only": 0}
    for fault in draw(options.count, options.seed, old):
        by_new, by_old = failing(new, fault, tests_near(new, fault.file), options.seconds), ""
        if old is not None:
            same = by_new.split("::")[0] and (old / by_new.split("::")[0]).exists()
            by_old = failing(old, fault, [by_new], options.seconds) if same else ""
            by_old = by_old or failing(old, fault, tests_near(old, fault.file), options.seconds)
            if by_old and not by_new and (new / by_old.split("::")[0]).exists():
                by_new = failing(new, fault, [by_old], options.seconds)
        not_known = TIMED_OUT in (by_new, by_old)
        kind = TIMED_OUT if not_known else _kind(bool(by_new), None if old is None else bool(by_old))
        counts[kind] += 1
        line = asdict(fault) | {"kind": kind, "by": by_new, "before_by": by_old}
        with (options.folder / "faults.jsonl").open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
        print(f"{kind:15} {fault.file}:{fault.line} {fault.after.strip()[:60]}  {by_new}", flush=True)
    print(", ".join(f"{name} {number}" for name, number in counts.items() if number))
    sys.exit(1 if counts["LOST"] else 0)


def _kind(by_new: bool, by_old: bool | None) -> str:
    if by_old is None:
        return "caught" if by_new else "missed"
    return {(True, True): "caught", (True, False): "new only", (False, True): "LOST"}.get(
        (by_new, by_old), "missed by both"
    )


if __name__ == "__main__":
    main()
