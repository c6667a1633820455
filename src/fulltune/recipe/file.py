"""Read a recipe file: YAML, `${NAME}`, `--set` overrides, and every problem at once with its line.

No torch, no transformers; a recipe error answers in well under half a second.
"""

from __future__ import annotations

import copy
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from fulltune.errors import RecipeError
from fulltune.recipe import rules as recipe_rules
from fulltune.recipe.data import MixedFile
from fulltune.recipe.fields import Recipe, resolve_paths
from fulltune.recipe.model import NAME
from fulltune.text import did_you_mean, near_names

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
Lines = Mapping[tuple[str | int, ...], int | str]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override, check; return the recipe with absolute paths.

    Args:
        path: A YAML file.
        overrides: `block.name=value` strings, as given with `--set`; the value is read as YAML.

    Returns:
        The checked recipe; relative paths start at the recipe's folder.

    Raises:
        RecipeError: With all problems found, each naming file and line, what was expected and the nearest known name.

    Example:
        >>> recipe = load_recipe("banking77.yaml", ["train.num_train_epochs=1"])  # doctest: +SKIP
    """
    path = Path(path)
    if not path.exists():
        raise RecipeError(f"{path}: no such file; write one with 'fulltune init DATA'")
    if path.is_dir():
        raise RecipeError(f"{path}: is a folder, expected a recipe file (YAML)")
    if path.suffix.lower() in _DATA:
        raise RecipeError(f"{path}: is data, expected a recipe; write one with 'fulltune init {path}'")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({(error.strerror or str(error)).lower()})") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not a text file in UTF-8 (byte {error.start}); expected a recipe (YAML)") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", error)).split())
        raise RecipeError(f"{path}{line}  not valid YAML: {reason}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected settings such as 'model: ...', found {_kind(values)}")
    places = list(_lines(node))
    lines: dict[tuple[str | int, ...], int | str] = dict(places)
    # Of two keys in one mapping YAML would keep the last one in silence.
    counts = Counter(at for at, _ in places)
    twice = [at for at, count in counts.items() if count > 1 and counts.get(at[:-1], 1) == 1]
    problems = [f"{_where(path, lines, at)}  {_dotted(at)}: given twice; keep one" for at in twice]
    values = _substitute(values, (), problems, path, lines)
    for override in overrides:
        if at := _override(values, override, problems):
            blocks = {at[:depth]: f"--set {override}" for depth in range(1, len(at))}
            kept = {place: line for place, line in lines.items() if place[: len(at)] != at}
            lines = {**blocks, **kept, at: f"--set {override}"}
    try:
        recipe = check(values, path, lines)
    except RecipeError as error:
        problems += error.problems
    if problems:
        raise RecipeError(problems)
    return resolve_paths(recipe, path.parent.resolve())


def check(values: dict[str, Any], path: Path, lines: Lines | None = None) -> Recipe:
    """Turn plain values into a recipe, or raise a `RecipeError` that names every problem.

    What is wrong is left out and the rest is checked again, because the rules of a block are asked only where all its
    settings can be read.
    """
    lines, lost = lines or {}, set[str]()
    problems = []
    if "method" in values and values.get("methods"):  # a checked recipe always has a `method`
        problems.append(
            f"{_where(path, lines, ('method',))}  method and methods are both given: 'fulltune compare' reads "
            "'methods', the other commands 'method'; remove one"
        )
    left = copy.deepcopy(values)
    recipe: Recipe | None = None
    while recipe is None:
        try:
            recipe = Recipe.model_validate(left)
        except ValidationError as error:
            said = [text for item in error.errors() for text in _describe(item, path, lines, values)]
            problems += [text for text in _not_about(said, lost) if text not in problems]
            gone = [(name, item["type"]) for item in error.errors() for name in _left_out(item, left)]
            if not gone:  # something is missing
                raise RecipeError(problems) from None
            lost |= {name for name, why in gone if why != "extra_forbidden"}
    found = recipe_rules.problems_of(recipe)
    problems += _not_about(_placed(found, path, lines), lost)
    if problems:
        raise RecipeError(problems)
    return recipe


def _not_about(problems: Iterable[str], lost: set[str]) -> list[str]:
    """Those that name none of these settings (a block's name is none): others may follow from what was left out."""
    return [one for one in problems if not lost & {*re.findall(r"\w+\b(?!\.\w)", one.partition("  ")[2])}]


def _left_out(item: Any, values: dict[str, Any]) -> Iterable[str]:
    """Take out of a recipe the setting, or those that a rule names, that one of pydantic's errors is about; their
    names."""
    block, at = values, _without_kinds(item["loc"])
    if len(at) > 1 and isinstance(values.get(at[0]), dict):
        block, at = values[at[0]], at[1:]
    inner, names = block.get(at[0]) if at else block, at[:1]
    if item["type"] == "value_error" and isinstance(inner, dict):
        named = tuple(name for name in inner if re.search(rf"\b{re.escape(str(name))}\b", item["msg"]))
        block, names = (inner, named) if named else (block, names)
    for name in names:
        if name in block:
            del block[name]
            yield str(name)


def _placed(problems: Iterable[str], path: Path, lines: Lines) -> list[str]:
    """Problems that begin with the name of their setting, with its file and line."""
    names = {text: text.partition(":")[0].split(".") for text in problems}
    places = {text: tuple(int(part) if part.isdigit() else part for part in name) for text, name in names.items()}
    return [f"{_where(path, lines, place)}  {text}" for text, place in places.items()]


def _describe(item: Any, path: Path, lines: Lines, values: dict[str, Any]) -> Iterable[str]:
    # A union's branch name (`str`, `tuple[...]`) is part of pydantic's location but not of the file.
    at = tuple(part for part in item["loc"] if isinstance(part, int) or re.fullmatch(r"[A-Za-z_0-9]+", str(part)))
    at = _without_kinds(at)
    if len(at) > 1 and at[-1] in ("str", "tuple", "int", "float"):
        at = at[:-1]
    where, name = _where(path, lines, at), _dotted(at)
    given = item.get("input")
    match item["type"]:
        case "extra_forbidden":
            yield f"{where}  {name}: unknown setting; {_instead(at, values)}"
        case "missing":
            yield f"{where}  {name}: missing; {_meaning(at, values)}"
        case "value_error":
            for text in str(item["ctx"]["error"]).splitlines():
                first = re.match(r"([a-z_]+)\b", text)
                inner = (*at, first.group(1)) if first and (*at, first.group(1)) in lines else at
                # Of one setting, or of a block, whose text begins with the setting's name.
                joint = ": " if text.startswith("expected ") else "."
                prefix = f"{_dotted(at)}{joint}" if at else ""
                yield f"{_where(path, lines, inner)}  {prefix}{text}"
        case "literal_error":
            yield f"{where}  {name}: {_expected(item['ctx']['expected'], given)}"
        case "union_tag_invalid":
            yield f"{where}  {name}.kind: {_expected(item['ctx']['expected_tags'], item['ctx']['tag'])}"
        case "union_tag_not_found":
            yield f"{where}  {name}.kind: missing; expected one of {', '.join(_by_kind(at[0]))}"
        case "invalid_key":
            yield f"{where}  {name}: unknown setting; the names of settings are texts"
        case "tuple_type":
            # In a union the other branch reports it already.
            if not str(item["loc"][-1]).startswith("tuple["):
                yield f"{where}  {name}: expected a list, found {given!r}; write [{given}]"
        case "string_pattern_mismatch" if item["ctx"]["pattern"] == NAME:
            allowed = "letters, digits, '.', '_' and '-', with a letter or a digit first"
            yield f"{where}  {name}: expected {allowed}, found {given!r}"
        case "too_short" | "string_too_short":
            yield f"{where}  {name}: is empty; {_meaning(at, values)}"
        case "model_type" | "dict_type":
            yield f"{where}  {name}: expected settings (a block), found {_kind(given)}"
        case _:
            message = item["msg"][0].lower() + item["msg"][1:]
            message = re.split(", (?:unable|got)", message.removeprefix("input should be ").removeprefix("a valid "))[0]
            expected, found = _IN_WORDS.get(message, message), "nothing" if given is None else repr(given)
            is_percentage = re.fullmatch(r"\d+(\.\d+)? *%", str(given))
            instead = f"; write {float(given.rstrip(' %')) / 100:g}" if is_percentage else ""
            yield f"{where}  {name}: expected {expected}, found {found}{instead}"


_DATA = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".conll", ".iob", ".bio", ".txt")
_IN_WORDS = {"integer": "whole number", "string": "text"}
"""What pydantic calls otherwise than docs/recipe.md does."""


