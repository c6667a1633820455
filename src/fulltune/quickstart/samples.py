"""Real example data made from the docstrings of the Python packages that every installation has.

Nothing is downloaded and no package is imported: the source files are read with :mod:`ast`. The rows depend only on
the installed package versions, so the same installation always writes the same bytes. Rows are split by source file,
so a test row never comes from a file that gave training rows.
"""

import ast
import csv
import hashlib
import importlib.util
import io
import json
import re
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from fulltune.errors import DataError
from fulltune.files import write_text

# The label of a row is the topic whose entry holds its source file. An entry is a top-level module or package,
# optionally followed by a sub-path that may hold wildcards; a folder stands for everything below it.
TOPIC_SOURCES = {
    "deep learning": """
        torch/nn torch/optim torch/ao/nn
        transformers/generation/*.py transformers/pipelines transformers/data transformers/tokenization_*.py
        transformers/image_*.py peft/tuners/lora
    """,
    "graphs": "networkx",
    "machine learning": """
        sklearn/cluster sklearn/covariance sklearn/datasets sklearn/decomposition sklearn/ensemble
        sklearn/feature_extraction sklearn/feature_selection sklearn/gaussian_process sklearn/impute sklearn/inspection
        sklearn/linear_model sklearn/manifold sklearn/metrics sklearn/mixture sklearn/model_selection sklearn/neighbors
        sklearn/neural_network sklearn/preprocessing sklearn/semi_supervised sklearn/svm sklearn/tree sklearn/*.py
    """,
    "mathematics and physics": """
        numpy/linalg numpy/fft numpy/polynomial
        scipy/fft scipy/integrate scipy/interpolate scipy/linalg scipy/optimize scipy/special
        sympy/combinatorics sympy/functions sympy/geometry sympy/logic sympy/matrices sympy/physics sympy/series
        sympy/sets
    """,
    "statistics": "scipy/stats statistics random torch/distributions numpy/random",
    "system programming": """
        anyio asyncio bz2 concurrent email fileinput fsspec ftplib glob gzip http imaplib ipaddress logging lzma mailbox
        multiprocessing os pathlib poplib posixpath queue sched selectors shutil smtplib socket socketserver ssl
        subprocess tarfile tempfile threading urllib wsgiref xmlrpc zipfile
    """,
    "tables": "pandas/core",
    "user interfaces": """
        argparse click cmd curses getpass idlelib optparse pprint rich textwrap tkinter tqdm turtle typer
    """,
}

# Where the functions of the chat sample come from.
CHAT_SOURCES = {
    "functions": """
        networkx numpy/_core numpy/lib numpy/linalg scipy sklearn
        sympy/functions sympy/geometry sympy/matrices sympy/ntheory sympy/simplify sympy/solvers
        torch/nn asyncio os posixpath random shutil statistics subprocess tempfile textwrap
    """
}

_SKIPPED = "tests test testing _internal externals _vendor vendor benchmarks _lib _test utils"
SKIPPED_FOLDERS = frozenset(_SKIPPED.split())
TOPIC_WORDS = (8, 32)  # fewest and most words of a topic text
ANSWER_WORDS = (4, 40)  # fewest and most words of a chat answer
ROWS_PER_FILE = 60  # a single huge file must not make up most of a topic
TRAIN_ROWS_PER_TOPIC = 360
TEST_ROWS_PER_TOPIC = 150
TEST_SHARE = 0.25
MIN_TOPICS = 6
MIN_ROWS_PER_TOPIC = 100
CHAT_TRAIN_ROWS = 1200
CHAT_TEST_ROWS = 150

_ROLE = re.compile(r":[a-zA-Z][\w:+-]*:`([^`]*)`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`_*")
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!cf)(?<! vs)(?<!etc)(?<=[\w)\]'\"])[.!?]\s+(?=[A-Z(\"'])")
# Starts of sections, lists, code and directives, in the NumPy, Google and Sphinx styles.
_NOT_PROSE = re.compile(
    r"^\s*(>>>|\.\.|[-=~*^]{3}|@\w|:param|:return|[*-] |Args:|Arguments:|Parameters\b:?|Returns:|Examples?:?$|Usage)",
    re.MULTILINE,
)
_WORD = re.compile(r"\w+")
_NAME = re.compile(r"^[_\d]|.[A-Z_\d]")  # an identifier, an acronym or a number


