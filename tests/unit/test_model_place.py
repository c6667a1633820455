"""Where a model is: a run's trained model, a Hub that cannot be reached, folders that hold a part only."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from fulltune.errors import SetupError
from fulltune.methods.folder import copy_permissions_from_config
from fulltune.models import base
from fulltune.models.shapes import check_model
from fulltune.recipe.fields import Recipe
from fulltune.recipe.model import ModelBlock
from tests import tiny


def _run(folder: Path, *methods: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.json").write_text("{}")
    for method in methods:
        (folder / "models").mkdir(exist_ok=True)
        tiny.save_model(folder / "models" / method, "bert")
    return folder


def test_run_means_its_trained_model(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", "full")
    assert base.find_model_path(ModelBlock(name=str(run))) == run / "models" / "full"


def test_run_without_a_model_or_with_several_says_what_to_write(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    with pytest.raises(SetupError, match=f"this run has no finished model; finish it with 'fulltune run {run}'"):
        base.find_model_path(ModelBlock(name=str(run)))
    _run(run, "full", "lora")
    with pytest.raises(SetupError, match=f"several models; choose one of them: {run}/models/full, {run}/models/lora"):
        base.find_model_path(ModelBlock(name=str(run)))


def test_part_of_a_model_is_not_trained_on(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {"model": str(_run(tmp_path / "run", "lora")), "task": "text-classification", "data": {"train": "a.csv"}}
    )
    found = base.Base.from_block(recipe.model)
    check_model(recipe, found)
    assert found.path is not None
    (found.path / "adapter_config.json").write_text("{}")
    with pytest.raises(SetupError, match=r"only trained parameters; .* 'fulltune export .*models/lora --to hf"):
        check_model(recipe, found)


@pytest.mark.parametrize("is_known", [True, False])
def test_hub_whose_name_is_unknown_is_not_asked(
    is_known: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def resolve(*_: Any) -> list[Any]:
        if not is_known:
            raise socket.gaierror(-2, "Name or service not known")
        return []

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(base, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    base._go_offline_without_network.cache_clear()
    for _ in range(2):
        base.find_model_path(ModelBlock(name="some/model"))
    assert (constants.HF_HUB_OFFLINE, os.environ["HF_HUB_OFFLINE"]) == (not is_known, "01"[not is_known])
    assert caplog.text.count("cannot be reached") == (not is_known)
    base._go_offline_without_network.cache_clear()


def test_files_of_a_model_can_be_read_by_whoever_may_read_its_config(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "config.json").chmod(0o640)
    (tmp_path / "model.safetensors").chmod(0o600)
    copy_permissions_from_config(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640
