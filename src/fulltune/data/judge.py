"""The labels of the train rows, judged by what the untouched model sees in their texts or images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fulltune import plan, probe
from fulltune.inference.run import Share
from fulltune.inference.store import Rows
from fulltune.models.base import Base
from fulltune.models.load import load
from fulltune.models.processors import opened
from fulltune.probe.features import sampled
from fulltune.probe.label_errors import Suspected, suspected
from fulltune.probe.layers import NoProbe
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from fulltune.records.events import Listener, RowsRead
from fulltune.system import hardware
from fulltune.system.out_of_memory import is_out_of_memory
from fulltune.tasks import Target, task_named

BATCH = 32
_READING = "reading train rows with the untouched model, to judge their labels"


def judge(
    recipe: Recipe, base: Base, summary: DataSummary, folder: Path, listener: Listener
) -> tuple[np.ndarray, Suspected] | str:
    """Which train rows have a label that is probably wrong.

    Args:
        recipe: The checked recipe.
        base: The pretrained model.
        summary: Of the prepared rows, which have a single label each.
        folder: The run's `data` folder.
        listener: Told how far the reading is.

    Returns:
        Positions of the rows that were judged, and what is known of their labels; or why they cannot be judged.
    """
    import torch

    rows = opened(Rows(folder / "train"), base.processor)
    target, task = Target.of(summary), task_named(recipe.task)
    device, precision = plan.device_and_precision(recipe, hardware.here())
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(probe.SEED)  # what the head lacks is drawn, and not read
            model: Any = load(
                base,
                task.config_changes(target, base.processor),
                head_is_new=task.FACTS.head_is_new,
                block=recipe.model,
            )
        looker = probe.Looker(
            model.to(device),
            recipe.task,
            target,
            base.processor.pad_token_id,
            BATCH,
            precision,
            watch=lambda done, total, share: listener(RowsRead(name=_READING, done=done, total=total, share=share)),
        )
        chosen = sampled(rows, target.problem_type, target.num_choices, model.config.get_text_config().hidden_size)
        found = looker.features(chosen, None)
        if found.mean is None:
            return "this model gives fewer states than there are tokens"
        positions = np.array(chosen.positions if isinstance(chosen, Share) else range(len(rows)))
        return positions, suspected(looker.items(found.mean, found))
    except NoProbe as no:
        return str(no)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return "memory ran out while the untouched model read the rows"
