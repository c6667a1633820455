from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from fulltune.errors import RecipeError
from fulltune.recipe.address import SQLITE, address_problem, is_address, scheme_of
from fulltune.recipe.data import DataBlock
from fulltune.recipe.functions import is_own
from fulltune.recipe.methods import RIVALS, VARIANT, ComparedMethod, FullMethod, Method, MethodKind
from fulltune.recipe.model import (
    AUTO,
    NAME,
    Block,
    CompareBlock,
    EvaluateBlock,
    ModelBlock,
    PairsReading,
    PlainSettings,
    PreserveBlock,
    raise_for_problems,
)
from fulltune.recipe.tasks import TEXT_CLASSIFICATION, TEXT_PAIRS, TaskName
from fulltune.recipe.training import ENGINE_SETTINGS, TrainBlock

_DECIDING_KINDS = tuple(kind for kind in RIVALS if kind != VARIANT)


class Recipe(Block):
    """All settings of a run."""

    model: ModelBlock
    """The pretrained model. A plain name is short for `{name: ...}`."""
    task: TaskName
    """The task that the model learns."""
    data: DataBlock
    method: Method = FullMethod(kind="full")
    """How the model is trained. `lora` is short for `{kind: lora}`, and the default kind is `full`."""
    methods: tuple[ComparedMethod, ...] = ()
    """Methods for `fulltune compare`, instead of `method`. Each is a block like `method`, or just its kind."""
    train: TrainBlock = TrainBlock()
    preserve: PreserveBlock = PreserveBlock()
    evaluate: EvaluateBlock = EvaluateBlock()
    compare: CompareBlock = CompareBlock()
    functions: str = "."
    """Folder of the Python modules with your own functions (`module:function`), relative to the recipe's folder.
    Installed modules are found as well."""
    output: str = "runs"
    """Folder for run folders, relative to the recipe's folder."""
    name: str | None = Field(default=None, pattern=NAME)
    """Beginning of the run folder's name. Default: the recipe's file name."""

    @model_validator(mode="before")
    @classmethod
    def _expand_short_forms(cls, values: Any) -> Any:
        """Return the raw recipe with `model: NAME` and kinds of methods expanded to blocks. The default kind of
        `method` is `full`. `model.pairs: apart` changes the task."""
        if not isinstance(values, dict):
            return values
        expanded = dict(values)
        if isinstance(values.get("model"), str):
            expanded["model"] = {"name": values["model"]}
        if isinstance(model := expanded.get("model"), dict) and values.get("task") in (TEXT_CLASSIFICATION, TEXT_PAIRS):
            expanded["model"] = model = {"pairs": "apart", **model} if values["task"] == TEXT_PAIRS else model
            expanded["task"] = TEXT_PAIRS if model.get("pairs") == "apart" else values["task"]
        if isinstance(values.get("method"), str):
            expanded["method"] = {"kind": values["method"]}
        elif isinstance(values.get("method"), dict):
            expanded["method"] = {"kind": "full", **values["method"]}
        if isinstance(values.get("methods"), (list, tuple)):
            expanded["methods"] = [{"kind": one} if isinstance(one, str) else one for one in values["methods"]]
        return expanded

    @model_validator(mode="after")
    def _refuse_incomparable_methods(self) -> Recipe:
        """Raise `ValueError` if `methods` cannot be compared, for example without `full`."""
        if not self.methods:
            return self
        kinds, names = [self.compared_kind(one) for one in self.methods], [one.label for one in self.methods]
        pairs = {
            f"methods: 'full'{' without freeze' * (VARIANT in kinds)} is missing; add it, because the other methods "
            "are compared with it": "full" not in kinds,
            "methods: nothing to compare full fine-tuning with ('base' and 'head' are only shown for reference); "
            f"add one of {', '.join(_DECIDING_KINDS)}, or another full with other settings": (
                "full" in kinds and not set(kinds) & set(RIVALS)
            ),
            **{
                f"methods: two methods are called '{name}'; give one of them a different 'name'": names.count(name) > 1
                for name in sorted(names)
            },
        }
        raise_for_problems(pairs)
        return self

    def fingerprint(self) -> str:
        """Return a hash of `result_settings`. A recipe with the same hash resumes an existing run."""
        return hashlib.sha256(json.dumps(self.result_settings(), sort_keys=True).encode()).hexdigest()[:16]

    def result_settings(self) -> PlainSettings:
        """Return the settings that affect the result, as JSON values. Output names are omitted, and so is the placement
        in single runs."""
        settings = self.model_dump(mode="json", exclude={"output", "name", "functions"})
        if settings["task"] == TEXT_PAIRS:  # follows from `model.pairs`, whose `auto` is chosen in the run folder
            settings["task"] = TEXT_CLASSIFICATION
        # These depend on the machine and do not change the result, but a comparison also measures memory and time.
        placing = ("num_processes", "num_machines", "placement", "offload", "oversubscribe")
        compares_runs = self.methods or self.is_searched
        for name in ("notice", "hang_timeout", *(() if compares_runs else placing)):
            del settings["train"][name]
        stream = settings["train"].pop("stream")
        if stream and stream["gradients"] != "auto":
            settings["train"]["stream"] = stream["gradients"]  # the others change memory and disk alone
        settings["compare"]["budget"] = None  # more time continues the same comparison
        return settings

    def read(self, pairs: PairsReading) -> Recipe:
        """Return the recipe of a run that reads the two texts of a row so."""
        return self.model_copy(update={"task": TEXT_PAIRS if pairs == "apart" else TEXT_CLASSIFICATION})

    def compared_kind(self, method: ComparedMethod) -> MethodKind:
        """Return a compared method's kind, or `variant` for every `full` in `methods` that is not the reference."""
        first = next((one for one in self.methods if one.trains_all), None if self.methods else method)
        kind: MethodKind = method.kind
        return VARIANT if kind == "full" and method != first else kind

    def with_method(self, method: ComparedMethod) -> Recipe:
        """Return the recipe of a single run with `method`, with the method's own `train` settings applied."""
        changes = {"method": method, "methods": (), "train": self.train}
        if train_changes := getattr(method, "train", {}):
            changes["train"] = TrainBlock.model_validate({**self.train.model_dump(exclude_unset=True), **train_changes})
        return self.model_copy(update=changes)

    @property
    def own_functions(self) -> dict[str, str]:
        """Map names of the user's functions, `module:function`, to the settings with these names."""
        named = {
            "evaluate.metric": [self.evaluate.metric],
            "evaluate.metrics": self.evaluate.metrics,
            "train.loss": [self.train.loss, *(self.with_method(one).train.loss for one in self.methods)],
            "data.preprocess": [self.data.preprocess],
        }
        return {name: setting for setting, names in named.items() for name in names if is_own(name)}

    @property
    def is_searched(self) -> bool:
        return not self.methods and self.method.is_searched

    @property
    def is_cross_validated(self) -> bool:
        """True if the recipe needs one run per fold."""
        return self.data.folds is not None and self.data.fold is None

    @property
    def excluded_text_paths(self) -> dict[str, str]:
        """Map settings, such as `data.contamination`, to paths of texts that must not be trained on."""
        names = {"data.contamination": self.data.contamination, "preserve.probe": self.preserve.probe}
        return {setting: path for setting, path in names.items() if path is not None}


