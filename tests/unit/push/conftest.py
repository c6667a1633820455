from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from tests import tiny
from tests.unit.push.hub import Hub, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that huggingface_hub talks to, with a token."""
    with serving(Hub()) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
        close_session()
        yield served
        close_session()


@pytest.fixture(scope="session")
def _chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save_model(tmp_path_factory.mktemp("pushed") / "full", "llama")
    notes = {"task": "causal-lm", "problem_type": "messages", "columns": {"messages": "messages"}}
    notes |= {"labels": [], "joint": ""}
    (folder / "fulltune.json").write_text(json.dumps(notes), encoding="utf-8")
    (folder / "README.md").write_text("---\ntags:\n- fulltune\n---\n\n# cooking\n\nA tiny model.\n", encoding="utf-8")
    return folder


@pytest.fixture
def run(tmp_path: Path, _chat_model: Path) -> Path:
    """A finished run's folder with a model and, beside and in the model, what nobody else may see."""
    import shutil

    run = tmp_path / "run"
    shutil.copytree(_chat_model, run / "models" / "full")
    for name in ("data/train/rows.arrow", "scores/full-seed42.npz", "attempts/full-seed42-01/log.txt", "recipe.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("secret", encoding="utf-8")
    for name in ("rows.csv", "training_args.bin", "optimizer.pt", "notes.txt"):
        (run / "models" / "full" / name).write_text("secret", encoding="utf-8")
    return run


MODEL = {
    *("README.md", "chat_template.jinja", "config.json", "fulltune.json", "generation_config.json"),
    *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
}
"""The files of the model that are sent."""
