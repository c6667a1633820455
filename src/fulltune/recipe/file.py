from __future__ import annotations

import copy
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from fulltune.errors import RecipeError
from fulltune.recipe import rules as recipe_rules
from fulltune.recipe.address import HubDataset
from fulltune.recipe.data import SUFFIXES
from fulltune.recipe.fields import Recipe, resolve_paths
from fulltune.recipe.methods import ComparedMethod
from fulltune.recipe.model import NAME, Block, PlainSettings
from fulltune.text import did_you_mean, near_names

_VARIABLE_PATTERN = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
Lines = Mapping[str, int | str]
"""Line number of each setting, or the `--set` option that sets it, by dotted name."""

FieldError = Mapping[str, Any]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load and check a recipe file.

    Args:
        path: A YAML file.
        overrides: `block.name=value` strings, as for `--set`.

    Returns:
        The recipe with absolute paths.

    Raises:
        RecipeError: With all problems, each with its line and what was expected.

    Example:
        >>> recipe = load_recipe("banking77.yaml", ["train.num_train_epochs=1"])  # doctest: +SKIP
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix.lower() in SUFFIXES and path.suffix.lower() != ".json":  # a recipe may be JSON
                raise RecipeError(
                    f"{path}: expected a recipe, found a data file; write a recipe with 'fulltune init {path}'"
                )
            text = file.read()
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file; write a recipe with 'fulltune init DATA'") from None
    except OSError as error:
        raise RecipeError(f"{path}: {(error.strerror or str(error)).lower()}; expected a recipe file (YAML)") from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: expected a recipe (YAML), found a file that is not UTF-8 text (byte {error.start})"
        ) from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", error)).split())
        raise RecipeError(f"{path}{line}  not valid YAML: {reason}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected settings such as 'model: ...', found {_type_in_words(values)}")
    numbered_keys = list(_setting_lines(node))
    lines: dict[str, int | str] = dict(numbered_keys)
    # YAML would silently keep the last of two equal keys.
    counts = Counter(name for name, _ in numbered_keys)
    twice = [name for name, count in counts.items() if count > 1 and counts.get(name.rpartition(".")[0], 1) == 1]
    problems = [f"{name}: set twice; keep only one of the lines" for name in twice]
    values = _substitute_variables(values, "", problems)
    problems = [_with_location(text, path, lines) for text in problems]
    for override in overrides:
        try:
            setting = _apply_override(values, override)
        except ValueError as error:
            problems.append(f"--set {override}: {error}")
            continue
        others = {name: line for name, line in lines.items() if not f"{name}.".startswith(f"{setting}.")}
        blocks = {setting[: dot.start()]: f"--set {override}" for dot in re.finditer(r"\.", setting)}
        lines = {**blocks, **others, setting: f"--set {override}"}
    try:
        recipe = check_recipe(values, path, lines)
    except RecipeError as error:
        problems += error.problems
    if problems:
        raise RecipeError(problems)
    return resolve_paths(recipe, path.parent.resolve())


def check_recipe(values: PlainSettings, path: Path, lines: Lines | None = None) -> Recipe:
    """Build a recipe from plain values, or raise a `RecipeError` that lists every problem.

    Rules across settings need valid values, so invalid settings are removed before the rules are checked.
    """
    problems, removed, remaining = list[str](), set[str](), copy.deepcopy(values)
    if "method" in values and values.get("methods"):  # a checked recipe always has a `method`
        problems.append(
            "method and methods are both set, but 'fulltune compare' reads only 'methods', and all other commands read "
            "only 'method'; remove one"
        )
    recipe: Recipe | None = None
    while recipe is None:
        try:
            recipe = Recipe.model_validate(remaining)
        except ValidationError as error:
            texts = [text for field_error in error.errors() for text in _describe_error(field_error, values)]
            problems += [text for text in _without_removed(texts, removed) if text not in problems]
            names = [
                (name, field_error)
                for field_error in error.errors()
                for name in _remove_settings(field_error, remaining)
            ]
            if not names:  # a setting is missing
                break
            # An unknown setting can be left out without effect, but not the setting around it.
            removed |= {name for name, one in names if (one["type"], *one["loc"][-1:]) != ("extra_forbidden", name)}
    if recipe is not None:
        problems += _without_removed(recipe_rules.problems_of(recipe), removed)
        if not problems:
            return recipe
    raise RecipeError([_with_location(text, path, lines or {}) for text in problems])


