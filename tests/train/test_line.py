"""The line of a run: what it reads, and how often."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fulltune import pipeline
from fulltune.models import base
from fulltune.recipe.model import ModelBlock
from fulltune.train.hooks import Hooks
from fulltune.train.worker import main
from tests import tiny
from tests.train import runs


@pytest.mark.parametrize("method", ["full", "lora"])
def test_run_finds_its_model_and_reads_config_and_tokenizer_once_in_each_process(
    tiny_encoder: Path, tmp_path: Path, method: str
) -> None:
    here, in_worker = Counter[str](), Counter[str]()
    now = here  # whose reading is counted

    def attempt(request: Any, listener: Any) -> Any:
        """The worker is a process of its own otherwise."""
        nonlocal now
        now = in_worker
        outcome = main.run_attempt(request, Hooks(), listener)
        now = here
        return outcome

    locate, read = base.find_model_path, base.load_with_advice

    def located(block: ModelBlock) -> Any:
        now[f"{Path(block.name).name}: place"] += 1
        return locate(block)

    def reading(block: ModelBlock, what: str, call: Any) -> Any:
        now[f"{Path(block.name).name}: {what}"] += 1
        return read(block, what, call)

    job = runs.job(tmp_path, tiny_encoder, tiny.topic_rows(40), method={"kind": method}, train={"num_train_epochs": 1})
    with (
        runs.in_this_process(attempt),
        mock.patch.object(base, "find_model_path", located),
        mock.patch.object(base, "load_with_advice", reading),
    ):
        assert pipeline.run(job).report

    once = {f"{tiny_encoder.name}: {what}": 1 for what in ("place", "config", "tokenizer")}
    assert in_worker == once
    assert here == once | {what.replace(tiny_encoder.name, method): 1 for what in once}, "and what came out of it"
