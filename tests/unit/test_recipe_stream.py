"""The recipe's `placement: stream`: what it cannot do is said with the setting, and its folder is resolved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fulltune.errors import RecipeError
from fulltune.recipe.file import load_recipe
from fulltune.recipe.rules import problems_of
from tests import plans

STREAM: dict[str, Any] = {"placement": "stream"}


@pytest.mark.parametrize(
    ("blocks", "problem"),
    [
        ({"train": {"optim": "adafactor"}}, "train.optim: 'adafactor' cannot update slices of a state on disk"),
        ({"train": {"optim": "sgd"}}, "expected one of adamw_8bit, adamw_bf16, adamw_torch_fused"),
        ({"train": {"precision": "fp16"}}, "train.precision: fp16 scales the loss"),
        ({"train": {"torch_compile": True}}, "train.torch_compile: is not supported with placement: stream"),
        ({"train": {"use_liger_kernel": True}}, "train.use_liger_kernel: is not supported with placement: stream"),
        ({"train": {"activation_checkpointing": True}}, "train.activation_checkpointing: has no effect"),
        ({"train": {"bf16_rounding": "kahan"}, "model": {"weights_dtype": "bf16"}}, "train.bf16_rounding: "),
        ({"method": {"kind": "lora"}}, "method.kind: placement: stream trains all parameters, but not lora"),
        ({"method": {"kind": "full", "freeze": ["embeddings"]}}, "method.freeze: placement: stream trains all"),
        ({"method": {"kind": "full", "head_init": "probe"}}, "method.head_init: is not supported with placement"),
        ({"method": {"kind": "full", "learning_rate": "search"}}, "train.placement: stream keeps one training state"),
        ({"data": {"folds": 3}}, "train one fold with data.fold"),
        ({"methods": ["full", "lora"]}, "but a comparison trains several models"),
        ({"model": {"new_tokens": ["<a>"]}}, "model.new_tokens: is not supported with placement: stream"),
        ({"preserve": {"budget": "1%"}}, "preserve.budget: is not supported with placement: stream"),
    ],
)
def test_what_cannot_be_streamed_is_said_with_its_setting(blocks: dict[str, Any], problem: str) -> None:
    for placement, count in (("stream", 1), ("auto", 0)):
        given = {**blocks, "train": {**blocks.get("train", {}), "placement": placement}}
        given["data"] = {"train": "rows.csv", **blocks.get("data", {})}
        given["model"] = {"name": "m", **blocks.get("model", {})}
        assert sum(problem in one for one in problems_of(plans.recipe(**given))) == count, placement


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        ({"num_processes": 2}, "placement: stream runs one process, but num_processes is 2"),
        ({"offload": "optimizer"}, "offload: 'optimizer' needs placement: zero2 or zero3, found stream"),
        ({"extra": {"deepspeed": {}}}, "placement and train.extra.deepspeed both set"),
        ({"placement": "single", "stream": {}}, "stream: has no effect with placement: single"),
        (
            {"stream": {"host_memory": "3 gigs"}},
            "expected a size above 0, such as 6GiB, 512MB or 600TB, found '3 gigs'",
        ),
        ({"stream": {"rated_writes": "0TB"}}, "expected a size above 0"),
        ({"stream": {"disk": ""}}, "at least 1 character"),
    ],
)
def test_block_that_contradicts_itself_is_refused(train: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError) as refused:
        plans.recipe(train={**STREAM, **train})
    assert problem in str(refused.value)


def test_usual_recipe_may_be_streamed_and_other_placements_are_as_before() -> None:
    assert problems_of(plans.recipe(train={**STREAM, "optim": "adamw_8bit", "precision": "bf16"})) == []
    assert problems_of(plans.recipe(train={"stream": {"disk": "d"}})) == []  # the plan may choose stream
    random = plans.recipe(model={"name": "m", "random_weights": True}, method={"kind": "full", "head_init": "probe"})
    one, other = sorted(problems_of(random))
    assert one.startswith("method.head_init: a linear probe on random features is useless")
    assert other.startswith("train.placement: only placement: stream can start from random weights")


def test_only_the_type_of_the_gradients_changes_the_result() -> None:
    first = plans.recipe(train={**STREAM, "stream": {}}).fingerprint()
    moved = {**STREAM, "stream": {"disk": "/d", "host_memory": "4GiB", "rated_writes": "1TB"}}
    assert plans.recipe(train=moved).fingerprint() == first
    assert plans.recipe(train=STREAM).fingerprint() == first
    assert plans.recipe(train={**STREAM, "stream": {"gradients": "fp32"}}).fingerprint() != first


def test_disk_starts_at_the_recipes_folder_and_typos_have_their_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    text = "model: m\ntask: causal-lm\ndata: {train: x.csv}\ntrain:\n  placement: stream\n"
    path.write_text(text + "  stream: {disk: fast, gradients: bf16}\n", encoding="utf-8")
    block = load_recipe(path).train.stream
    assert block is not None
    assert block.disk == str((tmp_path / "fast").resolve())
    path.write_text(text + "  stream:\n    host_memory: 3 gigs\n    disc: fast\n", encoding="utf-8")
    with pytest.raises(RecipeError) as refusal:
        load_recipe(path)
    assert sorted(refusal.value.problems) == [
        f"{path}:7  train.stream.host_memory: expected a size above 0, such as 6GiB, 512MB or 600TB, found '3 gigs'",
        f"{path}:8  train.stream.disc: unknown setting; did you mean 'disk'?",
    ]
