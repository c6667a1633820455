"""Liger's kernels beside our loss; where Liger and Triton are installed, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fulltune.errors import RecipeError, SetupError
from fulltune.models import kernels
from fulltune.plan import resolve
from fulltune.recipe.fields import Recipe
from fulltune.recipe.rules import problems_of
from fulltune.train.loop import arguments
from tests import tiny
from tests.train import runs


def recipe(**train: Any) -> Recipe:
    values = {"use_liger_kernel": True, **train}
    return Recipe.model_validate({"model": "m", "task": "causal-lm", "data": {"train": "t.csv"}, "train": values})


def test_liger_is_given_everything_but_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    known = ModuleType("liger_kernel.transformers.monkey_patch")
    known.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}  # type: ignore[attr-defined]  # a stand-in for theirs
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, known.__name__, known)
    from transformers.integrations import liger as theirs

    monkeypatch.setattr(theirs, "apply_liger_kernel", lambda model, config: given.append((model, config)))
    model = SimpleNamespace(config=SimpleNamespace(model_type="llama"))

    kernels.apply_liger_kernels(model)

    assert given == [(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})]
    with pytest.raises(SetupError, match="Liger has no kernels for models of type 'bert'; remove the setting"):
        kernels.apply_liger_kernels(SimpleNamespace(config=SimpleNamespace(model_type="bert")))


def test_where_it_cannot_be_had_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = problems_of(recipe(placement="zero2"))
    assert problem == "train.use_liger_kernel: is not supported with train.placement: zero2 yet; remove one of them"
    with pytest.raises(
        ValueError, match="use_liger_kernel and torch_compile fuse the same operations; use only one of the two"
    ):
        recipe(torch_compile=True)
    with pytest.raises(RecipeError, match="use_liger_kernel only runs on a GPU"):
        resolve.check_kernels(recipe(), SimpleNamespace(gpus=()), "cpu", "bf16")  # type: ignore[arg-type]  # has no card
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"needs a missing package; run: pip install 'fulltune\[liger\]'"):
        arguments.check_trainable(recipe())


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter (3.5 to 3.9), with what it lacks for these kernels: numbers as arguments, and `rsqrt`.

    Needs TRITON_INTERPRET=1 before Triton is imported.
    """
    if any(importlib.util.find_spec(name) is None for name in ("liger_kernel", "triton")):
        pytest.skip("needs liger-kernel and triton: make test-zero")
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    theirs = interpreter._implicit_cvt

    def converted(value: Any) -> Any:
        if not isinstance(value, float):
            return theirs(value)
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda value: tl.math.rsqrt(value))
    monkeypatch.setattr(resolve, "check_kernels", lambda *_: None)


@pytest.mark.long
@pytest.mark.zero
@pytest.mark.usefixtures("interpreted")
def test_interpreted_on_a_cpu_the_curve_is_that_of_the_plain_model(tmp_path: Path) -> None:
    from transformers.models.llama import modeling_llama

    plain = {name: getattr(modeling_llama, name) for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")}
    model = tiny.save_model(tmp_path / "model", "llama")
    curves = []
    try:
        for on in (False, True):
            train = {"max_steps": 8, "logging_steps": 1, "global_batch_size": 2, "use_liger_kernel": on}
            folder = tmp_path / str(on)
            outcome = runs.run(folder, model, tiny.pair_rows(16), task="causal-lm", train=train).outcome
            assert outcome is not None
            checks = {one.name: one.result for one in outcome.checks}
            assert checks["logits of trained tokens only"].startswith("yes")
            assert checks["chunked loss"].startswith("yes")
            curves.append([event["loss"] for event in runs.events(folder, "train")])
        assert modeling_llama.apply_rotary_pos_emb is not plain["apply_rotary_pos_emb"]
    finally:  # Liger changes the module for good
        for name, one in plain.items():
            setattr(modeling_llama, name, one)

    assert len(curves[0]) == 8
    assert torch.allclose(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-5)
