from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from fulltune.errors import RecipeError
from fulltune.text import did_you_mean, first_few

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def freeze_parameters(model: PreTrainedModel, patterns: Sequence[str], label: str) -> None:
    """Freeze the parameters whose names match a pattern. Raise `RecipeError` if a pattern matches none of them, or if
    nothing would be left to train."""
    parameters = dict(model.named_parameters(remove_duplicate=False))  # tied weights have several names
    problems = []
    for pattern in patterns:
        names = [name for name in parameters if matches(pattern, name)]
        for name in names:
            parameters[name].requires_grad_(False)
        if not names:
            modules = [name for name, _ in model.named_modules() if name and not name.split(".")[-1].isdigit()]
            near = did_you_mean(pattern, [*(name.split(".")[-1] for name in modules), *modules])
            where = near or f"its modules are {first_few(sorted(modules, key=lambda name: name.count('.')), 8)}"
            problems.append(f"freeze: '{pattern}' matches no parameter of {type(model).__name__}; {where}")
    if not problems and not any(parameter.requires_grad for parameter in parameters.values()):
        problems = [f"freeze: all parameters of {type(model).__name__} match, so nothing is left to train; list fewer"]
    if problems:
        raise RecipeError([f"method {label}: {problem}" for problem in problems])


def matches(pattern: str, name: str) -> bool:
    """Return whether successive parts of a parameter's dotted name match all parts of a pattern, such as `layer.[0-3]`
    for `bert.encoder.layer.2.output.dense.bias`."""
    wanted, parts = pattern.split("."), name.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(map(fnmatchcase, parts[start:], wanted)) for start in starts)
