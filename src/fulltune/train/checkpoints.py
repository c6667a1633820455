"""Checkpoints that can be trusted: checksums are written last, and only a checkpoint that matches them counts."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fulltune import methods
from fulltune.errors import SetupError
from fulltune.files import SEAL, flaw, write_json
from fulltune.methods.folder import load_trained
from fulltune.models import sharding
from fulltune.train.request import number_in

GUARD = "guard.json"
"""What the guard of single steps and the parts of a training keep."""
STATE = "trainer_state.json"
"""transformers' own."""
WEIGHTS = "model.safetensors"
_VALUES_SEEN = 64


def newest_sound(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a line for each newer one that was passed over."""
    passed_over: list[str] = []
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=number_in, reverse=True):
        problem = flaw(checkpoint)
        if problem is None:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint.name}: {problem}; going back to the one before")
    return None, passed_over


def weights_digest(model: Any) -> str:
    """Tells a loaded model's pretrained weights from others, by some values of each: not those of a new head."""
    digest = hashlib.sha256()
    for name, values in model.base_model.named_parameters():
        flat = sharding.whole(values.detach()).reshape(-1)
        some = flat[:: max(1, len(flat) // _VALUES_SEEN)][:_VALUES_SEEN]
        digest.update(name.encode() + some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_guard_state(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Write what the guard and the parts of a training keep: plain values, and arrays in files of their own."""
    arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    for name, values in arrays.items():
        np.save(checkpoint / f"{name}.npy", values)
    write_json(checkpoint / GUARD, {name: value for name, value in state.items() if name not in arrays})


def guard_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_guard_state` wrote."""
    state: dict[str, Any] = json.loads((checkpoint / GUARD).read_text(encoding="utf-8"))
    return state | {file.stem: np.load(file, allow_pickle=False) for file in checkpoint.glob("*.npy")}


def newest_healthy(folder: Path, before: int) -> Path | None:
    """The newest whole checkpoint of an earlier step, saved when none of the steps just before it was skipped."""
    newest = sorted(folder.glob("checkpoint-*"), key=number_in, reverse=True)
    whole = (one for one in newest if number_in(one) < before and flaw(one) is None)
    return next((one for one in whole if not guard_state(one).get("skipped")), None)


def last_saved(folder: Path) -> int:
    """The step of the newest checkpoint that was finished; 0: there is none."""
    return max((number_in(one) for one in folder.glob("checkpoint-*") if (one / SEAL).exists()), default=0)


def keep_few(folder: Path, limit: int, best_step: int | None) -> None:
    """Delete all but the newest `limit` whole checkpoints, the best one, and what was the best one when those were
    saved, to which a run that goes back returns."""
    found = sorted((path for path in folder.glob("checkpoint-*") if (path / SEAL).exists()), key=number_in)
    states = [json.loads((path / STATE).read_text(encoding="utf-8")) for path in found[-limit:]]
    best_steps = {best_step, *(state["best_global_step"] for state in states)}
    for checkpoint in found[:-limit]:
        if number_in(checkpoint) not in best_steps:
            shutil.rmtree(checkpoint)


def drop_unfinished(folder: Path) -> None:
    """Delete checkpoints that were never sealed."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / SEAL).exists():
            shutil.rmtree(checkpoint, ignore_errors=True)


def drop_after(folder: Path, step: int) -> None:
    """Delete checkpoints beyond a step: those that a resumed run will write again."""
    for checkpoint in folder.glob("checkpoint-*"):
        if number_in(checkpoint) > step:
            shutil.rmtree(checkpoint)


def save_trained(model: Any, checkpoint: Path) -> None:
    """Write what is trained, under the model's own names."""
    from safetensors.torch import save_file

    checkpoint.mkdir(parents=True, exist_ok=True)
    tensors = {name: one.detach().cpu().contiguous() for name, one in methods.trained(model).items()}
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})


def load_weights(model: Any, checkpoint: Path, trained_only: bool = False) -> None:
    """Put a checkpoint's weights into the model by `from_pretrained`, which knows the names that transformers 5.24
    saves some tensors under; with `trained_only` those that `save_trained` wrote."""
    if trained_only:
        from safetensors.torch import load_file

        load_trained(model, load_file(checkpoint / WEIGHTS), checkpoint)
        return
    found = loaded(model, checkpoint, model.dtype)
    sharding.free(model)
    model.load_state_dict(found.state_dict())


def loaded(model: Any, checkpoint: Path, dtype: Any) -> Any:
    """A checkpoint's model, sharded as this one is; SetupError when its tensors are not those of the model."""
    import torch

    keywords = {"config": model.config, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    if sharding.is_shared(model):
        keywords["distributed_config"] = model.config.distributed_config
    with torch.random.fork_rng(devices=[]):
        found, info = type(model).from_pretrained(checkpoint, **keywords)
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if wrong:
        raise SetupError(f"{checkpoint}: does not hold the model's tensors: {wrong[0]} ({len(wrong)} such tensors)")
    return found