def _with_location(problem: str, path: Path, lines: Lines) -> str:
    """Return a problem prefixed with its file and line, or with its `--set` option."""
    named = [name for name in lines if re.match(rf"{re.escape(name)}(?![\w-])", problem)]
    line = lines[max(named, key=len)] if named else ""
    return f"{f'{path}:{line}' if isinstance(line, int) else line or path}  {problem}"


def _without_removed(problems: Iterable[str], removed: set[str]) -> list[str]:
    return [problem for problem in problems if not removed & {*re.findall(r"\w+\b(?!\.\w)", problem)}]


def _remove_settings(field_error: FieldError, values: PlainSettings) -> Iterable[str]:
    """Remove the settings that caused a pydantic error from `values`, and yield their names."""
    block, location = values, _location_in_file(field_error)
    if len(location) > 1 and isinstance(values.get(location[0]), dict):
        block, location = values[location[0]], location[1:]
    inner, names = block.get(location[0]) if location else block, location[:1]
    if field_error["type"] == "value_error" and isinstance(inner, dict):
        named = tuple(name for name in inner if re.search(rf"\b{re.escape(str(name))}\b", field_error["msg"]))
        block, names = (inner, named) if named else (block, names)
    for name in names:
        if name in block:
            del block[name]
            yield str(name)


def _describe_error(field_error: FieldError, values: PlainSettings) -> Iterable[str]:
    """Yield error messages for a pydantic error, each starting with the setting's name."""
    location, value = _location_in_file(field_error), field_error.get("input")
    name = ".".join(map(str, location))
    match field_error["type"]:
        case "extra_forbidden":
            yield f"{name}: unknown setting; {_suggest_setting(location, values)}"
        case "missing":
            yield f"{name}: missing; {_describe_setting(location, values)}"
        case "value_error":
            for text in str(field_error["ctx"]["error"]).splitlines():
                # A block's message begins with the setting's name, a single setting's does not.
                joint = ": " if text.startswith("expected ") else "."
                yield f"{name}{joint}{text}" if location else text
        case "literal_error":
            yield f"{name}: {_expected_and_found(field_error['ctx']['expected'], value)}"
        case "union_tag_invalid":
            yield f"{name}.kind: {_expected_and_found(field_error['ctx']['expected_tags'], field_error['ctx']['tag'])}"
        case "union_tag_not_found":
            yield f"{name}.kind: missing; expected one of {', '.join(_METHOD_BLOCKS)}"
        case "invalid_key":
            yield f"{name}: unknown setting; names of settings must be text"
        case "tuple_type":
            # Within a union, the other branch has already reported it.
            if not str(field_error["loc"][-1]).startswith("tuple["):
                yield f"{name}: expected a list, found {value!r}; write [{value}]"
        case "string_pattern_mismatch" if field_error["ctx"]["pattern"] == NAME:
            allowed = "letters, digits, '.', '_' and '-', with a letter or a digit first"
            yield f"{name}: expected {allowed}, found {value!r}"
        case "string_pattern_mismatch":
            yield f"{name}: {_describe_setting(location, values)}, found {value!r}"
        case "too_short" | "string_too_short":
            yield f"{name}: is empty; {_describe_setting(location, values)}"
        case "model_type" | "dict_type":
            yield f"{name}: expected settings (a block), found {_type_in_words(value)}"
        case _:
            message = field_error["msg"][0].lower() + field_error["msg"][1:]
            message = re.split(", (?:unable|got)", message.removeprefix("input should be ").removeprefix("a valid "))[0]
            expected, shown = _TYPE_NAMES.get(message, message), "nothing" if value is None else repr(value)
            is_percentage = re.fullmatch(r"\d+(\.\d+)? *%", str(value))
            instead = f"; write {float(str(value).rstrip(' %')) / 100:g}" if is_percentage else ""
            yield f"{name}: expected {expected}, found {shown}{instead}"


