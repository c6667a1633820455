"""The probe of a run folder: fitted once, for all attempts of a run, all trials of a comparison and the baselines."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.files import replacing
from fulltune.models.checkpoint_head import put_together
from fulltune.models.sharding import free, like
from fulltune.probe.fit import fit
from fulltune.probe.linear import Linear
from fulltune.probe.looker import Looker
from fulltune.records.probe import Probe

FOLDER, RECORD = "probe", "probe.json"
HEAD, START, FROZEN = "head.safetensors", "start.safetensors", "frozen.safetensors"
SEED = 0
"""Of what the checkpoint lacks while rows are looked at: any trial of a comparison may be the one that fits."""


def fitted(
    folder: Path,
    look: Callable[[], Looker],
    rows: Any,
    eval_rows: Any,
    with_head: bool = True,
    together: bool = False,
) -> Probe:
    """The probe of a run folder; it is fitted when it is not there, while others wait for it.

    Args:
        folder: The run folder.
        look: Gives what looks at rows, when that is needed.
        rows: The prepared train rows.
        eval_rows: The eval rows, which choose strength and features.
        with_head: As for `fit`.
        together: Processes share out the weights of the model, so that all of them run it, and fit alike.
    """
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    if together:
        import torch.distributed as others

        is_first, missing = others.get_rank() == 0, [not (place / RECORD).exists()]
        others.broadcast_object_list(missing)  # the first one may be done before another has looked
        if missing[0]:
            _fit(place if is_first else None, look, rows, eval_rows, with_head)
        others.barrier()
        return Probe.load(place / RECORD)
    with (place / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / RECORD).exists():
            _fit(place, look, rows, eval_rows, with_head)
    return Probe.load(place / RECORD)


def _fit(place: Path | None, look: Callable[[], Looker], rows: Any, eval_rows: Any, with_head: bool) -> None:
    """Fit it and write it there; None: another process writes it."""
    started = time.monotonic()
    found = fit(look(), rows, eval_rows, with_head)
    if place is None:
        return
    _save(place / HEAD, found.head)
    _save(place / START, found.start)
    _save(place / FROZEN, {"weight": found.rival.weight, "bias": found.rival.bias} if found.rival else {})
    seconds = round(time.monotonic() - started, 3)
    found.probe.model_copy(update={"seconds": seconds}).save(place / RECORD)


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    with replacing(path) as part:
        save_file({name: np.ascontiguousarray(one) for name, one in arrays.items()}, part)


def put_head(model: Any, folder: Path, *, eased: bool = False) -> None:
    """Set the values of a loaded model's head to those of the run folder's probe; no method is applied yet.

    Args:
        model: As it was loaded.
        folder: The run folder.
        eased: For training to start with.
    """
    import torch
    from safetensors.torch import load_file

    values = load_file(folder / FOLDER / HEAD)
    if eased:
        values |= load_file(folder / FOLDER / START)
    free(model)
    parameters = {name: model.get_parameter(name) for name in values}
    with torch.no_grad(), put_together(list(parameters.values())):
        for name, parameter in parameters.items():
            parameter.copy_(like(values[name], parameter))


def rival_of(folder: Path) -> Linear:
    """The classifier behind a run folder's `frozen`."""
    from safetensors.numpy import load_file

    found = load_file(folder / FOLDER / FROZEN)
    return Linear(found["weight"], found["bias"])
