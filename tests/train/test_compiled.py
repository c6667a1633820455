"""Blocks that run compiled: the curve of the model as it is, beside hooks, and few compilations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch._dynamo.utils import counters

from fulltune.errors import SetupError
from fulltune.models import kernels
from fulltune.models.kernels import compile_blocks
from fulltune.recipe.fields import Recipe
from fulltune.recipe.rules import problems_of
from fulltune.train.worker import loading
from tests import tiny
from tests.train import runs

STEPS = 8
EACH_KIND = 3
"""Compilations of a kind of block where sizes differ: for batches with padding, without, and of a single row."""


@pytest.fixture(autouse=True)
def few_compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of other tests is compiled already, and no code is generated."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(loading, "compile_blocks", partial(compile_blocks, backend="aot_eager"))
    yield
    torch._dynamo.reset()


def train(folder: Path, model: Path, rows: Any, *, compile: bool, **blocks: Any) -> Any:
    train = {"max_steps": STEPS, "logging_steps": 1, "torch_compile": compile, **blocks.pop("train", {})}
    reached = runs.run(folder, model, rows, train=train, **blocks)
    assert reached.outcome is not None
    return reached.outcome


def assert_same_curve(folder: Path, model: Path, rows: Any, **blocks: Any) -> Any:
    """Steps, evaluations and the loss with and without; returns the compiled run's outcome."""
    outcomes = [train(folder / str(on), model, rows, compile=on, **blocks) for on in (False, True)]
    losses = [[event["loss"] for event in runs.events(folder / str(on), "train")] for on in (False, True)]
    assert len(losses[0]) == STEPS
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][0] != losses[0][-1]
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    return outcomes[1]


def results(outcome: Any) -> dict[str, str]:
    return {one.name: one.result for one in outcome.checks}


def test_selective_head_and_chunked_loss_stay_on_with_rows_of_all_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "compile_blocks", partial(compile_blocks, backend="eager"))
    model = tiny.save_model(tmp_path / "model", "llama")
    rows = [row | {"completion": row["completion"] * (1 + number % 5)} for number, row in enumerate(tiny.pair_rows(23))]
    blocks = {"task": "causal-lm", "evaluate": {"generate_rows": 2, "max_new_tokens": 3}}

    outcome = assert_same_curve(tmp_path, model, rows, train={"chunked_loss": True, "micro_batch_size": 2}, **blocks)

    found = results(outcome)
    assert found["logits of trained tokens only"].startswith("yes")
    assert found["chunked loss"].startswith("yes")
    assert counters["stats"]["unique_graphs"] <= EACH_KIND
    with safe_open(tmp_path / "True" / "run" / "models" / "full" / "model.safetensors", "pt") as saved:
        names = set(saved.keys())
    with safe_open(model / "model.safetensors", "pt") as given:
        assert names == set(given.keys())


@pytest.mark.long
def test_dropout_draws_the_same_again_where_blocks_are_recomputed(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "bert")
    curves = []
    for recomputed in (False, True):
        folder = tmp_path / str(recomputed)
        outcome = train(folder, model, tiny.topic_rows(), compile=True, train={"activation_checkpointing": recomputed})
        assert results(outcome)["dropout"] == "PyTorch's, or none"
        curves.append([event["loss"] for event in runs.events(folder, "train")])
        assert not counters["graph_break"]

    assert len(curves[0]) == STEPS
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


@pytest.mark.long
def test_generated_code_gives_the_same_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.missing_compiler("cpu"):
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(loading, "compile_blocks", compile_blocks)
    model = tiny.save_model(tmp_path / "model", "llama")

    assert_same_curve(tmp_path, model, tiny.pair_rows(), task="causal-lm")


@pytest.mark.parametrize(
    ("model", "compilers", "problem"),
    [
        (torch.nn.Linear(2, 2), "/bin", "Linear has no repeated blocks .* to compile; remove the setting"),
        (torch.nn.ModuleList([torch.nn.Linear(2, 2)]), "", r"no C\+\+ compiler .* was found"),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    model: Any, compilers: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.shutil, "which", lambda name: compilers or None)
    with pytest.raises(SetupError, match=problem):
        compile_blocks(model, "cpu")


def test_in_deepspeed_and_as_transformers_own_it_is_refused() -> None:
    def problem(**train: Any) -> str:
        values = {"model": "m", "task": "causal-lm", "data": {"train": "t.csv"}, "train": train}
        return problems_of(Recipe.model_validate(values))[0]

    refused = problem(torch_compile=True, placement="zero2")
    assert "torch_compile: is not supported with train.placement: zero2 yet; remove one of them" in refused
    own = problem(extra={"torch_compile": True})
    assert "torch_compile: has its own setting; write train.torch_compile" in own
    mode = problem(extra={"torch_compile_mode": "max-autotune"})
    assert "torch_compile_mode: cannot be set here; write train.torch_compile: true" in mode