def with_placement(recipe: Recipe, placement: str) -> Recipe:
    """Return the recipe with the plan's placement, or unchanged if the recipe sets a placement."""
    if recipe.train.placement != "auto" or recipe.train.engine_settings is not None:
        return recipe
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"placement": placement})})


# ---- paths -----------------------------------------------------------------------------------------------------

_PATH_SETTINGS = {"data": ("eval", "test", "patch", "chat_template", "contamination"), "preserve": ("probe", "replay")}


# pathlib raises for an unknown user (`~$draft.csv`), circular links and long names; the readers explain them better.
def _expand_user(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111  # see above


def local_paths(recipe: Recipe) -> list[str]:
    """List the absolute paths of a resolved recipe's files and folders. Hub models are omitted."""
    paths = [entry if isinstance(entry, str) else entry.path for entry in recipe.data.entries]
    paths += [str(getattr(getattr(recipe, block), name)) for block, names in _PATH_SETTINGS.items() for name in names]
    paths += [str(recipe.train.engine_settings), recipe.model.name]
    modules = {Path(recipe.functions, *name.partition(":")[0].split(".")) for name in recipe.own_functions}
    paths += sorted(str(file) for module in modules if (file := module.with_suffix(".py")).exists())
    return [path for path in dict.fromkeys(paths) if Path(path).is_absolute()]


def resolve_paths(recipe: Recipe, base: Path) -> Recipe:
    """Return the recipe with absolute paths. Relative paths start at `base`, while Hub ids and `package:` names stay
    unchanged. Raise `RecipeError` for invalid paths."""
    problems: list[str] = []

    def make_absolute(path: str, setting: str) -> str:
        """Return the absolute path. If the path is invalid, append a message to `problems` instead."""
        if path.startswith("package:"):
            return path
        if "\0" in path:
            problems.append(f"{setting}: expected a path without NUL characters, found {path!r}")
        elif is_address(path):
            readable = setting in ("data.train", "data.eval", "data.test")
            if problem := address_problem(path) if readable else f"expected a path, found the address '{path}'":
                problems.append(f"{setting}: {problem}")
            if scheme_of(path) == SQLITE and not path.startswith("sqlite:////"):
                file, mark, rest = path.partition(":///")[2].partition("?")
                return f"{path.partition(':///')[0]}:///{os.path.realpath(base / _expand_user(file))}{mark}{rest}"
        else:
            real_path = os.path.realpath(base / _expand_user(path))
            if (shown := real_path.encode("utf-8", "backslashreplace").decode()) == real_path:
                return real_path
            problems.append(f"{setting}: expected a path in UTF-8, found {shown}; rename the file or folder")
        return path

    paths: dict[str, PlainSettings] = {"data": {}, "preserve": {}}
    for block, names in _PATH_SETTINGS.items():
        for name in names:
            path = getattr(getattr(recipe, block), name)
            if path is not None and (block, path) != ("preserve", AUTO):
                paths[block][name] = make_absolute(path, f"{block}.{name}")
    paths["data"]["train"] = tuple(
        make_absolute(entry, "data.train")
        if isinstance(entry, str)
        else entry.model_copy(update={"path": make_absolute(entry.path, "data.train")})
        for entry in recipe.data.entries
    )
    name = recipe.model.name
    is_here = os.path.exists(base / _expand_user(name))  # noqa: PTH110  # as `_expand_user`
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or is_here:
        paths["model"] = {"name": make_absolute(name, "model.name")}
    if isinstance(recipe.model.new_tokens, str):
        try:
            lines = Path(make_absolute(recipe.model.new_tokens, "model.new_tokens")).read_text("utf-8").splitlines()
            paths.setdefault("model", {})["new_tokens"] = tuple(filter(None, lines))
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "not UTF-8"
            problems.append(
                f"model.new_tokens: {recipe.model.new_tokens}: cannot be read: {why}; write a list or a text file"
            )
    changed: PlainSettings = {block: getattr(recipe, block).model_copy(update=new) for block, new in paths.items()}
    file = recipe.train.engine_settings
    if isinstance(file, str):
        changed["train"] = recipe.train.with_engine_settings(make_absolute(file, ENGINE_SETTINGS))
    if (stream := recipe.train.stream) and stream.disk is not None:
        stream = stream.model_copy(update={"disk": make_absolute(stream.disk, "train.stream.disk")})
        changed["train"] = changed.get("train", recipe.train).model_copy(update={"stream": stream})
    changed |= {name: make_absolute(getattr(recipe, name), name) for name in ("output", "functions")}
    if problems:
        raise RecipeError(problems)
    return recipe.model_copy(update=changed)
