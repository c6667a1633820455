"""Tests of checkpoints' guard state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fulltune.errors import SetupError
from fulltune.train.checkpoints import GUARD, load_guard_state, save_guard_state


def test_a_checkpoint_of_another_version_is_refused_by_the_missing_names(tmp_path: Path) -> None:
    save_guard_state(tmp_path, {"skipped": [3], "generic": np.ones(2)})
    assert load_guard_state(tmp_path, ("skipped", "generic"))["skipped"] == [3]
    with pytest.raises(SetupError, match=rf"{GUARD}: found no matched_start, num_worse, because .*--fresh"):
        load_guard_state(tmp_path, ("skipped", "num_worse", "matched_start"))
