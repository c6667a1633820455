"""Flash attention, with a kernel that knows 16-bit types alone, as the real ones do, in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import modeling_utils
from transformers.integrations import flash_attention

from fulltune.errors import SetupError
from fulltune.plan import resolve
from fulltune.recipe.fields import Recipe
from fulltune.train.loop.arguments import check_trainable
from tests import tiny
from tests.train import runs


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Types of the queries that a stand-in on the CPU was given."""
    found: list[torch.dtype] = []

    def kernel(query: Any, key: Any, value: Any, mask: Any, *_: Any, target_dtype: Any = None, **named: Any) -> Any:
        if query.dtype == torch.float32 and target_dtype is not None:  # as transformers' own does before its kernel
            query, key, value = (one.to(target_dtype) for one in (query, key, value))
        assert query.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type"
        found.append(query.dtype)
        rows, length = key.shape[:2]
        seen = torch.ones(query.shape[1], length, dtype=torch.bool)
        seen = (seen.tril(length - query.shape[1]) if named["is_causal"] else seen).expand(rows, 1, -1, -1)
        if mask is not None:
            seen = seen & mask[:, None, None, -length:].bool()
        seen = seen | ~seen.any(dim=-1, keepdim=True)
        query, key, value = (one.transpose(1, 2) for one in (query, key, value))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, attn_mask=seen, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", kernel)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *_, **__: None)
    monkeypatch.setattr(modeling_utils.PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    monkeypatch.setattr(resolve, "check_kernels", lambda *_: None)  # there is no GPU
    monkeypatch.setattr("fulltune.train.loop.arguments._KERNELS", {})
    return found


def test_each_pass_of_a_run_with_fp32_weights_reaches_the_kernel_in_16_bits(
    tmp_path: Path, seen: list[torch.dtype]
) -> None:
    model = tiny.save_model(tmp_path / "model", "llama")
    block = {"name": str(model), "attn_implementation": "flash_attention_2"}

    reached = runs.run(
        tmp_path,
        model,
        tiny.pair_rows(),
        until="report",
        task="causal-lm",
        model=block,
        train={"max_steps": 3, "precision": "bf16"},
    )

    assert reached.outcome is not None
    checks = {one.name: one.result for one in reached.outcome.checks}
    assert checks["logits of trained tokens only"].startswith("yes")
    assert checks["chunked loss"].startswith("yes")
    assert set(seen) == {torch.bfloat16}


def test_a_missing_package_is_named_before_any_row_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def recipe(kernel: str) -> Recipe:
        block = {"name": "m", "attn_implementation": kernel}
        return Recipe.model_validate({"model": block, "task": "causal-lm", "data": {"train": "t.csv"}})

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SetupError, match="'flash_attention_2' needs a missing package: flash-attn or kernels"):
        check_trainable(recipe("flash_attention_2"))
    with pytest.raises(SetupError, match="needs a missing package: flash-attn-interface or kernels"):
        check_trainable(recipe("flash_attention_3"))
    check_trainable(recipe("flash_attention_3"), check_packages=False)
    check_trainable(recipe("sdpa"))