_TYPE_NAMES = {"integer": "whole number", "string": "text"}
_MAX_LISTED_NAMES = 12


def _suggest_setting(location: tuple[str | int, ...], values: PlainSettings) -> str:
    """Return a hint on what to write instead of an unknown setting."""
    name, block = str(location[-1]), location[:-1]
    if block[:2] != ("data", "train") and (answer := recipe_rules.replacement_hint(name)) is not None:
        return answer
    kinds = [kind for kind, member in _METHOD_BLOCKS.items() if name in member.model_fields]
    if kinds and block[:1] in (("method",), ("methods",)):
        return f"the setting belongs to kind: {' or '.join(kinds)}"
    elsewhere = [other for other in Recipe.model_fields if name in _fields_at((other,)) and (other,) != block]
    if elsewhere:
        return f"did you mean '{elsewhere[0]}.{name}'?"
    if name in recipe_rules.training_arguments():
        return f"write train.extra.{name}"
    names = sorted(_fields_at(block, values))
    if hint := did_you_mean(name, names):
        return hint
    if near := near_names(name.lower(), recipe_rules.replacement_hints(), cutoff=0.85):
        return recipe_rules.replacement_hints()[near[0]]
    return (
        f"expected one of {', '.join(names)}"
        if len(names) <= _MAX_LISTED_NAMES
        else "docs/reference/recipe.md lists all settings"
    )


def nearest_setting(name: str, cutoff: float) -> str | None:
    """Return the setting that replaces this name of another tool, or whose last name is at least as similar as
    `cutoff`, or None."""
    name = name.rpartition(".")[2].replace("-", "_").lower()
    if (hint := recipe_rules.replacement_hint(name)) is not None:
        replacing = re.search(r"\w+\.\w+", hint)
        return replacing and replacing[0]
    dotted = {other: f"train.extra.{other}" for other in recipe_rules.training_arguments()}
    dotted |= {block: block for block in Recipe.model_fields}
    for block in reversed(Recipe.model_fields):  # of equal names, the first block's counts
        dotted |= {field: f"{block}.{field}" for field in _fields_at((block,))}
    return next((dotted[near] for near in near_names(name, dotted, most=1, cutoff=cutoff)), None)


def _expected_and_found(expected: str, value: object) -> str:
    hint = did_you_mean(str(value), re.findall(r"'([^']+)'", expected))
    return f"expected {expected}, found {value!r}" + (f"; {hint}" if hint else "")


# ---- places in the file ----------------------------------------------------------------------------------------


def _blocks_in_type(annotation: object) -> list[type[Block]]:
    if isinstance(annotation, type) and issubclass(annotation, Block):
        return [annotation]
    return [block for inner in get_args(annotation) for block in _blocks_in_type(inner)]


_METHOD_BLOCKS: dict[str, type[Block]] = {
    get_args(method.model_fields["kind"].annotation)[0]: method for method in _blocks_in_type(ComparedMethod)
}


def _location_in_file(field_error: FieldError) -> tuple[Any, ...]:
    """Return the keys that lead to an error's setting, without the names that pydantic inserts."""
    location = field_error["loc"]
    kind_at = {"method": 1, "methods": 2}.get(str(location[0]) if location else "")
    parts = [part for number, part in enumerate(location) if not (number == kind_at and part in _METHOD_BLOCKS)]
    user_name_at = len(parts) - 1 if field_error["type"] == "extra_forbidden" else None  # kept whatever it looks like
    names = [part for number, part in enumerate(parts) if number == user_name_at or re.fullmatch(r"\w+", str(part))]
    return tuple(names[:-1] if len(names) > 1 and names[-1] in ("str", "tuple", "int", "float") else names)