_FEW = 12
"""So many names are listed; more would hide what was to be said."""


def _instead(at: tuple[str | int, ...], values: dict[str, Any]) -> str:
    """What to write in place of an unknown setting."""
    name, block = str(at[-1]), at[:-1]
    if block[:2] == ("data", "train"):
        return did_you_mean(name, MixedFile.model_fields) or f"known here: {', '.join(MixedFile.model_fields)}"
    if (said := recipe_rules.answer(name)) is not None:
        return said
    if block[:1] and block[0] in _UNIONS:
        kinds = [kind for kind, member in _by_kind(block[0]).items() if name in member.model_fields]
        if kinds:
            return f"it belongs to kind: {' or '.join(kinds)}"
    elsewhere = [other for other in _blocks() if name in _fields((other,)) and (other,) != block]
    if elsewhere:
        return f"did you mean '{elsewhere[0]}.{name}'?"
    if name in recipe_rules.training_arguments():
        return f"write train.extra.{name}"
    known = sorted(_fields(block, values))
    if hint := did_you_mean(name, known):
        return hint
    if near := near_names(name.lower(), recipe_rules.answers(), cutoff=0.85):
        return recipe_rules.answers()[near[0]]
    return f"known here: {', '.join(known)}" if len(known) <= _FEW else "docs/recipe.md lists those that are known"


def _expected(expected: str, given: Any) -> str:
    names = re.findall(r"'([^']+)'", expected)
    hint = did_you_mean(str(given), names)
    return f"expected {expected}, found {given!r}" + (f"; {hint}" if hint else "")


