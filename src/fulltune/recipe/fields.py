"""The recipe: its blocks with every setting a user can give, meaning, default and bound on each field; its paths."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from fulltune.errors import RecipeError
from fulltune.recipe.data import DataBlock
from fulltune.recipe.methods import RIVALS, VARIANT, ComparedMethod, FullMethod, Method, MethodKind
from fulltune.recipe.model import (
    AUTO,
    NAME,
    Block,
    CompareBlock,
    EvaluateBlock,
    ModelBlock,
    PreserveBlock,
    refuse,
)
from fulltune.recipe.tasks import TaskName
from fulltune.recipe.training import ENGINE_SETTINGS, TrainBlock

_OTHERS = tuple(kind for kind in RIVALS if kind != VARIANT)


class Recipe(Block):
    """A whole run: model, task, data, method, training, evaluation, output."""

    model: ModelBlock
    """The pretrained model; a plain string is short for `{name: ...}`."""
    task: TaskName
    """What is learned."""
    data: DataBlock
    method: Method = FullMethod(kind="full")
    """How the parameters are trained; a plain `lora` is short for `{kind: lora}`, and without `kind` it is full."""
    methods: tuple[ComparedMethod, ...] = ()
    """What `fulltune compare` compares, in place of `method`: each as there, or its kind alone."""
    train: TrainBlock = TrainBlock()
    preserve: PreserveBlock = PreserveBlock()
    evaluate: EvaluateBlock = EvaluateBlock()
    compare: CompareBlock = CompareBlock()
    output: str = "runs"
    """Folder in which each run gets a folder of its own; relative to the recipe's folder."""
    name: str | None = Field(default=None, pattern=NAME)
    """Beginning of the run folder's name; left out, the recipe file's name."""

    @model_validator(mode="before")
    @classmethod
    def _expand_short_forms(cls, values: Any) -> Any:
        """`model: NAME` is short for `model: {name: NAME}`, `lora` for `{kind: lora}`; without `kind` it is full."""
        if not isinstance(values, dict):
            return values
        expanded = dict(values)
        if isinstance(values.get("model"), str):
            expanded["model"] = {"name": values["model"]}
        if isinstance(values.get("method"), str):
            expanded["method"] = {"kind": values["method"]}
        elif isinstance(values.get("method"), dict):
            expanded["method"] = {"kind": "full", **values["method"]}
        if isinstance(values.get("methods"), (list, tuple)):
            expanded["methods"] = [{"kind": one} if isinstance(one, str) else one for one in values["methods"]]
        return expanded

    @model_validator(mode="after")
    def _methods_must_make_a_comparison(self) -> Recipe:
        if not self.methods:
            return self
        kinds, names = [self.compared_kind(one) for one in self.methods], [one.label for one in self.methods]
        pairs = {
            "methods: a comparison has 'full', because the others are compared with it; add it": "full" not in kinds,
            "methods: names nothing to compare full fine-tuning with ('base' and 'head' are only shown for "
            f"orientation); add one of {', '.join(_OTHERS)}, or another full with settings of its own": (
                "full" in kinds and not set(kinds) & set(RIVALS)
            ),
            **{
                f"methods: two are called '{name}'; give one of them another 'name'": names.count(name) > 1
                for name in sorted(names)
            },
        }
        refuse(pairs)
        return self

    def fingerprint(self) -> str:
        """Hash of all settings that shape a run: two recipes with the same one continue each other's run."""
        return hashlib.sha256(json.dumps(self.shaping(), sort_keys=True).encode()).hexdigest()[:16]

    def shaping(self) -> dict[str, Any]:
        """All settings that shape a run."""
        settings = self.model_dump(mode="json", exclude={"output", "name"})
        # Of the machine, not of the result; but several runs are compared in memory and time as well.
        placing = ("num_processes", "num_machines", "placement", "offload", "oversubscribe")
        several = self.methods or self.is_searched
        for name in ("notice", "hang_timeout", *(() if several else placing)):
            del settings["train"][name]
        settings["compare"]["budget"] = None  # more time goes on with the same one
        return settings

    def compared_kind(self, method: Any) -> MethodKind:
        """What a comparison takes a method for: its kind; of several `full` all but the first are variants."""
        first = next((one for one in self.methods if one.kind == "full"), method)
        kind: MethodKind = method.kind
        return VARIANT if kind == "full" and method != first else kind

    def with_method(self, method: Any) -> Recipe:
        """The recipe of a run with one of several methods, and with what that changes of the block `train`."""
        changes = {"method": method, "methods": (), "train": self.train}
        if own := getattr(method, "train", {}):
            changes["train"] = TrainBlock.model_validate({**self.train.model_dump(exclude_unset=True), **own})
        return self.model_copy(update=changes)

    @property
    def is_searched(self) -> bool:
        """Several runs find the learning rate of this one."""
        return not self.methods and self.method.is_searched

    @property
    def kept_out(self) -> dict[str, str]:
        """The settings that name texts that must not be trained on, and their paths."""
        names = {"data.contamination": self.data.contamination, "preserve.probe": self.preserve.probe}
        return {setting: path for setting, path in names.items() if path is not None}

    @property
    def generic_first(self) -> bool:
        """A step begins with generic text."""
        return self.preserve.budget is not None and self.preserve.replay is not None