def _fields_at(location: Sequence[str | int], values: Any = None) -> dict[str, FieldInfo]:
    """Return the fields, by name, of the block at a location in the recipe's `values`. For a method of unknown kind,
    return the fields of all kinds."""
    blocks: list[type[Block]] = [Recipe]
    for part in location:
        if isinstance(part, str):
            fields = [block.model_fields[part] for block in blocks if part in block.model_fields]
            blocks = [inner for field in fields for inner in _blocks_in_type(field.annotation)]
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            values = None
    if isinstance(values, dict) and "hub" in values:
        blocks = [HubDataset]
    kind = str(values.get("kind", "full") if isinstance(values, dict) else values)
    if location and location[0] in ("method", "methods") and kind in _METHOD_BLOCKS:
        blocks = [_METHOD_BLOCKS[kind]]
    return {name: field for block in blocks for name, field in block.model_fields.items()}


def _describe_setting(location: tuple[str | int, ...], values: Any) -> str:
    """Return `expected: ` and the first sentence of a setting's documentation, or that the setting is required.
    `values` is the recipe."""
    field = _fields_at(location[:-1], values).get(str(location[-1]))
    text = (field.description or "") if field else ""
    return "expected: " + " ".join(text.split()).split(". ")[0].rstrip(".") if text else "this setting is required"


def _type_in_words(value: object) -> str:
    names = {dict: "settings", list: "a list", str: "text", type(None): "nothing", bool: "true/false"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _setting_lines(node: Any, before: str = "") -> Iterable[tuple[str, int]]:
    """Yield each dotted key below a YAML node with its 1-based line number."""
    inner = node.value if isinstance(node, (yaml.MappingNode, yaml.SequenceNode)) else []
    for number, entry in enumerate(inner):
        key, value = entry if isinstance(entry, tuple) else (None, entry)
        name = f"{before}{number if key is None else key.value}"
        yield name, (key or value).start_mark.line + 1
        yield from _setting_lines(value, f"{name}.")


def _substitute_variables(value: Any, name: str, problems: list[str]) -> Any:
    """Replace `${NAME}` in all texts with environment variables. Append a message to `problems` for each unset
    variable."""
    if isinstance(value, dict):
        return {key: _substitute_variables(inner, f"{name}.{key}", problems) for key, inner in value.items()}
    if isinstance(value, list):
        return [_substitute_variables(inner, f"{name}.{number}", problems) for number, inner in enumerate(value)]
    if not isinstance(value, str):
        return value
    missing = [variable for variable in _VARIABLE_PATTERN.findall(value) if variable not in os.environ]
    problems += [f"{name[1:]}: environment variable {variable} is not set" for variable in missing]
    return _VARIABLE_PATTERN.sub(lambda match: os.environ.get(match[1], match[0]), value)


_SHORT_FORMS = {"model": "name", "method": "kind"}


def _apply_override(values: PlainSettings, override: str) -> str:
    """Apply one `block.name=value` to `values` and return its dotted name. Raise `ValueError` if the override is
    invalid."""
    name, separator, text = (part.strip() for part in override.partition("="))
    *blocks, last = name.split(".")
    if not separator or not all((*blocks, last)):
        raise ValueError("expected block.name=value, for example train.num_train_epochs=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the value is not valid YAML: {getattr(error, 'problem', error)}") from None
    block_values = values
    for block in blocks:
        inner = block_values.get(block)
        if isinstance(inner, list):
            raise ValueError(f"{block} is a list; set the whole list, such as --set '{block}=[...]'")
        if isinstance(inner, str) and block in _SHORT_FORMS:
            inner = {_SHORT_FORMS[block]: inner}
        block_values[block] = dict(inner) if isinstance(inner, dict) else {}
        block_values = block_values[block]
    block_values[last] = value
    return name
