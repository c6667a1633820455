"""What all tests share: no network, one thread (tiny models gain nothing from more), models made once per session."""

from __future__ import annotations

import gc
import hashlib
import os
import signal
from collections.abc import Iterator

# Before any test imports transformers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["COLUMNS"] = "120"

from pathlib import Path
from typing import Any

import pytest

from tests import noisy, tiny
from tests.forked_ranks import Forks

# Whoever runs the tests under nohup, or behind an `&`, ignores these, and so would all that the tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# A machine that runs the tests is busy, and a plan of a busy machine is made again before anything begins.
os.getloadavg = lambda: (0.0, 0.0, 0.0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _kernels_round_otherwise() -> Iterator[None]:
    """Where `make test-noisy` asks for it."""
    with noisy.noise():
        yield


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_no_garbage() -> None:
    """Each run collects garbage several times, and would walk through all that the libraries hold: 0.4 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Copies of data are no other test's. Not by `monkeypatch`, which would then be undone after all other fixtures."""
    digest = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]
    os.environ["FULLTUNE_CACHE"] = str(tmp_path_factory.getbasetemp() / f"cache-{digest}")


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny BERT without a head; do not write into it."""
    return tiny.save_model(tmp_path_factory.mktemp("encoder") / "tiny-bert", "bert")


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama with a chat template and no padding token; do not write into it."""
    return tiny.save_model(tmp_path_factory.mktemp("decoder") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def encoder_tokenizer() -> Any:
    return tiny.encoder_tokenizer()


@pytest.fixture(scope="session")
def decoder_tokenizer() -> Any:
    """Chat template without marks; the end token pads, as fulltune sets it when a tokenizer has no padding token."""
    return tiny.decoder_tokenizer(pad="<|im_end|>")


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts processes of runs without the seconds of their imports."""
    found = Forks()
    yield found
    found.end()
