"""DeepSpeed's settings: read, checked, completed; what lies where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from transformers import BertConfig

from fulltune import methods
from fulltune.errors import RecipeError
from fulltune.plan import budget
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import load_recipe
from fulltune.recipe.methods import Method
from fulltune.records.plan import MemorySettings
from fulltune.system import parallel_layout
from fulltune.system.parallel_layout import ParallelLayout
from tests import tiny

STATE = {"weights": 400, "gradients": 400, "optimizer": 800}


def recipe(settings: Any, model: dict[str, Any] | None = None, **train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": "m", **(model or {})},
            "task": "text-classification",
            "data": {"train": "rows.csv"},
            "method": {"kind": "full"},
            "train": {**train, "extra": {"deepspeed": settings}},
        }
    )


def problems(settings: Any, model: dict[str, Any] | None = None) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        parallel_layout.zero_settings(recipe(settings, model))
    return caught.value.problems


def test_settings_left_out_follow_the_recipe() -> None:
    found = parallel_layout.zero_settings(recipe({"zero_optimization": {"stage": 3}}))

    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert [found[name] for name in names] == ["auto"] * 4
    assert found["bf16"] == found["fp16"] == {"enabled": "auto"}


def test_file_is_found_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}), encoding="utf-8")
    path = tiny.write_recipe(tmp_path / "r.yaml", "m", "rows.csv", train={"extra": {"deepspeed": "zero.json"}})

    loaded = load_recipe(path)

    assert loaded.train.extra["deepspeed"] == str(tmp_path / "zero.json")
    assert parallel_layout.layout_of(loaded) == ParallelLayout(stage=2, offload_optimizer=False, offload_weights=False)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "no such file"), ("{", "not valid JSON"), ("[1]", "expected settings in { }, found list")],
)
def test_file_that_cannot_be_used_is_named(content: str | None, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    (line,) = problems(str(file))
    assert line.startswith(f"train.extra.deepspeed: {file}: ")
    assert expected in line


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (None, "zero_optimization.stage: expected 0, 1, 2 or 3, found null"),
        ({"stage": 4}, "zero_optimization.stage: expected 0, 1, 2 or 3, found 4"),
        ({"stage": "3"}, 'zero_optimization.stage: expected 0, 1, 2 or 3, found "3"'),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, 'expected the device cpu, found "nvme"'),
        ({"stage": 3, "offload_param": True}, "offload_param: expected the device cpu, found true"),
    ],
)
def test_block_that_cannot_be_used_is_refused(block: Any, expected: str) -> None:
    (line,) = problems({} if block is None else {"zero_optimization": block})
    assert expected in line


def test_all_problems_are_named_at_once() -> None:
    settings = {
        "zero_optimization": {"stage": 9},
        "optimizer": {"type": "AdamW"},
        "scheduler": {"type": "WarmupLR"},
        "bf16": True,
    }
    lines = problems(settings, model={"weights_dtype": "bf16"})
    assert len(lines) == 5
    for word in ("stage", "optimizer: remove it", "scheduler: remove it", "bf16: expected a block", "weights_dtype"):
        assert any(word in line for line in lines), word


def planned(precision: str) -> MemorySettings:
    sizes = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "num_processes": 2, "longest_tokens": 8}
    return MemorySettings.model_validate({**sizes, "precision": precision})


def test_settings_that_contradict_the_plan_are_all_named() -> None:
    settings = {
        "zero_optimization": {"stage": 3},
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
    }
    lines = parallel_layout.plan_conflicts(recipe(settings), planned("fp32"))

    assert lines == [
        "train.extra.deepspeed: train_batch_size is 16, but train.global_batch_size gives 8; set "
        "train_batch_size to "
        '"auto"',
        "train.extra.deepspeed: gradient_clipping is 0.5, but train.max_grad_norm gives 1.0; set gradient_clipping to "
        '"auto"',
        'train.extra.deepspeed: bf16.enabled is true, but train.precision gives false; set bf16.enabled to "auto"',
    ]


def test_settings_that_agree_with_the_plan_pass() -> None:
    settings = {"zero_optimization": {"stage": 1}, "train_batch_size": 8, "bf16": {"enabled": True}}
    assert parallel_layout.plan_conflicts(recipe(settings), planned("bf16")) == []


@pytest.mark.parametrize(
    ("shared", "device_bytes", "host_bytes"),
    [
        (ParallelLayout(0, False, False), 1600, 0),
        (ParallelLayout(1, False, False), 1200, 0),
        (ParallelLayout(2, False, False), 1000, 0),
        (ParallelLayout(3, False, False), 800, 0),
        (ParallelLayout(2, True, False), 400, 1200),
        (ParallelLayout(3, True, False), 200, 1200),
        (ParallelLayout(3, True, True), 0, 1600),
    ],
)
def test_bytes_on_device_and_host_with_two_processes(
    shared: ParallelLayout, device_bytes: int, host_bytes: int
) -> None:
    assert sum(shared.bytes_on("device", STATE, 2).values()) == device_bytes
    assert 2 * sum(shared.bytes_on("host", STATE, 2).values()) == host_bytes


def test_what_stays_as_it_was_has_no_gradients_and_no_optimizer_state() -> None:
    assert budget.zero_state_bytes(100, 10) == {"weights": 200, "gradients": 40, "optimizer": 120}
    assert budget.zero_state_bytes(100) == {"weights": 200, "gradients": 400, "optimizer": 1200}


METHODS: Any = TypeAdapter(Method)


@pytest.mark.parametrize(
    ("settings", "kind", "expected"),
    [
        ({"zero_optimization": {"stage": 3}}, "lora", ""),
        ({"zero_optimization": {"stage": 3}}, "adapter", ""),
        ({"zero_optimization": {"stage": 2}}, "peft", ""),
        ({"zero_optimization": {"stage": 3}}, "peft", "PEFT may read whole weights, but train.extra.deepspeed shards"),
    ],
)
def test_methods_that_cannot_run_inside_deepspeed_are_refused(settings: Any, kind: str, expected: str) -> None:
    method = METHODS.validate_python({"kind": kind} | ({"type": "IA3"} if kind == "peft" else {}))
    found = methods.method_problems(recipe(settings), BertConfig(), method)
    assert len(found) == bool(expected)
    assert expected in "".join(found)