@dataclass(frozen=True)
class _Doc:
    """One public docstring: the file it is in (dotted), the object's name inside it, its kind and its text."""

    topic: str
    module: str
    name: str
    is_function: bool
    docstring: str


_Row = tuple[_Doc, str]  # a docstring and the text made of it


def _digest(text: str) -> str:
    """Order and splits come from this digest: stable over runs, and unrelated to what the text says."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _package_root(name: str) -> Path | None:
    """Return the folder or the file of a top-level module without importing it, None if it is not installed."""
    if name in sys.stdlib_module_names:
        # Some standard modules are frozen, and their import spec then names no file.
        folder = Path(sysconfig.get_path("stdlib")) / name
        return folder if folder.is_dir() else folder.with_suffix(".py")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin:
        return None
    origin = Path(spec.origin)
    return origin.parent if origin.name == "__init__.py" else origin


def _source_files(entry: str) -> Iterator[tuple[Path, str]]:
    """Yield (file, dotted module name) for every Python file of a table entry, sorted, without test folders."""
    name, _, below = entry.partition("/")
    root = _package_root(name)
    if root is None or not root.exists():
        return
    found = sorted(root.glob(below)) if below else [root]
    for path in found:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            inside = file.relative_to(root.parent).with_suffix("").parts
            if file.suffix == ".py" and SKIPPED_FOLDERS.isdisjoint(inside) and inside[-1] != "conftest":
                yield file, ".".join(part for part in inside if part != "__init__")


_Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _public_objects(body: Iterable[ast.stmt], prefix: str = "") -> Iterator[tuple[str, _Documented]]:
    """Yield (dotted name, node) of public functions, classes and methods; what functions define inside is private."""
    for node in body:
        if isinstance(node, _Documented):
            if not node.name.startswith("_"):
                yield prefix + node.name, node
                if isinstance(node, ast.ClassDef):
                    yield from _public_objects(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.If, ast.Try)):
            yield from _public_objects([*node.body, *node.orelse], prefix)


def _paragraphs(docstring: str) -> list[str]:
    """Return the paragraphs before the first section of a docstring, each as one line without markup."""
    paragraphs: list[str] = []
    for block in re.split(r"\n\s*\n", docstring.strip()):
        if _NOT_PROSE.search(block):
            break
        text = _LINK.sub(r"\1", _ROLE.sub(lambda match: match[1].lstrip("~!."), " ".join(block.split())))
        paragraphs.append(" ".join(re.sub(r"`|\*\*", "", text).split()))
    return paragraphs


def _sentences(text: str) -> list[str]:
    """Split a paragraph into sentences; the end mark stays with its sentence."""
    starts = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    return [text[start:end].strip() for start, end in pairwise(starts) if text[start:end].strip()]


def _read_docs(topics: dict[str, str]) -> list[_Doc]:
    """Read every public docstring below the entries of the table, in the order of the table and of sorted paths."""
    docs: list[_Doc] = []
    for topic, entries in topics.items():
        for entry in entries.split():
            for file, module in _source_files(entry):
                try:
                    tree = ast.parse(file.read_bytes())
                except (OSError, SyntaxError, ValueError):
                    continue  # templates and sources for another Python version lie about in some packages
                for name, node in _public_objects(tree.body):
                    docstring = ast.get_docstring(node)
                    if docstring:
                        is_function = isinstance(node, ast.FunctionDef) and "." not in name
                        docs.append(_Doc(topic, module, name, is_function, docstring))
    return docs


def _is_prose(text: str, words: tuple[int, int]) -> bool:
    """Tell prose of a fitting length from signatures, formulas, unfilled templates and tables."""
    return words[0] <= len(text.split()) <= words[1] and text.isascii() and not re.search(r"[{}|\\]|::|->|\$", text)


def _topic_text(doc: _Doc) -> str:
    """Return the leading sentences of a docstring that fit, empty if they are too short to tell anything."""
    text = ""
    for sentence in (part for paragraph in _paragraphs(doc.docstring) for part in _sentences(paragraph)):
        longer = f"{text} {sentence}".strip()
        if not _is_prose(longer, (1, TOPIC_WORDS[1])) or (text and sentence[-1] not in ".!?"):
            break
        text = longer
    return text if _is_prose(text, TOPIC_WORDS) else ""


def _masked_words(text: str) -> tuple[str, ...]:
    """Return lower-case words with every identifier, acronym and number replaced by one sign, repeats of it merged."""
    words: list[str] = []
    for word in _WORD.findall(text):
        is_name = _NAME.search(word) is not None
        if not (is_name and words and words[-1] == "#"):
            words.append("#" if is_name else word.lower())
    return tuple(words)


def _without_near_copies(docs: list[_Doc], text_of: Callable[[_Doc], str]) -> list[_Row]:
    """Keep the first of texts that differ only in names, or in one word of six or more.

    A text that stands under several topics has no right answer, so none of its copies is kept.
    """
    rows = [(doc, text, _masked_words(text)) for doc in docs if (text := text_of(doc))]
    topics_of: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for doc, _, words in rows:
        topics_of[words].add(doc.topic)
    seen: set[tuple[str, ...]] = set()
    kept: list[_Row] = []
    for doc, text, words in rows:
        # Texts that differ in one word share the tuple that has a gap in place of that word.
        gapped = [(*words[:i], "", *words[i + 1 :]) for i in range(len(words))] if len(words) >= 6 else []
        forms = {words, *gapped}
        if len(topics_of[words]) == 1 and seen.isdisjoint(forms):
            kept.append((doc, text))
        # A dropped text is remembered too: a chain of small changes is one family.
        seen |= forms
    return kept


def _split_by_module(rows: list[_Row]) -> tuple[list[_Row], list[_Row]]:
    """Give whole source files to test, in digest order, until it has its share; everything else is train."""
    by_module: dict[str, list[_Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: _digest(row[1])):
        if len(by_module[row[0].module]) < ROWS_PER_FILE:
            by_module[row[0].module].append(row)
    wanted = TEST_SHARE * sum(map(len, by_module.values()))
    train: list[_Row] = []
    test: list[_Row] = []
    for module in sorted(by_module, key=_digest):
        (test if len(test) < wanted else train).extend(by_module[module])
    return train, test


def _first_by_digest(rows: list[_Row], count: int) -> list[_Row]:
    """Return at most `count` rows in digest order, which mixes modules and topics."""
    return sorted(rows, key=lambda row: _digest(row[0].name + row[1]))[:count]


def write_docstring_topics(folder: Path) -> tuple[Path, Path]:
    """Write a text classification data set: which topic does this docstring belong to?

    The text is the leading sentences of a public docstring (8 to 32 words), without markup. The topic comes from the
    place of its source file (`TOPIC_SOURCES`). Texts that differ only in names, or in one word of six or more, are kept
    once. All rows of a source file are in the same split.

    Args:
        folder: Where to write; made if it does not exist. Files of the same names are replaced.

    Returns:
        The paths of `train.csv` and `test.csv`, both UTF-8 with the columns `text` and `label`.

    Raises:
        DataError: The installed packages give fewer than `MIN_TOPICS` topics of `MIN_ROWS_PER_TOPIC` texts.
    """
    by_topic: dict[str, list[_Row]] = {topic: [] for topic in TOPIC_SOURCES}
    for doc, text in _without_near_copies(_read_docs(TOPIC_SOURCES), _topic_text):
        by_topic[doc.topic].append((doc, text))
    splits = {topic: _split_by_module(rows) for topic, rows in by_topic.items() if len(rows) >= MIN_ROWS_PER_TOPIC}
    splits = {topic: (train, test) for topic, (train, test) in splits.items() if train and test}
    if len(splits) < MIN_TOPICS:
        counts = ", ".join(f"{topic} {len(rows)}" for topic, rows in by_topic.items())
        raise DataError(
            f"The installed packages hold too few docstrings for the topics sample: {len(splits)} topics have "
            f"{MIN_ROWS_PER_TOPIC} texts or more, {MIN_TOPICS} are needed. Texts found: {counts}. "
            "Were the packages installed without their .py sources, or does Python run with a stripped library?"
        )
    train = [row for rows, _ in splits.values() for row in _first_by_digest(rows, TRAIN_ROWS_PER_TOPIC)]
    test = [row for _, rows in splits.values() for row in _first_by_digest(rows, TEST_ROWS_PER_TOPIC)]
    return _write_csv(folder / "train.csv", train), _write_csv(folder / "test.csv", test)


def _write_csv(path: Path, rows: list[_Row]) -> Path:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["text", "label"])
    writer.writerows([text, doc.topic] for doc, text in _first_by_digest(rows, len(rows)))
    write_text(path, buffer.getvalue())
    return path


def _public_name(doc: _Doc) -> str:
    """Return the name under which a function is imported, empty if it is not exported.

    Many packages keep `package.area.function` in `package/area/_file.py`; NumPy keeps much in `numpy/lib`. Such a
    function is public only if the package that it would be imported from names it in its `__init__.py`.
    """
    parts = doc.module.split(".")
    shown = next((parts[:i] for i, part in enumerate(parts) if part.startswith("_")), parts)
    if len(shown) == len(parts):
        return f"{doc.module}.{doc.name}"
    shown = ["numpy"] if shown == ["numpy", "lib"] else shown
    return ".".join([*shown, doc.name]) if doc.name in _exported_names(tuple(shown)) else ""


@cache
def _exported_names(package: tuple[str, ...]) -> frozenset[str]:
    root = _package_root(package[0])
    init = root.joinpath(*package[1:], "__init__.py") if root is not None else None
    return frozenset(_WORD.findall(init.read_text(encoding="utf-8"))) if init and init.is_file() else frozenset()


def _answer(doc: _Doc) -> str:
    """Return the first sentence of a function's docstring, empty if it is not one clean sentence."""
    if not doc.is_function or not _public_name(doc):
        return ""
    sentences = _sentences((_paragraphs(doc.docstring) or [""])[0])
    answer = sentences[0] if sentences else ""
    if len(sentences) == 1 and answer[-1:].isalnum():
        answer += "."
    clean = answer[:1].isupper() and answer.endswith(".") and _is_prose(answer, ANSWER_WORDS)
    return answer if clean and not re.search(r"[=<>_\[\]*]|\.\.|https?:", answer) else ""


