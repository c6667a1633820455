from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fulltune import methods
from fulltune.errors import SetupError
from fulltune.models.base import Base
from fulltune.models.load import HeadOrigin, torch_dtype
from fulltune.recipe.fields import Recipe
from fulltune.records.training import ParameterChanges
from fulltune.stream.executor import Executor, install
from fulltune.stream.files import files_digest
from fulltune.stream.layout import WEIGHTS
from fulltune.stream.skeleton import Skeleton, skeleton
from fulltune.stream.state import FILE, DiskState, exists
from fulltune.stream.training import Streamed, attach, streamed_of
from fulltune.stream.units import find_units, use_placeholders
from fulltune.tasks import Target, Task
from fulltune.train import checkpoints
from fulltune.train.loop.inputs import AttemptInputs
from fulltune.train.optim.streamed import initial_sections, unit_layouts

_SAMPLES = "samples.safetensors"
_SAMPLED_PARTS, _VALUES_PER_PART = 16, 256
_PAGE_VALUES = 4096
"""Values after which each section of the state begins a page."""


def load_skeleton(
    recipe: Recipe, task: Task, target: Target, before_weights: Callable[[], None]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, HeadOrigin | None, Skeleton]:
    """Load the model with the task's head, but without weights; also return its processor and the head's origin."""
    base, heads = Base.from_block(recipe.model, recipe.task, recipe.data.chat_template), list[HeadOrigin]()
    before_weights()
    changes = task.config_changes(target, base.processor)
    source = skeleton(base, changes, head_is_new=task.FACTS.head_is_new, on_head=heads.append)
    return source.model, base.processor, heads[0] if heads else None, source


def open_state(inputs: AttemptInputs, model: PreTrainedModel, source: Skeleton) -> None:
    """Open the state of an interrupted run, or fill a new one, and let the model run from it."""
    request, plan = inputs.request, inputs.plan
    units, folder = find_units(model), plan.state_folder(Path(request.run_folder))
    assert plan.stream is not None
    if is_new := request.checkpoint is None:
        checkpoints.delete_state(folder)
    elif not (exists(folder) and all((folder / name).exists() for name in (FILE, _SAMPLES))):
        raise SetupError(
            f"{folder}: contains no complete training state, although this run is at step {request.first_step:,}; "
            "restore the folder (and the run folder's path, if it was moved), or start a new run (--fresh)"
        )
    state = DiskState(
        folder,
        unit_layouts(model, units, plan.optim),
        gradients=torch_dtype(plan.stream.gradients),
        identity={"recipe": request.recipe.fingerprint(), "model": files_digest(source.stored)},
        host_bytes=plan.stream.cache_bytes,
        create=is_new,
    )
    inputs.cleanup.callback(state.close)
    parameters = dict(model.named_parameters())
    if is_new:
        inputs.recorder.phase("writing the training state")
        for number, unit in enumerate(units):
            values = source.read(unit.names)
            state.write(
                number, {name: initial_sections(parameters[name], values[name], plan.optim) for name in unit.names}
            )
    use_placeholders(model, plan.device)
    executor = Executor(model, units, state, state)
    install(model, executor)
    sizes = [sum(parameters[name].nbytes for name in unit.names) for unit in units]
    attach(model, Streamed(units, sizes, state, executor))


class SampledWeights:
    """Samples of all trained weights before step 1."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Sample up to 8192 values of each tensor, in evenly spaced parts, or read a resumed run's samples."""
        streamed = streamed_of(model)
        assert streamed is not None
        if not (file := streamed.state.folder / _SAMPLES).exists():
            save_file({name: _sample(model, name)[0] for name in methods.trainable_parameters(model)}, file)
        self._before = load_file(file)

    def count_changes(self, model: PreTrainedModel, *_: object) -> ParameterChanges:
        """Count the sampled values that received a gradient, and those that changed."""
        counts: dict[str, tuple[int, int]] = {}
        for name, before in self._before.items():
            now, touched = _sample(model, name)
            if received := int(touched.count_nonzero()):
                counts[name] = received, int(((now != before) & touched).count_nonzero())
        return ParameterChanges.from_counts(counts)


def _sample(model: PreTrainedModel, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return evenly spaced weights, and whether each has received a gradient."""
    streamed = streamed_of(model)
    assert streamed is not None
    count = model.get_parameter(name).numel()
    step = _PAGE_VALUES * max(1, count // _PAGE_VALUES // _SAMPLED_PARTS)
    parts = [(begin, min(_VALUES_PER_PART, count - begin)) for begin in range(0, count, step)]
    weights, second = (
        torch.cat([streamed.state.read_values(name, section, *part) for part in parts])
        for section in (WEIGHTS, "exp_avg_sq")
    )
    return weights, second > (torch.iinfo(torch.int8).min if second.dtype == torch.int8 else 0)
