from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune import methods
from fulltune.errors import SetupError
from fulltune.files import SEAL, find_damage, write_json
from fulltune.methods.folder import copy_into_trained
from fulltune.models import sharding
from fulltune.train.request import number_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GUARD = "guard.json"
STATE = "trainer_state.json"
WEIGHTS = "model.safetensors"
_DIGEST_VALUES = 64


def newest_undamaged_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that matches its checksums (or None), and a warning for each newer, damaged
    checkpoint."""
    damaged: list[str] = []
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=number_in, reverse=True):
        problem = find_damage(checkpoint)
        if problem is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint.name}: {problem}; trying the previous checkpoint")
    return None, damaged


def weights_digest(model: PreTrainedModel) -> str:
    """Return a hash of sampled values from each weight tensor of the model's body."""
    digest = hashlib.sha256()
    for name, values in model.base_model.named_parameters():
        flat = sharding.full_tensor(values.detach()).reshape(-1)
        sample = flat[:: max(1, len(flat) // _DIGEST_VALUES)][:_DIGEST_VALUES]
        digest.update(name.encode() + sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_guard_state(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Save `FullTrainer.guard_state` in a checkpoint, each array in its own file."""
    arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    for name, values in arrays.items():
        np.save(checkpoint / f"{name}.npy", values)
    write_json(checkpoint / GUARD, {name: value for name, value in state.items() if name not in arrays})


def load_guard_state(checkpoint: Path, required: Iterable[str] = ()) -> dict[str, Any]:
    """Return the guard state saved in a checkpoint, by name; raise `SetupError` if a `required` name is missing."""
    state: dict[str, Any] = json.loads((checkpoint / GUARD).read_text(encoding="utf-8"))
    state |= {file.stem: np.load(file, allow_pickle=False) for file in checkpoint.glob("*.npy")}
    if missing := sorted(set(required) - state.keys()):
        raise SetupError(
            f"{checkpoint / GUARD}: found no {', '.join(missing)}, because another version of fulltune wrote it; "
            "start a new run (--fresh)"
        )
    return state


def newest_healthy_checkpoint(folder: Path, before: int) -> Path | None:
    """Return the newest undamaged checkpoint older than step `before` and without recently skipped steps, or None."""
    newest_first = sorted(folder.glob("checkpoint-*"), key=number_in, reverse=True)
    sound = (path for path in newest_first if number_in(path) < before and find_damage(path) is None)
    return next((path for path in sound if not load_guard_state(path).get("skipped")), None)


def last_saved_step(folder: Path) -> int:
    """Return the newest complete checkpoint's step, or 0 if there is none."""
    return max((number_in(path) for path in folder.glob("checkpoint-*") if (path / SEAL).exists()), default=0)


def delete_old_checkpoints(folder: Path, limit: int, best_step: int | None) -> None:
    """Delete complete checkpoints except the newest `limit`, the best, and each that was best when one of the newest
    was saved."""
    complete = sorted((path for path in folder.glob("checkpoint-*") if (path / SEAL).exists()), key=number_in)
    states = [json.loads((path / STATE).read_text(encoding="utf-8")) for path in complete[-limit:]]
    best_steps = {best_step, *(state["best_global_step"] for state in states)}
    for checkpoint in complete[:-limit]:
        if number_in(checkpoint) not in best_steps:
            shutil.rmtree(checkpoint)


def delete_unfinished_checkpoints(folder: Path) -> None:
    """Delete checkpoints without checksums."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / SEAL).exists():
            shutil.rmtree(checkpoint, ignore_errors=True)


def delete_checkpoints_after(folder: Path, step: int) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        if number_in(checkpoint) > step:
            shutil.rmtree(checkpoint)


def delete_state(folder: Path) -> None:
    """Delete a streamed run's training state, which may be unfinished; raise `SetupError` if a process is using it."""
    file = folder / "state.bin"
    try:
        with file.open("rb+") as locked:
            fcntl.lockf(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / "journal.json").unlink(missing_ok=True)  # first: it says that the state is complete
    except FileNotFoundError:
        pass
    except OSError as error:
        why = f"{file}: cannot be deleted ({error.strerror})"
        raise SetupError(f"{why}; end the run that uses it, then run the same command again") from None
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # another trial's state, or no folder at all
        folder.parent.rmdir()


def save_trained_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    from safetensors.torch import save_file

    checkpoint.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in methods.trainable_parameters(model).items()}
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})


def load_weights(model: PreTrainedModel, checkpoint: Path, trained_only: bool = False) -> None:
    """Load a checkpoint's weights into the model with `from_pretrained`, which renames some tensors. With
    `trained_only`, load what `save_trained_weights` wrote. Raises `SetupError` if tensor names or shapes differ."""
    if trained_only:
        from safetensors.torch import load_file

        copy_into_trained(model, load_file(checkpoint / WEIGHTS), checkpoint)
        return
    import torch

    model_class: Any = type(model)
    keywords = {"config": model.config, "dtype": model.dtype, "use_safetensors": True, "output_loading_info": True}
    if sharding.is_fsdp2_sharded(model):
        keywords["distributed_config"] = model.config.distributed_config
    with torch.random.fork_rng(devices=[]):
        source, info = model_class.from_pretrained(checkpoint, **keywords)
    other_shape = (name for name, *_ in info["mismatched_keys"])
    mismatched = sorted({*info["missing_keys"], *info["unexpected_keys"], *other_shape})
    if mismatched:
        name, count = mismatched[0], len(mismatched)
        raise SetupError(f"{checkpoint}: its tensors differ from the model's, for example {name} ({count} in all)")
    sharding.free_gathered_weights(model)
    model.load_state_dict(source.state_dict())
