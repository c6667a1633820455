"""A recipe's relative paths, made absolute."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from fulltune.errors import RecipeError
from fulltune.recipe.fields import Recipe
from fulltune.recipe.preserve import AUTO
from fulltune.recipe.training import NVME, NVME_FOLDER


def is_address(path: str) -> bool:
    """`https://...`, `s3://...`: nothing that a file's path begins with."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


# The functions of pathlib raise where a name is no user's (`~$draft.csv`), links go in a circle or a name is too long:
# of these the readers say more.
def _expanded(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111


def named_paths(recipe: Recipe) -> list[str]:
    """The files and folders that a resolved recipe names, each once; a model of the Hub is none."""
    data, preserve = recipe.data, recipe.preserve
    named: list[Any] = [one if isinstance(one, str) else one.path for one in data.entries]
    named += [data.eval, data.test, data.patch, data.chat_template, data.contamination]
    named += [preserve.probe, preserve.replay, recipe.train.extra.get("deepspeed"), recipe.model.name]
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
                f"{setting}: '{path}' is an address, expected a path; nothing is downloaded here: download it, and "
                "give the file's path"
            )
        else:
            whole = os.path.realpath(base / _expanded(path))
            if (shown := whole.encode("utf-8", "backslashreplace").decode()) == whole:
                return whole
            problems.append(f"{setting}: {shown} is not UTF-8, expected a path that is; rename the file or folder")
        return path

    data = recipe.data
    update: dict[str, Any] = {
        "train": tuple(
            absolute(one, "data.train")
            if isinstance(one, str)
            else one.model_copy(update={"path": absolute(one.path, "data.train")})
            for one in data.entries
        )
    }
    for key in ("eval", "test", "patch", "chat_template", "contamination"):
        if (value := getattr(data, key)) is not None:
            update[key] = absolute(value, f"data.{key}")
    preserve = recipe.preserve
    for key in ("probe", "replay"):
        if (value := getattr(preserve, key)) not in (None, AUTO):
            preserve = preserve.model_copy(update={key: absolute(value, f"preserve.{key}")})
    train = recipe.train
    if isinstance(file := train.extra.get("deepspeed"), str):
        train = train.model_copy(
            update={"extra": {**train.extra, "deepspeed": absolute(file, "train.extra.deepspeed")}}
        )
    if (folder := train.offload.removeprefix(NVME)) != train.offload and folder != NVME_FOLDER:
        train = train.model_copy(update={"offload": NVME + absolute(folder, "train.offload")})
    name = recipe.model.name
    local = os.path.exists(base / _expanded(name))  # noqa: PTH110  # as `_expanded`
    looks_like_path = name.startswith((".", "/", "~")) or name.endswith(".gguf") or local
    model = recipe.model
    if looks_like_path and not name.startswith("package:"):
        model = model.model_copy(update={"name": absolute(name, "model.name")})
    output = absolute(recipe.output, "output")
    if problems:
        raise RecipeError(problems)
    return recipe.model_copy(
        update={
            "data": data.model_copy(update=update),
            "model": model,
            "train": train,
            "preserve": preserve,
            "output": output,
        }
    )
