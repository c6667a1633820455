"""Make example data from the docstrings of installed Python packages, without importing them. The same package versions
give the same files."""

import ast
import csv
import hashlib
import importlib.util
import json
import re
import sys
import sysconfig
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, groupby, pairwise
from pathlib import Path

from fulltune.errors import DataError
from fulltune.files import write_text

_HERE = Path(__file__)

TOPIC_SOURCES, CHAT_SOURCES = tomllib.loads(_HERE.with_name("sources.toml").read_text(encoding="utf-8")).values()
_SKIPPED = "tests test testing _internal externals _vendor vendor benchmarks _lib _test utils"
_TOPIC_WORDS, _ANSWER_WORDS = (8, 32), (4, 40)
_ROWS_PER_FILE = 60
_TOPIC_ROWS, _CHAT_ROWS = (360, 150), (1200, 150)
_TEST_SHARE = 0.25

_ROLE = re.compile(r":[a-zA-Z][\w:+-]*:`([^`]*)`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`_*")
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!cf)(?<! vs)(?<!etc)(?<=[\w)\]'\"])[.!?]\s+(?=[A-Z(\"'])")
_NOT_PROSE = re.compile(
    r"^\s*(>>>|\.\.|[-=~*^]{3}|@\w|:param|:return|[*-] |Args:|Arguments:|Parameters\b:?|Returns:|Examples?:?$|Usage)",
    re.MULTILINE,
)
_NAME = re.compile(r"^[_\d]|.[A-Z_\d]")


@dataclass(frozen=True)
class _Doc:
    topic: str
    module: str
    name: str
    is_function: bool
    docstring: str


_Row = tuple[_Doc, str]


def write_example(output: Path, chat: bool) -> Path:
    """Write the data and recipe of the classifier or, if `chat`, of the chat model; return the recipe's path."""
    if chat:
        write_docstring_chat(output / "chat-data")
    else:
        write_docstring_topics(output / "quickstart-data")
    name = "chat.yaml" if chat else "quickstart.yaml"
    write_text(output / name, _HERE.with_name(name).read_text(encoding="utf-8"))
    return output / name


def write_docstring_topics(folder: Path) -> tuple[Path, Path]:
    """Write `train.csv` and `test.csv` of docstrings' first sentences and topics. Raise `DataError` for too few."""
    rows = _drop_near_copies(_read_docstrings(TOPIC_SOURCES), _first_sentences)
    splits = [_split_by_file([row for row in rows if row[0].topic == topic], *_TOPIC_ROWS) for topic in TOPIC_SOURCES]
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "train.csv", folder / "test.csv"
    for file, parts in zip(files, zip(*splits, strict=True), strict=True):
        with file.open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(["text", "label"])
            writer.writerows([text, doc.topic] for doc, text in _in_digest_order(chain.from_iterable(parts)))
    return files


def write_docstring_chat(folder: Path) -> tuple[Path, Path]:
    """Write `train.jsonl` and `test.jsonl` of questions about functions. Raise `DataError` for too few."""
    splits = _split_by_file(_drop_near_copies(_read_docstrings(CHAT_SOURCES), _one_sentence_answer), *_CHAT_ROWS)
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "train.jsonl", folder / "test.jsonl"
    for file, rows in zip(files, splits, strict=True):
        with file.open("w", encoding="utf-8") as out:
            for doc, answer in rows:
                question = {"role": "user", "content": f"What does `{_public_name(doc)}` do?"}
                out.write(json.dumps({"messages": [question, {"role": "assistant", "content": answer}]}) + "\n")
    return files


# ---- reading ---------------------------------------------------------------------------------------------------


def _read_docstrings(sources: dict[str, str]) -> Iterator[_Doc]:
    """Yield the public docstrings in the packages of each topic; `sources` maps topics to package names."""
    for topic, entries in sources.items():
        for file, module in (source for entry in entries.split() for source in _source_files(entry)):
            try:
                tree = ast.parse(file.read_bytes())
            except (SyntaxError, ValueError):
                continue  # some packages contain templates and sources for another Python version
            for name, node in _public_objects(tree.body):
                if docstring := ast.get_docstring(node):
                    yield _Doc(topic, module, name, isinstance(node, ast.FunctionDef) and "." not in name, docstring)


def _source_files(entry: str) -> Iterator[tuple[Path, str]]:
    """Yield the Python files of a package (or of `package/pattern`), and their dotted module names."""
    name, _, below = entry.partition("/")
    root = _package_root(name)
    if root is None or not root.exists():
        return
    for path in sorted(root.glob(below)) if below else [root]:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            inside = file.relative_to(root.parent).with_suffix("").parts
            if file.suffix == ".py" and set(inside).isdisjoint(_SKIPPED.split()) and inside[-1] != "conftest":
                yield file, ".".join(part for part in inside if part != "__init__")


def _package_root(name: str) -> Path | None:
    """Return a package's folder, a module's file, or None if neither is installed."""
    if name in sys.stdlib_module_names:
        # Some standard modules are frozen, and their import spec then names no file.
        folder = Path(sysconfig.get_path("stdlib")) / name
        return folder if folder.is_dir() else folder.with_suffix(".py")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin:
        return None
    origin = Path(spec.origin)
    return origin.parent if origin.name == "__init__.py" else origin


_Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _public_objects(body: Iterable[ast.stmt], prefix: str = "") -> Iterator[tuple[str, _Documented]]:
    """Yield the public functions and classes in a syntax tree with their dotted names."""
    for node in body:
        if isinstance(node, _Documented):
            if not node.name.startswith("_"):
                yield prefix + node.name, node
                if isinstance(node, ast.ClassDef):
                    yield from _public_objects(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.If, ast.Try)):
            yield from _public_objects([*node.body, *node.orelse], prefix)


# ---- texts -----------------------------------------------------------------------------------------------------


def _paragraphs(docstring: str) -> Iterator[list[str]]:
    """Yield each paragraph as a list of sentences without markup, up to the first paragraph that is not prose."""
    for block in re.split(r"\n\s*\n", docstring.strip()):
        if _NOT_PROSE.search(block):
            return
        plain = _LINK.sub(r"\1", _ROLE.sub(lambda match: match[1].lstrip("~!."), " ".join(block.split())))
        text = " ".join(re.sub(r"`|\*\*", "", plain).split())
        starts = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
        yield [text[start:end].strip() for start, end in pairwise(starts) if text[start:end].strip()]


def _is_prose(text: str, word_limits: tuple[int, int]) -> bool:
    """Return True if a text is ASCII without code, and its number of words is within the limits."""
    return (
        word_limits[0] <= len(text.split()) <= word_limits[1]
        and text.isascii()
        and not re.search(r"[{}|\\]|::|->|\$", text)
    )


def _first_sentences(doc: _Doc) -> str:
    """Return as many first sentences as the word limit allows, or "" if they are too short."""
    text = ""
    for sentence in (sentence for paragraph in _paragraphs(doc.docstring) for sentence in paragraph):
        longer = f"{text} {sentence}".strip()
        if not _is_prose(longer, (1, _TOPIC_WORDS[1])) or (text and sentence[-1] not in ".!?"):
            break
        text = longer
    return text if _is_prose(text, _TOPIC_WORDS) else ""


def _one_sentence_answer(doc: _Doc) -> str:
    """Return the docstring's first sentence if it is usable as an answer, else ""."""
    if not doc.is_function or not _public_name(doc):
        return ""
    sentences = next(_paragraphs(doc.docstring), [])
    answer = sentences[0] if sentences else ""
    if len(sentences) == 1 and answer[-1:].isalnum():
        answer += "."
    clean = answer[:1].isupper() and answer.endswith(".") and _is_prose(answer, _ANSWER_WORDS)
    return answer if clean and not re.search(r"[=<>_\[\]*]|\.\.|https?:", answer) else ""


def _public_name(doc: _Doc) -> str:
    """Return the name under which users import a function, or "" if the package does not export it.

    Many packages define `package.area.function` in `package/area/_file.py`.
    """
    parts = doc.module.split(".")
    shown = next((parts[:index] for index, part in enumerate(parts) if part.startswith("_")), parts)
    if shown == parts:
        return f"{doc.module}.{doc.name}"
    shown = ["numpy"] if shown == ["numpy", "lib"] else shown
    return ".".join([*shown, doc.name]) if doc.name in _exported_names(tuple(shown)) else ""


@cache
def _exported_names(package: tuple[str, ...]) -> frozenset[str]:
    """Return all words in a package's `__init__.py`, or an empty set without one."""
    root = _package_root(package[0])
    init = root.joinpath(*package[1:], "__init__.py") if root is not None else None
    return frozenset(re.findall(r"\w+", init.read_text(encoding="utf-8"))) if init and init.is_file() else frozenset()


# ---- rows ------------------------------------------------------------------------------------------------------


def _drop_near_copies(docs: Iterable[_Doc], make_text: Callable[[_Doc], str]) -> list[_Row]:
    """Return docstrings with texts, without those that differ from others only in names or one of six words or more."""
    known_masks: set[tuple[str, ...]] = set()
    rows: list[_Row] = []
    for doc, text in ((doc, text) for doc in docs if (text := make_text(doc))):
        plain = ("#" if _NAME.search(word) else word.lower() for word in re.findall(r"\w+", text))
        # Each run of names counts as one.
        words = tuple(word for sign, run in groupby(plain) for word in ("#" if sign == "#" else list(run)))
        # Texts that differ in one word share the tuple that has a gap in place of that word.
        gapped = [(*words[:i], "", *words[i + 1 :]) for i in range(len(words))] if len(words) >= 6 else []
        if known_masks.isdisjoint(forms := {words, *gapped}):
            rows.append((doc, text))
        # A dropped text is remembered too: a chain of small changes is one family.
        known_masks |= forms
    return rows


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _split_by_file(rows: list[_Row], most_train: int, most_test: int) -> tuple[list[_Row], list[_Row]]:
    """Return train and test rows. All rows of a source file are in the same split."""
    by_module: dict[str, list[_Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: _digest(row[1])):
        if len(by_module[row[0].module]) < _ROWS_PER_FILE:
            by_module[row[0].module].append(row)
    wanted = _TEST_SHARE * sum(map(len, by_module.values()))
    train: list[_Row] = []
    test: list[_Row] = []
    for module in sorted(by_module, key=_digest):
        (test if len(test) < wanted else train).extend(by_module[module])
    if len(rows) < 100 or not train:
        raise DataError(
            "The installed packages have too few docstrings for the example; install the packages in "
            "locks/tested.txt with their .py sources"
        )
    return _in_digest_order(train)[:most_train], _in_digest_order(test)[:most_test]


def _in_digest_order(rows: Iterable[_Row]) -> list[_Row]:
    return sorted(rows, key=lambda row: _digest(row[0].name + row[1]))