def _blocks() -> list[str]:
    return [name for name, field in Recipe.model_fields.items() if _is_block(field.annotation) or name in _UNIONS]


_UNIONS = ("method", "methods")
"""Settings that are one of several blocks, told apart by their `kind`."""


def _without_kinds(at: tuple[Any, ...]) -> tuple[Any, ...]:
    """A place as in the file: pydantic puts the kind of a method after it."""
    place = 2 if at[:1] == ("methods",) else 1
    if at[:1] and at[0] in _UNIONS and len(at) > place and at[place] in _by_kind(at[0]):
        return (*at[:place], *at[place + 1 :])
    return at


def _by_kind(name: Any) -> dict[str, Any]:
    """The blocks that a method may be."""
    annotation = Recipe.model_fields[str(name)].annotation
    union = annotation if name == "method" else get_args(get_args(annotation)[0])[0]
    return {get_args(block.model_fields["kind"].annotation)[0]: block for block in get_args(union)}


def _is_block(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _fields(at: tuple[str | int, ...], values: Any = None) -> dict[str, Any]:
    """Fields known at a place of the recipe, of all methods where `values` does not say which; none in a list."""
    if at and at[0] in _UNIONS:
        place = 2 if at[0] == "methods" else 1
        if len(at) != place:
            return {}
        for part in at:
            values = _inner(values, part)
        kind = values.get("kind", "full" if at[0] == "method" else None) if isinstance(values, dict) else values
        of_kind = _by_kind(at[0])
        named = [of_kind[kind]] if kind in of_kind else list(of_kind.values())
        return {name: field for block in named for name, field in block.model_fields.items()}
    if at[:2] == ("data", "train") and len(at) == 3:
        return dict(MixedFile.model_fields)
    model: Any = Recipe
    for part in at:
        field = model.model_fields.get(part) if _is_block(model) else None
        if field is None or not _is_block(field.annotation):
            return {}
        model = field.annotation
    return dict(model.model_fields)


def _inner(values: Any, part: Any) -> Any:
    if isinstance(values, dict):
        return values.get(part)
    return values[part] if isinstance(values, (list, tuple)) and isinstance(part, int) else None


def _meaning(at: tuple[str | int, ...], values: Any) -> str:
    field = _fields(at[:-1], values).get(str(at[-1]))
    text = (field.description or "") if field else ""
    return "expected: " + " ".join(text.split()).split(". ")[0].rstrip(".") if text else "it is required"


def _kind(value: Any) -> str:
    names = {dict: "settings", list: "a list", str: "a text", type(None): "nothing", bool: "true/false"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _dotted(at: tuple[str | int, ...]) -> str:
    return ".".join(str(part) for part in at)


def _where(path: Path, lines: Lines, at: tuple[str | int, ...]) -> str:
    while at and at not in lines:
        at = at[:-1]
    if not at:
        return str(path)
    return f"{path}:{line}" if isinstance(line := lines[at], int) else line


def _lines(node: Any, at: tuple[str | int, ...] = ()) -> Iterable[tuple[tuple[str | int, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*at, key.value)
            yield inner, key.start_mark.line + 1
            yield from _lines(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            yield (*at, position), value.start_mark.line + 1
            yield from _lines(value, (*at, position))


def _substitute(value: Any, at: tuple[str | int, ...], problems: list[str], path: Path, lines: Lines) -> Any:
    if isinstance(value, dict):
        return {key: _substitute(inner, (*at, key), problems, path, lines) for key, inner in value.items()}
    if isinstance(value, list):
        return [_substitute(inner, (*at, i), problems, path, lines) for i, inner in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            problems.append(f"{_where(path, lines, at)}  {_dotted(at)}: environment variable {name} is not set")
        return os.environ.get(name, match.group(0))

    return _VARIABLE.sub(replace, value)


_SHORT = {"model": "name", "method": "kind"}
"""Blocks that a plain text is short for, and the setting that it is."""


def _override(values: dict[str, Any], override: str, problems: list[str]) -> tuple[str | int, ...]:
    """Apply one `block.name=value` and return its place; the value is YAML, so `8`, `true` and `[a, b]` have their
    types."""
    name, separator, text = override.partition("=")
    if not separator or not name.strip():
        problems.append(f"--set {override}: expected block.name=value, for example train.num_train_epochs=3")
        return ()
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problems.append(f"--set {override}: the value is not valid YAML: {getattr(error, 'problem', error)}")
        return ()
    *blocks, last = name.strip().split(".")
    if not all((*blocks, last)):
        problems.append(f"--set {override}: a name is missing beside a '.'")
        return ()
    place = values
    for block in blocks:
        inner = place.get(block)
        if isinstance(inner, str) and block in _SHORT:
            inner = {_SHORT[block]: inner}
        if isinstance(inner, list):
            problems.append(f"--set {override}: {block} is a list; give all of it, such as --set '{block}=[...]'")
            return ()
        inner = dict(inner) if isinstance(inner, dict) else {}
        place[block] = inner
        place = inner
    place[last] = value
    return (*blocks, last)