def write_docstring_chat(folder: Path) -> tuple[Path, Path]:
    """Write a chat data set: the user asks what a function does, the assistant says it in one sentence.

    Each row is `{"messages": [user, assistant]}`; the answer is the first sentence of the function's docstring.
    Answers that differ only in names, or in one word of six or more, are kept once. All functions of a source file
    are in the same split.

    Args:
        folder: Where to write; made if it does not exist. Files of the same names are replaced.

    Returns:
        The paths of `train.jsonl` and `test.jsonl`.

    Raises:
        DataError: The installed packages give fewer than half of the rows wanted for a split.
    """
    splits = _split_by_module(_without_near_copies(_read_docs(CHAT_SOURCES), _answer))
    train, test = (_first_by_digest(*split) for split in zip(splits, (CHAT_TRAIN_ROWS, CHAT_TEST_ROWS), strict=True))
    if 2 * len(train) < CHAT_TRAIN_ROWS or 2 * len(test) < CHAT_TEST_ROWS:
        raise DataError(
            f"The installed packages hold too few docstrings for the chat sample: {len(train)} train rows and "
            f"{len(test)} test rows, at least {CHAT_TRAIN_ROWS // 2} and {CHAT_TEST_ROWS // 2} are needed. "
            "Were the packages installed without their .py sources?"
        )
    return _write_chat(folder / "train.jsonl", train), _write_chat(folder / "test.jsonl", test)


def _write_chat(path: Path, rows: list[_Row]) -> Path:
    lines = []
    for doc, answer in rows:
        question = f"What does `{_public_name(doc)}` do?"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    write_text(path, "".join(lines))
    return path