def with_placement(recipe: Recipe, placement: Any) -> Recipe:
    """The recipe with the placement that its plan has chosen; a user's own file of an engine stays in charge."""
    if recipe.train.placement != "auto" or recipe.train.engine_settings is not None:
        return recipe
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"placement": placement})})


# ---- paths -----------------------------------------------------------------------------------------------------

_PATHS = {"data": ("eval", "test", "patch", "chat_template", "contamination"), "preserve": ("probe", "replay")}
"""Settings of blocks that are one path each."""


def is_address(path: str) -> bool:
    """`https://...`, `s3://...`: nothing that a file's path begins with."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


# The functions of pathlib raise where a name is no user's (`~$draft.csv`), links go in a circle or a name is too long:
# of these the readers say more.
def _expanded(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111  # see above


def named_paths(recipe: Recipe) -> list[str]:
    """The files and folders that a resolved recipe names, each once; a model of the Hub is none."""
    named: list[Any] = [one if isinstance(one, str) else one.path for one in recipe.data.entries]
    named += [getattr(getattr(recipe, block), name) for block, names in _PATHS.items() for name in names]
    named += [recipe.train.engine_settings, recipe.model.name]
    return [one for one in dict.fromkeys(map(str, named)) if Path(one).is_absolute()]


def resolve_paths(recipe: Recipe, base: Path) -> Recipe:
    """Make the recipe's relative paths absolute; a Hub id or a `package:` name stays as it is. Raises `RecipeError` for
    each path that no file can have."""
    problems: list[str] = []

    def absolute(path: str, setting: str) -> str:
        if path.startswith("package:"):
            return path
        if "\0" in path:
            problems.append(f"{setting}: {path!r} holds a NUL character, expected a path; write one without it")
        elif is_address(path):
            problems.append(
                f"{setting}: '{path}' is an address, expected a path; nothing is downloaded here: download it (from "
                "the Hub: 'hf download NAME --repo-type dataset --local-dir FOLDER'), and give the file's path"
            )
        else:
            whole = os.path.realpath(base / _expanded(path))
            if (shown := whole.encode("utf-8", "backslashreplace").decode()) == whole:
                return whole
            problems.append(f"{setting}: {shown} is not UTF-8, expected a path that is; rename the file or folder")
        return path

    paths: dict[str, dict[str, Any]] = {"data": {}, "preserve": {}}
    for block, names in _PATHS.items():
        for name in names:
            path = getattr(getattr(recipe, block), name)
            if path is not None and (block, path) != ("preserve", AUTO):
                paths[block][name] = absolute(path, f"{block}.{name}")
    paths["data"]["train"] = tuple(
        absolute(one, "data.train")
        if isinstance(one, str)
        else one.model_copy(update={"path": absolute(one.path, "data.train")})
        for one in recipe.data.entries
    )
    name = recipe.model.name
    is_here = os.path.exists(base / _expanded(name))  # noqa: PTH110  # as `_expanded`
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or is_here:
        paths["model"] = {"name": absolute(name, "model.name")}
    changed: dict[str, Any] = {block: getattr(recipe, block).model_copy(update=new) for block, new in paths.items()}
    file = recipe.train.engine_settings
    if isinstance(file, str):
        changed["train"] = recipe.train.with_engine_settings(absolute(file, ENGINE_SETTINGS))
    changed["output"] = absolute(recipe.output, "output")
    if problems:
        raise RecipeError(problems)
    return recipe.model_copy(update=changed)
