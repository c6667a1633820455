"""A recipe's relative paths, made absolute."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from fulltune.errors import RecipeError
from fulltune.recipe.fields import Recipe
from fulltune.recipe.preserve import AUTO
from fulltune.recipe.training import ENGINE_SETTINGS, NVME, NVME_FOLDER

_PATHS = {"data": ("eval", "test", "patch", "chat_template", "contamination"), "preserve": ("probe", "replay")}
"""Settings of blocks that are one path each."""


def is_address(path: str) -> bool:
    """`https://...`, `s3://...`: nothing that a file's path begins with."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


# The functions of pathlib raise where a name is no user's (`~$draft.csv`), links go in a circle or a name is too long:
# of these the readers say more.
def _expanded(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111


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
                f"{setting}: '{path}' is an address, expected a path; nothing is downloaded here: download it, and "
                "give the file's path"
            )
        else:
            whole = os.path.realpath(base / _expanded(path))
            if (shown := whole.encode("utf-8", "backslashreplace").decode()) == whole:
                return whole
            problems.append(f"{setting}: {shown} is not UTF-8, expected a path that is; rename the file or folder")
        return path

    update: dict[str, Any] = {
        "train": tuple(
            absolute(one, "data.train")
            if isinstance(one, str)
            else one.model_copy(update={"path": absolute(one.path, "data.train")})
            for one in recipe.data.entries
        )
    }
    blocks: dict[str, dict[str, Any]] = {"data": update, "preserve": {}}
    for block, names in _PATHS.items():
        given = {name: getattr(getattr(recipe, block), name) for name in names}
        blocks[block] |= {
            name: absolute(path, f"{block}.{name}")
            for name, path in given.items()
            if path is not None and (block, path) != ("preserve", AUTO)
        }
    train = recipe.train
    if isinstance(file := train.engine_settings, str):
        train = train.with_engine_settings(absolute(file, ENGINE_SETTINGS))
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
    changed = {block: getattr(recipe, block).model_copy(update=paths) for block, paths in blocks.items()}
    return recipe.model_copy(update={**changed, "model": model, "train": train, "output": output})
